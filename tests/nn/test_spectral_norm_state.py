import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm

from fastgan.nn import group_spectral_norm, spectral_norm
from tests.nn.normed_networks import assert_same_state, grouped, images, network, norms, train


def test_state_dicts_load_both_ways():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    train(torchs, 3)
    ours.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(ours.eval()(images()), torchs.eval()(images()))
    train(ours.train(), 3)
    torchs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(images()), torchs.eval()(images()))


@pytest.mark.parametrize("with_v", [True, False])
def test_older_state_dict_loads(with_v):
    older = network(older_spectral_norm)
    train(older, 3)
    if not with_v:
        for layer, dim in ((older[0], 0), (older[2][0], 1), (older[4], 0)):
            matrix = layer.weight_orig.detach().movedim(dim, 0).flatten(1)
            layer.weight_v.copy_(nn.functional.normalize(matrix.T @ layer.weight_u, dim=0))
    state = {name: value for name, value in older.state_dict().items() if with_v or not name.endswith("weight_v")}
    ours = grouped()
    ours.load_state_dict(state)
    assert "0.weight_orig" in state  # the caller's dict is left as it was
    torch.testing.assert_close(ours.eval()(images()), older.eval()(images()))


def test_deepcopy_shares_nothing():
    ours = grouped()
    ours(images())
    before = copy.deepcopy(ours.state_dict())
    average = copy.deepcopy(ours)
    train(average, 2)
    parametrize.remove_parametrizations(average[0], "weight")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name])
    assert ours[0].weight.requires_grad
    train(ours, 2)
    copied = copy.deepcopy(ours).eval()
    torch.testing.assert_close(copied(images()), ours.eval()(images()), rtol=0, atol=0)
    assert len(norms(average)) == 2


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickle(protocol):
    ours = grouped()
    ours(images())
    loaded = pickle.loads(pickle.dumps(ours, protocol))
    assert_same_state(loaded, ours, rtol=0, atol=0)
    torch.testing.assert_close(loaded(images()), ours(images()), rtol=0, atol=0)
    assert_same_state(loaded, ours, rtol=0, atol=0)
    stream = io.BytesIO()
    torch.save(spectral_norm(nn.Linear(3, 2)), stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).weight.shape == (2, 3)


def test_remove_parametrizations():
    ours = grouped().eval()
    expected = ours(images())
    for layer in (ours[0], ours[2][0]):
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(ours(images()), expected)
    assert type(ours[0]) is nn.Conv2d
    assert isinstance(ours[0].weight, nn.Parameter)


class StoredU(nn.Linear):
    """A layer that stores u alone, as BigGAN's: each forward makes v from it, and u from v, and in training keeps u."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("u0", torch.randn(1, self.out_features))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x):
        with torch.no_grad():
            v = nn.functional.normalize(self.u0 @ self.weight)
            u = nn.functional.normalize(v @ self.weight.T)
            if self.training:
                self.u0.copy_(u)
        return nn.functional.linear(x, self.weight / (u @ self.weight @ v.T), self.bias)


@pytest.mark.parametrize("names", [("u0", "sv0"), ("sn_u", "sn_sigma")])
def test_stored_u_loads(names):
    stored = nn.Sequential(StoredU(6, 5), nn.Tanh(), StoredU(5, 3))
    stored(torch.randn(2, 6))
    state = {k.replace("u0", names[0]).replace("sv0", names[1]): v for k, v in stored.state_dict().items()}
    ours = group_spectral_norm(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    ours.load_state_dict(state)
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours.eval()(x), stored.eval()(x))
    assert "0.weight" in state
    for _ in range(100):  # from there both find the largest singular value
        ours.train()(x), stored.train()(x)
    torch.testing.assert_close(ours.eval()(x), stored.eval()(x), rtol=1e-4, atol=1e-5)


def test_averaged_copies():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    averages = []
    for model in (ours, torchs):
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        for i in range(3):
            train(model, 1, seed=i)
            average.update_parameters(model)
            averages.append(average.eval()(images()).detach())  # a cached weight of the step before would show
    for a, b in zip(averages[:3], averages[3:], strict=True):
        torch.testing.assert_close(a, b)
