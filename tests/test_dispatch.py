import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.ops import attention, spectral_norm_scale, spectral_norm_update


class Calls(TorchDispatchMode):
    """Records the names of the ops that pass torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def attend(inputs):
    return [attention(*inputs, 0.7, impl="reference")]


def normalize(weights):
    us = [torch.ones(w.shape[0], dtype=w.dtype) for w in weights]
    vs = [torch.ones(w.shape[1], dtype=w.dtype) for w in weights]
    vectors = spectral_norm_update([w.detach() for w in weights], us, vs, impl="reference")
    return spectral_norm_scale(weights, *vectors, impl="reference")


def two_orders(function, inputs):
    """Return the outputs, the gradients of their sum of squares, and those of the gradients' sum of squares."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = function(inputs)
    first = torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return outputs, first, second


@pytest.mark.parametrize(
    ("function", "shapes", "op"),
    [
        (attend, [(2, 5, 3), (2, 4, 3), (2, 4, 6)], "fastgan.attention"),
        (normalize, [(3, 4), (2, 7)], "fastgan.spectral_norm_scale"),
    ],
)
def test_a_call_past_the_dispatcher_equals_the_op(function, shapes, op):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    past = two_orders(function, inputs)
    with Calls() as seen:
        through = two_orders(function, inputs)
    assert {f"{op}.default", f"{op}_bwd.default", f"{op}_bwd_bwd.default"} <= seen.names
    assert op.replace(".", "_") in type(past[0][0].grad_fn).__name__
    for one, other in zip(past, through, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_gradient_taken_only_within_a_mode_is_the_same():
    """A forward past the dispatcher, a backward through it, as an activation checkpoint's or a profiler's mode sees."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 5, 3), (2, 4, 3), (2, 4, 6)]
    ]
    (output,) = attend(inputs)
    plain = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
    with Calls() as seen:
        watched = torch.autograd.grad(output.square().sum(), inputs)
    assert "fastgan.attention_bwd.default" in seen.names
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_third_derivative_of_the_norm_is_an_error():
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(normalize([weight])[0].square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="spectral_norm_scale has gradients to second order"):
        torch.autograd.grad(second.square().sum(), weight)
