"""The torchmetrics classes: against torchmetrics' own on a module's features and in a collection."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")

from torchmetrics import MetricCollection
from torchmetrics.image import fid as theirs_fid
from torchmetrics.image import inception as theirs_score
from torchmetrics.image import kid as theirs_kid
from torchmetrics.image import mifid as theirs_mifid
from torchmetrics.wrappers import FeatureShare

from fastgan.metrics import (
    Backbone,
    ClassFrechetDistance,
    FeatureStats,
    FrechetInceptionDistance,
    InceptionScore,
    InputError,
    KernelInceptionDistance,
    MemorizationInformedFrechetInceptionDistance,
    PrecisionRecall,
    frechet_distance,
    inception_score,
    load_backbone,
    precision_recall,
)
from fastgan.metrics.backbones.inception import InceptionV3
from tests.metrics.random_weights import randomize

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
    for side in ("real", "fake"):  # its states, which we keep in another form
        for name in ("sum", "cov_sum", "num_samples"):
            state = f"{side}_features_{name}"
            found, expected = getattr(ours, state), getattr(theirs, state)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert isinstance(ours.inception, Network)
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
    with pytest.raises(InputError, match="to compute FID: at least 2 real images are needed, there are 0"):
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
        ({"feature": 1.5}, "it must be an int, 'logits_unbiased', a module or a Backbone, got 1.5"),
        ({"feature": Network(), "normalize": 1}, "normalize must be a bool"),
        ({"feature": Network(), "reset_real_features": None}, "reset_real_features must be a bool"),
        ({"feature": 100}, "must be one of .64, 192, 768, 2048., but got 100"),
    ):
        with pytest.raises(ValueError, match=message):
            FrechetInceptionDistance(**options)
    backbone = Backbone(Network(), name="net", dim=DIM)
    with pytest.raises(ValueError, match="Expecting image as torch.Tensor with dtype=torch.uint8 with normalize=False"):
        FrechetInceptionDistance(feature=backbone).update(torch.rand(2, 3, 2, 2), real=True)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        FrechetInceptionDistance(feature=backbone, normalize=True).update(torch.rand(2, 3, 2, 2) * 255, real=True)
    with pytest.raises(InputError, match="there are no real images yet"):
        PrecisionRecall(feature=Network()).compute()
    nan = torch.full((2, 3, 2, 2), float("nan"))
    with pytest.raises(InputError, match="features must be finite: row 0"):
        FrechetInceptionDistance(feature=Network()).update(nan, real=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(randomize(InceptionV3()).state_dict(), path)
    return str(path)


def pixels(n, seed=0):
    return torch.randint(0, 256, (n, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_inception_follows_the_metric_and_nothing_else_reaches_it(weights):
    metric = FrechetInceptionDistance(64, feature_extractor_weights_path=weights)
    expected = metric.extract(pixels(3))
    parent = nn.ModuleDict({"metric": metric, "own": nn.Linear(2, 2)})
    parent.train()
    for convert in (nn.Module.half, nn.Module.double, lambda module: module.to(torch.bfloat16)):
        convert(parent)
        assert torch.equal(metric.extract(pixels(3)), expected)
        assert metric.real.dtype == torch.float64
    metric.set_dtype(torch.float16)
    assert torch.equal(metric.extract(pixels(3)), expected)
    assert [name for name, _ in parent.named_parameters()] == ["own.weight", "own.bias"]
    assert set(parent.state_dict()) == {"own.weight", "own.bias"}
    for copied in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(copied.extract(pixels(3)), expected)
    parent.to("meta")
    assert metric.extractor.device.type == metric.real.device.type == "meta"
    assert {parameter.device.type for parameter in metric.extractor._network.parameters()} == {"meta"}


def test_a_module_stays_in_eval_mode_in_a_training_parent():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(DIM), nn.Dropout(0.5))
    metric = PrecisionRecall(network, k=1, input_img_size=(3, 2, 2), normalize=True)
    before = copy.deepcopy(network.state_dict())
    nn.ModuleList([metric, network]).train()
    assert torch.equal(metric.extract(images(5)), metric.extract(images(5)))
    torch.testing.assert_close(network.state_dict(), before)
    metric.train()
    assert not network.training


def test_the_positions_of_torchmetrics():
    fid = FrechetInceptionDistance(Network(), False, True, (3, 4, 4), None, False)
    assert (fid.reset_real_features, fid.normalize) == (False, True)
    assert fid.protocol.name == "torchmetrics+legacy_tensorflow"
    kid = KernelInceptionDistance(Network(), 7, 30, 2, 0.5, 2.0, False, True)
    assert kid._options == {"subsets": 7, "subset_size": 30, "degree": 2, "gamma": 0.5, "coef": 2.0, "seed": 0}
    assert (kid.reset_real_features, kid.normalize) == (False, True)
    score = InceptionScore(Network(), 4, True)
    assert (score.splits, score.normalize) == (4, True)
    assert fid.protocol != FrechetInceptionDistance(Network()).protocol


@pytest.mark.parametrize("extract", [KernelInceptionDistance, InceptionScore])
def test_unbiased_logits(weights, extract):
    metric = extract("logits_unbiased", feature_extractor_weights_path=weights)
    network = InceptionV3("logits_unbiased").eval()
    network.load_state_dict(torch.load(weights))
    expected = load_backbone("inception", weights=weights, dims="logits_unbiased")(pixels(2), protocol="torchmetrics")
    if extract is InceptionScore:
        metric.update(pixels(2))
        found = metric.logits[0]
    else:
        found = metric.extract(pixels(2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_one_network_is_shared():
    """torchmetrics' FeatureShare: each batch goes through the network once, and the metrics still move."""

    class Counting(Network):
        calls = 0

        def forward(self, images):
            Counting.calls += 1
            return super().forward(images)

    network = Counting()
    options = {"feature": network, "input_img_size": (3, 2, 2)}
    shared = FeatureShare(
        {"fid": FrechetInceptionDistance(**options), "prdc": PrecisionRecall(network, 3, input_img_size=(3, 2, 2))}
    )
    for batch, real in ((images(20), True), (images(20, seed=1), False)):
        shared.update(batch, real=real)
    assert Counting.calls == 2
    assert shared.compute()["fid"] > 0
    backbone = Backbone(Network(), name="net", dim=DIM)
    shared = FeatureShare({"fid": FrechetInceptionDistance(backbone), "prdc": PrecisionRecall(backbone, 3)})
    shared.to("meta")
    assert backbone.device.type == "meta"


def test_the_errors_are_theirs_and_ours():
    with pytest.raises(TypeError, match="Got unknown input to argument `feature`"):
        FrechetInceptionDistance(feature=[1, 2])
    with pytest.raises(ValueError, match="Integer input to argument `feature` must be one of .64, 192, 768"):
        KernelInceptionDistance(feature=2)
    with pytest.raises(ValueError, match="Argument `gamma` expected to be `None` or float larger than 0: gamma must"):
        KernelInceptionDistance(Network(), gamma=-1)
    for eps in (-1, 1.1, True):
        with pytest.raises(ValueError, match="Argument `cosine_distance_eps` expected to be a float greater than 0"):
            MemorizationInformedFrechetInceptionDistance(Network(), cosine_distance_eps=eps)
    for error in (RuntimeError, InputError):
        with pytest.raises(error, match="at least 2 real images"):
            FrechetInceptionDistance(Network()).compute()
    small = fed(KernelInceptionDistance(Network(), subset_size=30), images(20), images(40))
    for error in (ValueError, InputError):
        with pytest.raises(error, match="smaller than the number of samples: it must be at most 20, got 30"):
            small.compute()
    wrong = Network()
    wrong.num_features = "12"
    with pytest.raises(TypeError, match="num_features must be an int"):
        FrechetInceptionDistance(wrong)
    tensor = Network()
    tensor.num_features = torch.tensor(DIM)
    assert FrechetInceptionDistance(tensor).num_features == DIM


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *(
            (lambda value, key=key: KernelInceptionDistance(Network(), **{key: value}), key)
            for key in ("subsets", "degree")
        ),
        *(
            (lambda value, key=key: KernelInceptionDistance(Network(), **{key: value}), key)
            for key in ("gamma", "coef")
        ),
        (lambda value: KernelInceptionDistance(Network(), subset_size=value), "subset_size"),
        (lambda value: InceptionScore(Network(), value), "splits"),
        (lambda value: PrecisionRecall(Network(), value), "k"),
        (lambda value: ClassFrechetDistance(value, Network()), "num_classes"),
    ],
)
@pytest.mark.parametrize("value", [0, -3, True, "2", float("nan")])
def test_arguments_are_checked_when_a_metric_is_made(make, name, value):
    with pytest.raises(ValueError, match=name):
        make(value)


def test_a_known_reference():
    real, fake = images(60), images(40, seed=1, shift=0.3)
    features = real.flatten(1)
    for make in (
        lambda **options: FrechetInceptionDistance(Network(), **options),
        lambda **options: KernelInceptionDistance(Network(), 2, 30, **options),
        lambda **options: PrecisionRecall(Network(), 3, **options),
    ):
        expected = fed(make(), real, fake).compute()
        known = make(reference=features.numpy())
        known.update(fake, real=False)
        torch.testing.assert_close(known.compute(), expected, rtol=1e-9, atol=1e-12)
        with pytest.raises(InputError, match="real images must not be given"):
            known.update(real, real=True)
    stats = FrechetInceptionDistance(Network(), reference=FeatureStats().update(features))
    stats.update(fake, real=False)
    torch.testing.assert_close(stats.compute(), fed(FrechetInceptionDistance(Network()), real, fake).compute())
    backbone = Backbone(Network(), name="net", dim=DIM)
    for reference, message in (
        (FeatureStats(backbone="other").update(features), "differ in backbone"),
        (FeatureStats(backbone="net", protocol="clean-fid").update(features), "differ in protocol"),
        (features[:, :5], "reference must have shape"),
    ):
        with pytest.raises(InputError, match=message):
            FrechetInceptionDistance(backbone, reference=reference)
    with pytest.raises(InputError, match="reference must be features"):
        PrecisionRecall(Network(), reference=FeatureStats().update(features))


def test_memorization():
    real, fake = images(60), images(40, seed=1, shift=0.3)
    theirs = theirs_mifid.MemorizationInformedFrechetInceptionDistance(nn.Flatten(), normalize=True)
    ours = MemorizationInformedFrechetInceptionDistance(nn.Flatten(), True, True, 0.2)
    assert ours.cosine_distance_eps == 0.2
    for metric in (theirs, ours):
        fed(metric, real, torch.cat([fake, real[:20] + 1e-3]))
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-3)


@pytest.mark.parametrize(
    "make", [KernelInceptionDistance, PrecisionRecall, InceptionScore, MemorizationInformedFrechetInceptionDistance]
)
def test_a_module_of_any_input_size(make):
    """The number of features is not needed before the first image, so no image is made up to find it."""
    metric = make(nn.Sequential(nn.Flatten(), nn.Linear(5, 4)), normalize=True)
    for real in (True, False):
        metric.update(torch.rand(3, 1, 1, 5), **({} if make is InceptionScore else {"real": real}))
    assert metric.num_features == 4


def test_plots():
    metric = fed(KernelInceptionDistance(Network(), 2, 10), images(20), images(20, seed=1))
    figure, axes = metric.plot()
    assert axes in figure.axes
    FrechetInceptionDistance(Network()).plot([torch.tensor(1.0), torch.tensor(2.0)])


def test_the_spread_of_the_score_is_torchmetrics(monkeypatch):
    """Divided by splits - 1, as theirs; inception_score itself divides by splits."""
    scores = images(40).flatten(1) * 3
    theirs = theirs_score.InceptionScore(feature=nn.Flatten(), splits=4)
    ours = InceptionScore(nn.Flatten(), 4, input_img_size=(3, 2, 2), seed=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: order)
    for metric in (theirs, ours):
        metric.update(images(40) * 3)
    for found, expected in zip(ours.compute(), theirs.compute(), strict=True):
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert inception_score(scores, splits=4).std == pytest.approx(ours.compute()[1].item() * (3 / 4) ** 0.5)


def test_what_is_no_image_and_no_side():
    """Arguments of wrong kinds are refused, and none is taken for another kind."""

    class Pair(nn.Module):
        def forward(self, images):
            return images.flatten(1), images

    plain = {"normalize": True, "input_img_size": (3, 2, 2)}
    kernel = KernelInceptionDistance(nn.Flatten(), **plain)
    kernel.update(images(3), real=True)
    for call, message in (
        (lambda: kernel.update(images(3), real="fake"), "real must be a bool, got 'fake'"),
        (lambda: kernel.update(images(3), real=None), "real must be a bool, got None"),
        (lambda: kernel.update(images(3), real=torch.tensor([True, False])), "real must be a bool"),
        (lambda: kernel.update(torch.tensor(1.0), real=True), "imgs must have a batch dimension"),
        (lambda: kernel.update(torch.rand(3, 3, 4, 4), real=True), "feature must return 12 features for each image"),
        (
            lambda: KernelInceptionDistance(Pair()).update(images(3), real=True),
            "feature must return a tensor, got tuple",
        ),
        (
            lambda: FrechetInceptionDistance(nn.Flatten(), input_img_size=3),
            r"input_img_size must be \(c, h, w\), got 3",
        ),
        (lambda: FrechetInceptionDistance(Network(), sync_timeout=0), "sync_timeout must be a positive number"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    kernel.update(images(2), real=torch.tensor(False))
    assert [len(rows) for rows in (*kernel.real_features, *kernel.fake_features)] == [3, 2]
    classes = ClassFrechetDistance(2, nn.Flatten(), **plain)
    for labels in ([0, 1, 0], torch.tensor([0, 1, 0]).numpy()):
        classes.update(images(3), labels, real=True)
    assert torch.cat(classes.real_labels).tolist() == [0, 1, 0] * 2
    with pytest.raises(InputError, match="labels must be 3 integers, got torch.bool"):
        classes.update(images(3), [True, False, True], real=True)
