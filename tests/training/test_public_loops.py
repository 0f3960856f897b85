"""TrainStep beside plain loops on the networks of public projects, if their sources are at hand."""

import pytest

from tests.training.public_loops import LOOPS, ROOT, difference, run


@pytest.mark.slow
@pytest.mark.skipif(not ROOT.is_dir(), reason="no checkouts in FASTGAN_PUBLIC_GANS")
@pytest.mark.parametrize("name", LOOPS)
def test_weights_equal_those_of_a_plain_loop(name):
    expected, _ = run(name, None)
    for mode in ("eager", "compile"):
        got, _ = run(name, mode)
        assert difference(got, expected) < 1e-8
