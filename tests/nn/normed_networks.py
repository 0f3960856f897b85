"""A small network with spectral norms, and helpers that the tests of them share."""

import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastgan.nn import group_spectral_norm
from fastgan.nn.spectral_norms import SpectralNorm


def network(norm=lambda layer: layer, dtype=torch.float64):
    torch.manual_seed(1)
    layers = nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)),
        nn.LeakyReLU(0.2),
        nn.Sequential(norm(nn.ConvTranspose2d(8, 5, 3, stride=2)), nn.Tanh()),
        nn.Flatten(),
        norm(nn.Linear(5 * 13 * 13, 7, bias=False)),
    )
    return layers.to(dtype)


def grouped(dtype=torch.float64, **arguments):
    return group_spectral_norm(network(parametrizations.spectral_norm, dtype), **arguments)


def images():
    torch.manual_seed(2)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def assert_same_state(a, b, **tolerance):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def norms(root):
    return [m for m in root.modules() if isinstance(m, SpectralNorm)]


def vectors(root):
    return [t.clone() for norm in norms(root) for t in (norm._u, norm._v)]


def train(model, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(2, 3, 8, 8, generator=generator).to(model[0].bias.dtype)) ** 2).mean().backward()
        optimizer.step()
