import pytest

from fastgan.training import scoring
from tests.training.tiny_runs import PIXELS


@pytest.fixture
def quick_features(request, monkeypatch):
    """Distances of coarse pixels, but where a test asks for the real network."""
    if "real_features" not in request.fixturenames:
        monkeypatch.setattr(scoring, "load_backbone", lambda *_args, **_options: PIXELS)
