"""The torchmetrics classes: against torchmetrics' own on a module's features and in a collection."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")

from torchmetrics import MetricCollection
from torchmetrics.image import fid as theirs_fid
from torchmetrics.image import kid as theirs_kid

from fastgan.metrics import (
    Backbone,
    ClassFrechetDistance,
    FeatureStats,
    FrechetInceptionDistance,
    InceptionScore,
    InputError,
    KernelInceptionDistance,
    PrecisionRecall,
    frechet_distance,
    precision_recall,
)

DIM = 12


class Network(nn.Module):
    """Images (n, 3, 2, 2) to 12 features."""

    num_features = DIM

    def forward(self, images):
        return images.flatten(1).float()


def images(n, seed=0, shift=0.0):
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) + shift


def fed(metric, real, fake, batch=7):
    for side, is_real in ((real, True), (fake, False)):
        for part in side.split(batch):
            metric.update(part, real=is_real)
    return metric


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_frechet_and_kernel_distance_equal_torchmetrics():
    real, fake = images(60), images(40, seed=1, shift=0.3)
    theirs = theirs_fid.FrechetInceptionDistance(feature=Network(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    ours = FrechetInceptionDistance(feature=Network(), input_img_size=(3, 2, 2))
    assert fed(ours, real, fake).compute().item() == pytest.approx(fed(theirs, real, fake).compute().item(), rel=1e-5)
    options = {"feature": Network(), "subsets": 2, "subset_size": 40}
    theirs = fed(theirs_kid.KernelInceptionDistance(**options), real[:40], fake).compute()
    ours = fed(KernelInceptionDistance(**options), real[:40], fake).compute()
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-4)


def test_a_large_offset_does_not_cost_the_digits():
    real, fake = images(300).double() + 1e5, images(200, seed=1).double() + 1e5
    metric = fed(FrechetInceptionDistance(feature=nn.Flatten(), normalize=True, input_img_size=(3, 2, 2)), real, fake)
    expected = frechet_distance(*(FeatureStats().update(x.flatten(1)) for x in (real - 1e5, fake - 1e5)))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-7)


def test_reset_and_a_collection():
    real, fake = images(30), images(30, seed=1)
    together = MetricCollection(
        {
            "fid": FrechetInceptionDistance(feature=Network(), reset_real_features=False),
            "prdc": PrecisionRecall(feature=Network(), k=3, reset_real_features=False),
        }
    )
    for part, is_real in ((real, True), (fake, False)):
        together.update(part, real=is_real)
    first = together.compute()
    assert first["fid"] > 0
    expected = precision_recall(real.flatten(1), fake.flatten(1), k=3)
    assert first["recall"].item() == pytest.approx(expected.recall)
    together.reset()
    together.update(fake, real=False)
    assert together.compute() == first
    forgetful = fed(FrechetInceptionDistance(feature=Network()), real, fake)
    forgetful.reset()
    with pytest.raises(InputError, match="at least 2 real images are needed for a Frechet distance, there are 0"):
        forgetful.compute()


def test_class_distances():
    real, fake = images(90), images(70, seed=1, shift=0.2)
    labels = [torch.arange(90) % 4, torch.arange(70) % 3]  # class 3 has no fake images, class 4 none at all
    metric = ClassFrechetDistance(5, feature=Network())
    metric.update(real, labels[0], real=True)
    metric.update(fake[:50], labels[1][:50], real=False)
    metric.update(fake[50:], labels[1][50:], real=False)
    values = metric.compute()
    for c in range(3):
        sides = [FeatureStats().update(x[y == c].flatten(1)) for x, y in zip((real, fake), labels, strict=True)]
        assert values[c].item() == pytest.approx(frechet_distance(*sides), rel=1e-8)
    assert values[3:].isnan().all()
    for wrong, message in (
        (torch.tensor([5]), r"in \[0, 5\), got 5 to 5"),
        (torch.zeros(2).long(), "must be 1 integers"),
    ):
        with pytest.raises(InputError, match=message):
            metric.update(real[:1], wrong, real=True)


def test_inception_score_through_a_head():
    backbone = Backbone(Network(), name="net", dim=DIM, head=lambda features: 5 * features)
    metric = InceptionScore(feature=backbone, splits=2)
    metric.update(torch.randint(0, 256, (20, 3, 2, 2), dtype=torch.uint8))
    mean, _ = metric.compute()
    assert mean > 1.01
    plain = InceptionScore(feature=Network(), splits=1)
    plain.update(torch.zeros(4, 3, 2, 2))
    assert plain.compute()[0] == 1.0


def test_wrong_arguments():
    for options, message in (
        ({"feature": 1.5}, "feature must be an int, 'logits', a module or a Backbone"),
        ({"feature": Network(), "normalize": 1}, "normalize must be a bool"),
        ({"feature": Network(), "reset_real_features": None}, "reset_real_features must be a bool"),
        ({"feature": 100}, "dims must be one of 64, 192, 768, 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            FrechetInceptionDistance(**options)
    backbone = Backbone(Network(), name="net", dim=DIM)
    with pytest.raises(ValueError, match=r"imgs must be uint8 in \[0, 255\] with normalize=False"):
        FrechetInceptionDistance(feature=backbone).update(torch.rand(2, 3, 2, 2), real=True)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        FrechetInceptionDistance(feature=backbone, normalize=True).update(torch.rand(2, 3, 2, 2) * 255, real=True)
    with pytest.raises(InputError, match="there are no real images yet"):
        PrecisionRecall(feature=Network()).compute()
    nan = torch.full((2, 3, 2, 2), float("nan"))
    with pytest.raises(InputError, match="features must be finite: row 0"):
        FrechetInceptionDistance(feature=Network()).update(nan, real=True)
