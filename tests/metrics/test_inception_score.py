"""The inception score: against its definition and torchmetrics."""

import numpy as np
import pytest
import torch

from fastgan.metrics import inception_score
from tests.metrics.rows import rows


@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score_is_its_definition(splits):
    logits = rows(20, dim=5) * 3
    order = torch.randperm(20, generator=torch.Generator().manual_seed(7))
    scores = []
    for part in np.array_split(logits[order].numpy(), splits):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        marginal = p.mean(0)
        scores.append(np.exp(np.mean([(q * np.log(q / marginal)).sum() for q in p])))
    result = inception_score(logits, splits=splits, seed=7)
    assert result.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert result.std == pytest.approx(np.std(scores), rel=1e-9)
    assert result.mean >= 1


def test_inception_score_bounds_and_torchmetrics():
    identical = torch.zeros(8, 4)
    assert inception_score(identical, splits=2).mean == 1.0
    assert inception_score(1e3 * torch.eye(4), splits=1).mean == pytest.approx(4.0)
    score = pytest.importorskip("torchmetrics.image.inception").InceptionScore(feature=torch.nn.Flatten(), splits=1)
    images = rows(30, dim=12, dtype=torch.float32).view(30, 3, 2, 2)
    score.update(images)
    ours = inception_score(images.flatten(1), splits=1)
    assert ours.mean == pytest.approx(score.compute()[0].item(), rel=1e-5)


def test_wrong_arguments():
    x = rows(5)
    for call, message in (
        (lambda: inception_score(x, splits=0), "splits must be at least 1"),
        (lambda: inception_score(x, splits=6), "of 6 splits needs as many images, there are 5"),
        (lambda: inception_score(x / 0), "logits must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
