"""fastgan's layers in the place of equal ones in a model that already exists."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastgan.nn.fusion.attention_blocks import Roles, has_parts, is_fused, release
from fastgan.nn.fusion.check import relative_error, run_whole, same_whole, trial
from fastgan.nn.fusion.swaps import NormSwap, Refusal, Swap, release_norms, swaps_of, unnormed_weights
from fastgan.nn.spectral_norm_group import SpectralNormGroup, group_of
from fastgan.ops._attention import check_attention_impl

__all__ = ["FuseReport", "Fused", "fuse", "unfuse"]


@dataclass(frozen=True)
class Fused:
    """Outcome of :func:`fuse` for one part of a model."""

    path: str  # "" is the model itself
    what: str
    swapped: bool
    reason: str  # why it was not swapped, if so
    error: float | None = None  # the largest relative difference that the check found

    def __str__(self) -> str:
        outcome = f"swapped, relative difference {self.error:.0e}" if self.swapped else f"left as it was: {self.reason}"
        return f"{self.path or '(model)'}: {self.what}: {outcome}"


@dataclass(frozen=True)
class FuseReport:
    """Every spectral norm and self-attention block that :func:`fuse` found; ``print`` shows one per line.

    Example:
        >>> model, report = fuse(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))), torch.randn(1, 3, 8, 8))
        >>> [part.path for part in report.swapped], report.refused
        (['0'], ())
    """

    parts: tuple[Fused, ...]
    unnormed: tuple[str, ...] = ()
    """Weights without a spectral norm in a model that has some, such as ``in_proj_weight`` of attention."""

    @property
    def swapped(self) -> tuple[Fused, ...]:
        """The parts that were replaced."""
        return tuple(part for part in self.parts if part.swapped)

    @property
    def refused(self) -> tuple[Fused, ...]:
        """The parts that were left as they were."""
        return tuple(part for part in self.parts if not part.swapped)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped, {len(self.refused)} left as they were", *map(str, self.parts)]
        if self.unnormed:
            lines.append(f"without a spectral norm: {', '.join(self.unnormed)}")
        return "\n".join(lines)


def fuse(
    model: nn.Module,
    example_input: Any = None,
    *,
    copy: bool = False,
    impl: str = "auto",
    names: Mapping[str, str] | Sequence[Mapping[str, str]] = (),
) -> tuple[nn.Module, FuseReport]:
    """Put fastgan's spectral norms and self-attention into ``model`` in place, or with ``copy=True`` into a copy.

    Known are torch's spectral norms (parametrization and older hook), layers in the manner of BigGAN (``W_``, ``u0``,
    ``sv0``) and torch-mimicry (``sn_weights``), modules that wrap a layer (``weight_bar``, ``w_bar``), and
    self-attention blocks: modules with three or four 1x1 projections (``Conv2d``, ``Conv1d`` or ``Linear``), of which
    the fourth maps the values back, at most one scalar parameter, and at most one normalization of their input. The
    roles of the projections are taken from their names (theta phi g, query key value, q k v or f g h, also with
    ``conv``, ``to``, ``W`` or ``proj`` about the name) or else from their shapes.

    Each part is run before and after on random input, in training and eval mode, with random weights and vectors; it
    stays only if outputs, first gradients and updated state are equal to rounding. Parameters, buffers and modules stay
    the same objects, so optimizers, averages, wrappers and checkpoints made before or after fit. A fused block is an
    instance of its own class and of :class:`SelfAttention2d`. ``model`` keeps no trace of the runs.

    All norms are updated at the start of ``model``'s forward, each once; further accesses in one forward make further
    updates, as before. A norm that a forward does not reach is updated all the same, unless ``example_input`` shows it.
    A layer called outside such a forward makes its update by itself. Under autocast power iterations are float32.

    Args:
        model: any module.
        example_input: an input of ``model``: a tensor, a tuple of arguments or a dict of keywords. If given, the whole
            model also runs before and after; swaps that change its outputs, gradients or state are undone.
        copy: leave ``model`` as it is and return a fused copy, whose parameters no optimizer made before knows.
        impl: "auto", "triton", "extension" or "reference" for all that is swapped; or "eager" for attention that has
            gradients to any order, with the norms as for "reference".
        names: paths of a block's parts below it, for blocks that are not recognized: ``theta``, ``phi`` and ``g``, and
            ``o``, ``gamma`` and ``norm`` if the block has them; several such mappings for several kinds of block.

    Returns:
        The model, and a report of the swapped parts and of the others, with the reasons.

    Raises:
        ValueError: ``example_input`` does not fit the model, it has parameters without a shape yet, ``impl`` is none
            of the four, or ``names`` fit no block.

    Example:
        >>> import torch
        >>> critic = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 1))
        >>> critic, report = fuse(critic, torch.randn(2, 4))
        >>> [part.path for part in report.swapped], report.unnormed
        (['0'], ('2.weight',))
    """
    check_attention_impl(impl)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"model must be run once before: {name} has no shape yet")
    mappings = _checked_names(model, (names,) if isinstance(names, Mapping) else tuple(names))
    model = _copy(model) if copy else model
    before = None if example_input is None else run_whole(model, example_input)
    parts: list[Fused] = []
    kept: list[tuple[Swap, float]] = []
    try:
        for found in swaps_of(model, impl, mappings):
            if isinstance(found, Refusal):
                parts.append(Fused(found.path, found.what, False, found.reason))
                continue
            error, reason = _attempt(found)
            if not reason:
                kept.append((found, error))
            elif found.is_reported:
                parts.append(Fused(found.path, found.what, False, reason))
        swaps = [swap for swap, _ in kept]
        _group(model, swaps)
        harmful = [] if before is None else _undo_harmful(model, swaps, example_input, before)
    except BaseException:
        for swap, _ in reversed(kept):
            swap.revert()
        _prune(model)
        raise
    for swap, error in kept:
        reason = "the outputs, gradients or state of the whole model change" if swap in harmful else ""
        if swap.is_reported or not reason:
            parts.append(Fused(swap.path, swap.what, not reason, reason, error))
    order = {path: i for i, path in enumerate(dict.fromkeys(p for p, _ in model.named_modules()))}
    parts.sort(key=lambda part: order.get(part.path, len(order)))
    return model, FuseReport(tuple(parts), unnormed_weights(model))


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` in place; copies and unpickled copies of fused models can be undone too.

    Returns:
        ``model``, with the modules it had and the weights it has.

    Example:
        >>> model, _ = fuse(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))), torch.randn(1, 3, 8, 8))
        >>> unfuse(model) is model
        True
    """
    for module in model.modules():
        if is_fused(module):
            release(module)
        release_norms(module)
    for module in model.modules():
        _prune(module)
    return model


def _checked_names(model: nn.Module, names: tuple[Mapping[str, str], ...]) -> tuple[Mapping[str, str], ...]:
    for mapping in names:
        if not isinstance(mapping, Mapping) or not {"theta", "phi", "g"} <= set(mapping) <= set(Roles._fields):
            raise ValueError(f"names must map theta, phi and g, and may map o, gamma and norm, to paths, got {mapping}")
        if not any(has_parts(module, mapping) for module in model.modules()):
            raise ValueError(f"names must fit a module of the model, none has {', '.join(mapping.values())}")
    return names


def _attempt(swap: Swap) -> tuple[float, str]:
    """Keep the first variant of ``swap`` that equals the original; return its error, or the reason why none does."""
    try:
        with trial(swap.module) as seeded:
            reason = seeded(swap.learn)
        if reason:
            return 0.0, reason
        with trial(swap.module) as seeded:
            expected = seeded(swap.run)
    except Exception as why:  # whatever code that was never seen may raise
        return 0.0, f"it does not run alone on a random input ({type(why).__name__}: {why})"
    best, allowed = float("inf"), swap.tolerance()
    for variant in swap.variants:
        swap.apply(variant)
        try:
            with trial(swap.module) as seeded:
                error = relative_error(seeded(swap.run), expected)
        except Exception as why:  # sizes that the implementation asked for does not have
            swap.revert()
            return best, f"fastgan's does not run in its place ({type(why).__name__}: {why})"
        except BaseException:
            swap.revert()
            raise
        if error <= allowed:
            return error, ""
        swap.revert()
        best = min(best, error)
    return best, f"its outputs or gradients differ from fastgan's (relative difference {best:.0e})"


def _group(model: nn.Module, swaps: list[Swap]) -> None:
    """Put the norms of ``swaps`` into the group on ``model``, a new one if it has none."""
    layers = [(swap.module, swap.norm) for swap in swaps if isinstance(swap, NormSwap) and swap.norm is not None]
    group = group_of(model)
    if group is None and layers:
        group = SpectralNormGroup()
        group.put_on(model)
    if group is not None:
        group.take_in(layers)


def _undo_harmful(model: nn.Module, swaps: list[Swap], example_input: Any, before: Any) -> list[Swap]:
    """Undo the swaps that change the whole model, and return them."""
    if same_whole(model, example_input, before):
        return []
    for swap in reversed(swaps):
        swap.revert()
    _prune(model)
    harmful = []
    for swap in swaps:
        swap.reapply()
        _group(model, [swap])
        if not same_whole(model, example_input, before):
            swap.revert()
            _prune(model)
            harmful.append(swap)
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
        return copying.deepcopy(model)


@contextmanager
def _leaves_only(model: nn.Module) -> Iterator[None]:
    """Detach tensors in plain attributes meanwhile: norms leave a history in ``weight``, which cannot be copied."""
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
