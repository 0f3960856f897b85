"""``fuse`` on the models of published packages, unmodified. Packages that are not installed are skipped."""

import pytest

from tests.nn.fusion.public_models import CASES, run


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.package}-{case.name}")
def test_package(case):
    if not case.installed:
        pytest.skip(f"{case.package} is not installed")
    outcome = run(case, compile=False)
    assert dict(outcome.counts()) == case.swapped, str(outcome.report)
    assert len(outcome.report.refused) == case.refused, str(outcome.report)
    assert set(outcome.checks.values()) <= {"equal", "as the original", "only fused"}, outcome.checks
    assert outcome.checks["forward"] == "equal"
