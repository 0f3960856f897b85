"""Within a CUDA graph no value can be read: an operand that would be an error or need another method gives NaN."""

import pytest
import torch
from torch.autograd import grad

from fastgan.linalg import _nuclear_norm as norm_ops
from fastgan.linalg import nuclear_norm, sqrtm, trace_sqrt_product, trace_sqrt_product_from_factors
from tests.linalg.spectra import covariance, rotation

D = 6


@pytest.fixture
def capturing(monkeypatch):
    """The paths of a GPU while a graph is captured, on a CPU."""
    for op in ("nuclear_norm", "trace_gradients", "sqrtm"):
        monkeypatch.setattr(f"fastgan.linalg._{op}.by_products", lambda operand: True)
    call = norm_ops.call
    monkeypatch.setattr(norm_ops, "call", lambda m, _, *options: call(m, "polar", *options))  # what a GPU takes

    def begin():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    yield begin
    monkeypatch.undo()


def matrices(kind):
    """A good matrix, and one that is singular or indefinite."""
    values = torch.linspace(1, 2, D, dtype=torch.float64)
    values[0] = {"singular": 0.0, "indefinite": -0.5}[kind]
    q = rotation(D)
    return torch.stack([covariance(D), (q * values) @ q.mT])


def both_orders(function, *operands):
    operands = [operand.detach().clone().requires_grad_() for operand in operands]
    value = function(*operands)
    first = grad(value.sum(), operands, create_graph=True, allow_unused=True, materialize_grads=True)
    product = sum((g * g.detach().roll(1, -1)).sum() for g in first)
    return [value, *first, *grad(product, operands, allow_unused=True, materialize_grads=True)]


FUNCTIONS = {
    "trace": lambda a, b: trace_sqrt_product(a, b, method="polar"),
    "factors": lambda a, b: trace_sqrt_product_from_factors(b.mT[:3], cov=a, impl="reference"),
    "root": lambda a, b: sqrtm(a, method="newton_schulz"),
    "inverse root": lambda a, b: sqrtm(a, method="newton_schulz", inverse=True),
    "root by eigenvectors": lambda a, b: sqrtm(a, method="eigh"),
}
TAKEN = {("root", "singular"), ("root by eigenvectors", "singular")}


@pytest.mark.parametrize("kind", ["singular", "indefinite"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_right_or_not_a_number(name, kind, capturing):
    a, b = matrices(kind), covariance(D)
    expected = FUNCTIONS[name](a[:1], b)
    capturing()
    value = FUNCTIONS[name](a, b)
    torch.testing.assert_close(value[:1], expected, rtol=1e-9, atol=1e-12)
    assert value[1].isnan().all() == ((name, kind) not in TAKEN)
    if (name, kind) in TAKEN:
        torch.testing.assert_close(value[1] @ value[1], a[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["trace", "factors", "inverse root", "norm"])
def test_gradients_are_right_or_not_a_number(name, capturing):
    """A pair that is not right does not touch the others, to second order."""
    a, b = matrices("singular"), covariance(2, D)
    function = FUNCTIONS.get(name, lambda a, b: nuclear_norm(a @ b, method="polar"))
    expected = both_orders(function, a[:1], b[:1])
    capturing()
    for got, want in zip(both_orders(function, a, b), expected, strict=True):
        torch.testing.assert_close(got[:1], want, rtol=1e-7, atol=1e-9)
        is_unused = not want.any()
        is_value_of_a_norm = name == "norm" and want.ndim == 1  # which is right, and has no gradient
        assert got[1].isnan().any() != (is_unused or is_value_of_a_norm)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["trace", "root", "inverse root"])
def test_a_captured_graph_returns_nan(name):
    good, singular = matrices("singular").cuda().unbind()
    a, b = torch.stack([good, good]), covariance(D).cuda()
    FUNCTIONS[name](a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = FUNCTIONS[name](a, b)
    a[1] = singular
    graph.replay()
    torch.testing.assert_close(value[:1], FUNCTIONS[name](a[:1], b), rtol=1e-9, atol=1e-12)
    assert value[1].isnan().all() == (name != "root")
