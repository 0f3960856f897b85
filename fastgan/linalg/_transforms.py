"""The ops of :mod:`fastgan.linalg` under ``torch.func`` and forward-mode differentiation.

Ops of ``torch.library`` refuse gradients of ``torch.func`` and drop tangents in silence. So while such a transform is
active the same ops are called from a ``torch.autograd.Function``, which has a rule for each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

_functorch = torch._C._functorch


def transform_is_active() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is active, also in a trace."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_mapped(operand: Tensor) -> bool:
    """Return whether ``operand`` has a dimension that ``torch.vmap`` hides."""
    while _is_wrapped(operand):
        if _functorch.is_batchedtensor(operand):
            return True
        operand = _functorch.get_unwrapped(operand)
    return False


def is_tracked(operand: Tensor) -> bool:
    """Return whether a transform follows ``operand``: it is mapped over, differentiated, or has a tangent."""
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(operand).tangent is not None
    return dual or _is_wrapped(operand)


def values_of(operand: Tensor) -> Tensor:
    """Return the matrices behind ``operand``, to be read: transforms are undone, dimensions of vmap come first."""
    while _is_wrapped(operand):
        inner = _functorch.get_unwrapped(operand)
        operand = (
            inner.movedim(_functorch.maybe_get_bdim(operand), 0) if _functorch.is_batchedtensor(operand) else inner
        )
    return operand.detach()


def _is_wrapped(operand: Tensor) -> bool:
    return _functorch.is_batchedtensor(operand) or _functorch.is_gradtrackingtensor(operand)


def to_front(in_dims: Sequence[int | None], operands: Sequence[Tensor]) -> list[Tensor]:
    """Move the mapped dimension of each operand to the front, so that they broadcast with one another."""
    ndim = max(x.ndim - (dim is not None) for x, dim in zip(operands, in_dims, strict=True))
    moved = []
    for x, dim in zip(operands, in_dims, strict=True):
        if dim is not None:
            x = x.movedim(dim, 0)
            x = x.reshape(x.shape[0], *[1] * (ndim + 1 - x.ndim), *x.shape[1:])
        moved.append(x)
    return moved


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make torch.compile leave ``function`` out: it cannot trace a Function that has a rule for tangents."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg="fastgan.linalg runs eagerly under transforms of torch.func and forward mode")
        return torch.compiler.disable(function)(*args)

    return run


def tangent_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``jvp(ctx, *tangents)`` of ``rule(ctx, saved tensors, *tangents)``, so that it has tangents itself.

    torch calls ``jvp`` with forward mode turned off, so under a second ``torch.func.jvp`` its tangents would
    silently be zero. Forward mode is turned on again, and saved tensors lose the tangents that ``jvp`` receives.
    """

    @untraced
    @functools.wraps(rule)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors]
            return rule(ctx, saved, *tangents)

    return jvp


def zeros_for_none(tangents: Sequence[Tensor | None], operands: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, operands, strict=True)]


class Derivatives:
    """The value of (value, report) = op(*operands, *options), and its first two derivatives, for every transform.

    A third derivative is a NotImplementedError.

    Args:
        op, bwd, bwd_bwd: as in :func:`fastgan.linalg._dispatch.register_derivatives`.
        operands: how many of the op's arguments are matrices (..., rows, cols).
    """

    def __init__(self, op: Any, bwd: Any, bwd_bwd: Any, operands: int) -> None:
        def ones(points: Sequence[Tensor]) -> Tensor:
            return points[0].new_ones(points[0].shape[:-2])

        def expanded(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
            """The op's derivatives take operands of one batch shape."""
            return [
                x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                for x, dim in zip(tensors, in_dims, strict=True)
            ]

        class Second(Function):
            """Map (directions, operands) to the change of the gradients, a self-adjoint map of the directions."""

            @staticmethod
            def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
                directions, points = tensors[:operands], tensors[operands:]
                return tuple(bwd_bwd(*directions, ones(points), *points)[1:])

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
                ctx.save_for_backward(*inputs[operands:])
                ctx.save_for_forward(*inputs[operands:])

            @staticmethod
            @untraced
            def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
                if any(ctx.needs_input_grad[operands:]):
                    raise third_derivative(op)
                return *Second.apply(*cotangents, *ctx.saved_tensors), *[None] * operands

            @staticmethod
            @tangent_rule
            def jvp(ctx: Any, points: list[Tensor], *tangents: Tensor | None) -> tuple[Tensor, ...]:
                if any(tangent is not None for tangent in tangents[operands:]):
                    raise third_derivative(op)
                return Second.apply(*zeros_for_none(tangents[:operands], points), *points)

            @staticmethod
            @untraced
            def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Any:
                return Second.apply(*expanded(info, in_dims, tensors)), (0,) * operands

        class First(Function):
            """Operands of one batch shape -> gradients of the values, each by its own matrices."""

            @staticmethod
            def forward(*points: Tensor) -> tuple[Tensor, ...]:
                found = bwd(ones(points), *points)
                return (found,) if operands == 1 else tuple(found)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
                ctx.save_for_backward(*inputs)
                ctx.save_for_forward(*inputs)

            @staticmethod
            @untraced
            def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
                return Second.apply(*cotangents, *ctx.saved_tensors)

            @staticmethod
            @tangent_rule
            def jvp(ctx: Any, points: list[Tensor], *tangents: Tensor | None) -> tuple[Tensor, ...]:
                return Second.apply(*zeros_for_none(tangents, points), *points)

            @staticmethod
            @untraced
            def vmap(info: Any, in_dims: tuple[int | None, ...], *points: Tensor) -> Any:
                return First.apply(*expanded(info, in_dims, points)), (0,) * operands

        class Value(Function):
            @staticmethod
            def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
                return op(*inputs)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
                ctx.options = len(inputs) - operands
                ctx.save_for_backward(*inputs[:operands])
                ctx.save_for_forward(*inputs[:operands])
                ctx.mark_non_differentiable(output[1])

            @staticmethod
            @untraced
            def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
                return *self.gradients(grad, *ctx.saved_tensors), *[None] * ctx.options

            @staticmethod
            @tangent_rule
            def jvp(ctx: Any, points: list[Tensor], *tangents: Any) -> tuple[Tensor, None]:
                pairs = zip(First.apply(*broadcast_double(points)), tangents[:operands], strict=True)
                parts = [(factor * tangent.double()).sum((-2, -1)) for factor, tangent in pairs if tangent is not None]
                return torch.stack(parts).sum(0).to(points[0].dtype), None

            @staticmethod
            @untraced
            def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
                moved = to_front(in_dims[:operands], inputs[:operands])
                return Value.apply(*moved, *inputs[operands:]), (0, 0)

        self.call: Callable[..., tuple[Tensor, Tensor]] = untraced(Value.apply)
        self._first, self._second = First.apply, Second.apply

    def gradients(self, grad: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        """``grad``, of the value's batch shape, times the gradients of the values."""
        weight = grad.double()[..., None, None]
        factors = self._first(*broadcast_double(operands))
        return tuple(summed_to(weight * factor, x) for factor, x in zip(factors, operands, strict=True))

    def second(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Gradients of <cotangents, gradients(grad, *operands)> for ``tensors`` = (cotangents, grad, operands)."""
        count = len(tensors) // 2
        cotangents, grad, operands = tensors[:count], tensors[count], tensors[count + 1 :]
        points = broadcast_double(operands)
        directions = [c.double().expand_as(x) for c, x in zip(cotangents, points, strict=True)]
        products = [(c * f).sum((-2, -1)) for c, f in zip(directions, self._first(*points), strict=True)]
        changes = self._second(*directions, *points)
        weight = grad.double()[..., None, None]
        found = [summed_to(weight * change, x) for change, x in zip(changes, operands, strict=True)]
        return torch.stack(products).sum(0).to(grad.dtype), *found


def broadcast_double(operands: Sequence[Tensor]) -> list[Tensor]:
    """The operands in float64, broadcast."""
    return list(torch.broadcast_tensors(*[x.double() for x in operands]))


def summed_to(gradient: Tensor, operand: Tensor) -> Tensor:
    """``gradient`` summed over dimensions that ``operand`` was broadcast along, in its dtype."""
    return gradient.sum_to_size(operand.shape).to(operand.dtype)


def third_derivative(op: Any) -> NotImplementedError:
    name = op._opoverload.name().split("::")[1]
    return NotImplementedError(f"{name} can be differentiated twice; its third derivative is not implemented")
