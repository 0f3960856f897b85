"""fastgan's layers in the place of equal ones in a model that already exists."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastgan.backend import check_impl
from fastgan.nn.fusion.attention_blocks import AdoptedAttention2d
from fastgan.nn.fusion.check import relative_error, run_whole, same_whole, tolerance_of, trial
from fastgan.nn.fusion.swaps import NormSwap, Refusal, Swap, release_norms, replace_everywhere, swaps_of
from fastgan.nn.spectral_norm_group import SpectralNormGroup, group_of

__all__ = ["FuseReport", "Fused", "fuse", "unfuse"]


@dataclass(frozen=True)
class Fused:
    """What :func:`fuse` did with one part of a model."""

    path: str  # "" is the model itself
    what: str
    swapped: bool
    reason: str  # why not, where it was not
    error: float | None = None  # the largest relative difference that the check found

    def __str__(self) -> str:
        outcome = f"swapped, relative difference {self.error:.0e}" if self.swapped else f"left as it was: {self.reason}"
        return f"{self.path or '(model)'}: {self.what}: {outcome}"


@dataclass(frozen=True)
class FuseReport:
    """Every spectral norm and self-attention block that :func:`fuse` found; ``print`` shows one a line."""

    parts: tuple[Fused, ...]

    @property
    def swapped(self) -> tuple[Fused, ...]:
        """Those that were replaced."""
        return tuple(part for part in self.parts if part.swapped)

    @property
    def refused(self) -> tuple[Fused, ...]:
        """Those that were left as they were."""
        return tuple(part for part in self.parts if not part.swapped)

    def __str__(self) -> str:
        head = f"{len(self.swapped)} swapped, {len(self.refused)} left as they were"
        return "\n".join([head, *map(str, self.parts)])


def fuse(
    model: nn.Module, example_input: Any = None, *, inplace: bool = False, impl: str = "auto"
) -> tuple[nn.Module, FuseReport]:
    """Replace ``model``'s spectral norms by one grouped update, and its self-attention blocks by the fused op.

    Known are torch's spectral norms (parametrization and older hook), layers in the manner of BigGAN (``W_``, ``u0``,
    ``sv0``) and torch-mimicry (``sn_weights``), modules that wrap a layer (``weight_bar``, ``w_bar``), and
    self-attention blocks with 1x1 convolutions called theta, phi, g, o; query, key, value; or f, g, h, with or without
    ``conv`` and ``sn`` about the name, and one scalar parameter. Each is run before and after on random input, in
    training and eval mode, with random vectors and a gamma that is not zero; it stays only if outputs, first gradients
    and updated state are equal to rounding. Parameters, buffers and their names stay the same objects, so optimisers
    and checkpoints, older and newer, fit both models.

    All norms are updated at the start of ``model``'s forward, each once; further accesses in one forward make further
    updates, as before. A norm that a forward does not reach is updated all the same, unless ``example_input`` shows it.
    A layer called outside such a forward makes its update by itself. Under autocast power iterations are float32.

    Args:
        model: any module.
        example_input: what ``model`` is called with: a tensor, a tuple of arguments or a dict of keywords. With it the
            whole model is run before and after as well; swaps that change its outputs, its gradients or its state are
            undone.
        inplace: change ``model`` itself in place of a copy. A model that is a self-attention block is replaced anyway.
        impl: "auto", "triton" or "reference", for all that is swapped.

    Returns:
        The model, and a report of what was swapped, and what was not and why.

    Raises:
        ValueError: ``example_input`` does not fit the model, or ``impl`` is none of the three.
    """
    check_impl(impl)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    holder = nn.Module()
    holder.add_module("model", model if inplace else _copy(model))
    before = None if example_input is None else run_whole(_root(holder), example_input)
    parts: list[Fused] = []
    kept: list[tuple[Swap, float]] = []
    for found in swaps_of(holder, impl):
        if isinstance(found, Refusal):
            parts.append(Fused(found.path, found.what, False, found.reason))
            continue
        error, reason = _attempt(found)
        if reason:
            parts.append(Fused(found.path, found.what, False, reason))
        else:
            kept.append((found, error))
    swaps = [swap for swap, _ in kept]
    _group(holder, swaps)
    harmful = [] if before is None else _undo_harmful(holder, swaps, example_input, before)
    for swap, error in kept:
        reason = "the outputs, gradients or state of the whole model change" if swap in harmful else ""
        parts.append(Fused(swap.path, swap.what, not reason, reason, error))
    order = {path: i for i, path in enumerate(dict.fromkeys(p for p, _ in _root(holder).named_modules()))}
    parts.sort(key=lambda part: order.get(part.path, len(order)))
    return _root(holder), FuseReport(tuple(parts))


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` in place; copies and unpickled copies of fused models can be undone too.

    Returns:
        The model, with the modules it had and the weights it has.
    """
    holder = nn.Module()
    holder.add_module("model", model)
    for block in [m for m in model.modules() if isinstance(m, AdoptedAttention2d)]:
        replace_everywhere(holder, block, block.released())
    for module in _root(holder).modules():
        release_norms(module)
    for module in _root(holder).modules():
        _prune(module)
    return _root(holder)


def _root(holder: nn.Module) -> nn.Module:
    return holder.get_submodule("model")


def _attempt(swap: Swap) -> tuple[float, str]:
    """Keep the first variant of ``swap`` that equals what is there; its error, or why there is none."""
    with trial(swap.module) as seeded:
        try:
            expected = seeded(swap.run)
        except Exception as why:  # whatever code that was never seen may raise
            return 0.0, f"it does not run alone on a random input ({type(why).__name__}: {why})"
    if isinstance(expected, str):
        return 0.0, expected
    best = float("inf")
    for variant in swap.variants:
        swap.apply(variant)
        try:
            with trial(swap.module) as seeded:
                error = relative_error(seeded(swap.run), expected)
        except Exception as why:  # sizes that the implementation asked for has not
            swap.revert()
            return best, f"fastgan's does not run in its place ({type(why).__name__}: {why})"
        if error <= tolerance_of(swap.module):
            return error, ""
        swap.revert()
        best = min(best, error)
    return best, f"its outputs or gradients differ from fastgan's (relative difference {best:.0e})"


def _group(holder: nn.Module, swaps: list[Swap]) -> None:
    """One group on the model, in place of that of an earlier call, for the norms of ``swaps`` beside those it had."""
    layers = [(swap.module, swap.norm) for swap in swaps if isinstance(swap, NormSwap) and swap.norm is not None]
    root = _root(holder)
    group = group_of(root)
    if group is None and layers:
        group = SpectralNormGroup()
        group.put_on(root)
    if group is not None:
        group.take_in(layers)


def _undo_harmful(holder: nn.Module, swaps: list[Swap], example_input: Any, before: Any) -> list[Swap]:
    """Undo the swaps that change the whole model, and return them."""
    if same_whole(_root(holder), example_input, before):
        return []
    for swap in reversed(swaps):
        swap.revert()
    harmful = []
    for swap in swaps:
        swap.reapply()
        _group(holder, [swap])
        if not same_whole(_root(holder), example_input, before):
            swap.revert()
            harmful.append(swap)
    for module in _root(holder).modules():
        _prune(module)
    return harmful


def _prune(module: nn.Module) -> None:
    """Forget the layers of ``module``'s group that have no norm any more, and the group if none is left."""
    group = group_of(module)
    if group is not None:
        group.layers = [(m, norm) for m, norm in group.layers if norm.reading(m) is not None]
        if not group.layers:
            group.take_off(module)


def _copy(model: nn.Module) -> nn.Module:
    with _leaves_only(model):
        return copy.deepcopy(model)


@contextmanager
def _leaves_only(model: nn.Module) -> Iterator[None]:
    """Without history in plain attributes, as norms leave it in their ``weight``: it cannot be copied."""
    attributes = [
        (m, name, value)
        for m in model.modules()
        for name, value in m.__dict__.items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for module, name, value in attributes:
        module.__dict__[name] = value.detach()
    try:
        yield
    finally:
        for module, name, value in attributes:
            module.__dict__[name] = value
