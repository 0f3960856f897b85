"""TrainStep beside plain loops on the networks of public projects, if their sources are at hand."""

import pytest

from tests.training.public_loops import PROJECTS, ROOT, difference, run

NEEDS = {"stylegan2-pytorch": ("einops", "kornia"), "lightweight-gan": ("einops", "kornia")}


@pytest.mark.slow
@pytest.mark.parametrize(("project", "name"), [(project, name) for project in PROJECTS for name in PROJECTS[project]])
def test_weights_equal_those_of_a_plain_loop(project, name):
    if not (ROOT / project).is_dir():
        pytest.skip(f"no checkout of {project} in FASTGAN_PUBLIC_GANS")
    for package in NEEDS.get(project, ()):
        pytest.importorskip(package)
    expected, *_ = run(name, None)
    for mode in ("eager", "compile"):
        got, told, graphs = run(name, mode)
        # Rounding noise of 1e-16 in the gradient of a bias before a norm, times Adam's lr / eps, of a weight of 1e-3.
        assert difference(expected, got) < 1e-8
        assert told == []
        assert (graphs > 0) == (mode == "compile")
