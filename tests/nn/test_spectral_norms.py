import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm

from fastgan.nn import group_spectral_norm, spectral_norm
from tests.nn.normed_networks import assert_same_state, grouped, images, network, train, vectors


@pytest.mark.parametrize("make", [lambda dtype: network(spectral_norm, dtype), grouped], ids=["layer", "group"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_a_hundred_training_steps_equal_torch(make, dtype, tolerance):
    ours, torchs = make(dtype), network(parametrizations.spectral_norm, dtype)
    assert_same_state(ours, torchs, rtol=1e-6, atol=1e-6)  # the first vectors are float32's
    ours.load_state_dict(torchs.state_dict())
    train(ours, 100)
    train(torchs, 100)
    assert_same_state(ours, torchs, rtol=tolerance, atol=tolerance)
    outputs = ours.eval()(images().to(dtype)), torchs.eval()(images().to(dtype))
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


def test_vectors_dims_and_names_as_torch():
    for name, dim in (("weight", 1), ("weight", -1), ("bias", None)):
        torch.manual_seed(0)
        ours = spectral_norm(nn.Conv2d(4, 3, 3), name, n_power_iterations=3, dim=dim)
        torch.manual_seed(0)
        torchs = parametrizations.spectral_norm(nn.Conv2d(4, 3, 3), name, n_power_iterations=3, dim=dim)
        torch.testing.assert_close(getattr(ours, name), getattr(torchs, name))
        assert_same_state(ours, torchs)


def test_zero_weights_stay_zero_and_recover():
    root = nn.Sequential(nn.Linear(4, 3, bias=False))
    nn.init.zeros_(root[0].weight)
    group_spectral_norm(root)
    assert not root(torch.randn(2, 4)).any()
    root(torch.randn(2, 4)).sum().backward()
    assert root[0].parametrizations.weight.original.grad.isfinite().all()
    nn.init.normal_(root[0].parametrizations.weight.original)
    for _ in range(50):
        root(torch.randn(2, 4))
    torch.testing.assert_close(torch.linalg.matrix_norm(root.eval()[0].weight, 2).item(), 1.0, rtol=1e-4, atol=0)


def test_bad_input():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="name must be that of a parameter"):
        spectral_norm(layer, "weights")
    layer.register_parameter("gain", nn.Parameter(torch.ones(())))
    with pytest.raises(ValueError, match="'gain' is a scalar"):
        spectral_norm(layer, "gain")
    with pytest.raises(ValueError, match=r"dim must lie in \[-2, 1\]"):
        spectral_norm(layer, dim=2)
    with pytest.raises(ValueError, match="n_power_iterations must be 1 or more"):
        spectral_norm(layer, n_power_iterations=0)
    with pytest.raises(ValueError, match="eps must be greater than 0"):
        spectral_norm(layer, eps=0.0)
    with pytest.raises(ValueError, match="impl must be one of"):
        group_spectral_norm(nn.Sequential(layer), impl="fast")
    with pytest.raises(ValueError, match="updates must be one of"):
        group_spectral_norm(nn.Sequential(layer), updates="epoch")
    with pytest.raises(ValueError, match="root must contain"):
        group_spectral_norm(nn.ReLU())
    with pytest.raises(ValueError, match="weight must be initialized"):
        spectral_norm(nn.LazyLinear(3))
    for norm, older in (
        (spectral_norm, older_spectral_norm(nn.Linear(3, 2))),
        (group_spectral_norm, nn.Sequential(nn.Linear(2, 2), older_spectral_norm(nn.Linear(2, 2)))),
    ):
        before = list(older.state_dict())
        with pytest.raises(ValueError, match="fastgan.nn.fuse takes that over"):
            norm(older)
        assert list(older.state_dict()) == before
    assert not parametrize.is_parametrized(layer)
    with pytest.raises(ValueError, match="has a spectral norm already"):
        spectral_norm(spectral_norm(layer))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 3), torch.randn(2, 5)),
        (nn.Conv1d(4, 3, 3), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 3, 3), torch.randn(2, 4, 9, 9)),
        (nn.Conv3d(2, 3, 3), torch.randn(2, 2, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 3, 3), torch.randn(2, 4, 9)),
        (nn.ConvTranspose2d(4, 3, 3), torch.randn(2, 4, 9, 9)),
        (nn.ConvTranspose3d(2, 3, 3), torch.randn(2, 2, 5, 5, 5)),
        (nn.Embedding(6, 4), torch.tensor([1, 5, 1])),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_of_layer(layer, x):
    torch.manual_seed(0)
    torchs = parametrizations.spectral_norm(copy.deepcopy(layer)).double()
    root = group_spectral_norm(nn.Sequential(copy.deepcopy(layer))).double()
    x = x.double() if x.is_floating_point() else x
    root[0].load_state_dict(torchs.state_dict())
    outputs = root(x), torchs(x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for a, b in zip(root.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast():
    root = group_spectral_norm(nn.ModuleDict({"linear": nn.Linear(4, 3), "embedding": nn.Embedding(5, 4)}))
    seen = {}
    root.forward = lambda: seen.update({name: layer.weight for name, layer in root.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        root()
    assert seen["linear"].dtype == torch.bfloat16
    assert seen["embedding"].dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in vectors(root))
    wide = copy.deepcopy(root).eval()
    for name in seen:
        torch.testing.assert_close(seen[name], wide[name].weight.to(seen[name].dtype))
    sum(weight.float().square().sum() for weight in seen.values()).backward()
    assert all(p.grad.dtype == torch.float32 for name, p in root.named_parameters() if "weight" in name)
