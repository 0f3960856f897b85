"""The swaps that :func:`fastgan.nn.fuse` may try in a model: how each is made, undone and run for the check."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._pytree import tree_leaves

from fastgan.nn.attention import AttentionSettings, SelfAttention2d
from fastgan.nn.fusion.attention_blocks import (
    RETURNS,
    Plan,
    Roles,
    adopt,
    candidates,
    channels_of,
    is_named_like_attention,
    release,
    scales_of,
)
from fastgan.nn.fusion.check import TOLERANCE, random_like, tolerance_of
from fastgan.nn.fusion.foreign_norms import (
    OlderNorm,
    StoredVectorNorm,
    WrapperNorm,
    stored_spelling,
    unknown_norm,
    vectors_stored,
    wrapped,
)
from fastgan.nn.normed_weight import NormedWeight, OlderHook
from fastgan.nn.spectral_norm_group import adopted
from fastgan.nn.spectral_norm_state import only_norm, parametrizations
from fastgan.nn.spectral_norms import SpectralNorm


class Refusal(NamedTuple):
    """A part that looks like one to swap but is not tried."""

    path: str
    what: str
    reason: str


class Swap:
    """One replacement in a model."""

    what = ""
    variants: Iterable[Any] = (None,)
    is_reported = True  # if it is not made

    def __init__(self, path: str, module: nn.Module, impl: str) -> None:
        self.path, self.module, self.impl = path, module, impl
        self._variant: Any = None

    def tolerance(self) -> float:
        """Return the relative difference of results that rounding explains."""
        return tolerance_of(self.module)

    def learn(self) -> str:
        """Find out how the part is called; the answer is why it is not to be replaced, or ""."""
        return ""

    def run(self) -> list[list[Tensor]]:
        """Outputs and first gradients of the part, in groups of like size."""
        raise NotImplementedError

    def apply(self, variant: Any) -> None:
        self._variant = variant
        self._replace(variant)

    def reapply(self) -> None:
        self._replace(self._variant)

    def _replace(self, variant: Any) -> None:
        raise NotImplementedError

    def revert(self) -> None:
        raise NotImplementedError


class NormSwap(Swap):
    """A spectral norm by fastgan's."""

    norm: NormedWeight | None = None

    def __init__(self, path: str, module: nn.Module, impl: str) -> None:
        super().__init__(path, module, "reference" if impl == "eager" else impl)

    def weight(self) -> Tensor:
        """The raw parameter."""
        raise NotImplementedError

    def vectors(self) -> list[Tensor]:
        raise NotImplementedError

    def normalized(self) -> Tensor:
        """The normalized weight, as a forward gets it."""
        raise NotImplementedError

    def learn(self) -> str:
        ndim = self.weight().ndim
        return "" if ndim > 1 else f"its weight has {ndim} dimension, and is divided by its length"

    def run(self) -> list[list[Tensor]]:
        raw = self.weight()
        for vector in self.vectors():  # away from convergence, at which every order of updates gives the same result
            with torch.no_grad():
                vector.copy_(nn.functional.normalize(torch.randn_like(vector).flatten(), dim=0).view_as(vector))
        raw.requires_grad_()
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for training in (True, True, False):
            self.module.train(training)
            output = self.normalized()
            gradients += torch.autograd.grad(output, raw, random_like(output))
            outputs.append(output.detach())
        return [outputs, gradients, [v.detach().clone() for v in self.vectors()]]

    def revert(self) -> None:
        release_norms(self.module)


class ParametrizationSwap(NormSwap):
    what = "torch.nn.utils.parametrizations.spectral_norm"

    def __init__(self, path: str, module: nn.Module, impl: str, name: str) -> None:
        super().__init__(path, module, impl)
        self._name = name

    def weight(self) -> Tensor:
        return parametrizations(self.module)[self._name].original

    def vectors(self) -> list[Tensor]:
        norm = parametrizations(self.module)[self._name][0]
        return [norm._u, norm._v] if hasattr(norm, "_u") else []

    def normalized(self) -> Tensor:
        return getattr(self.module, self._name)

    def _replace(self, _variant: Any) -> None:
        self.norm = adopted(self.module, self._name, self.impl, once=True)


class OlderSwap(NormSwap):
    what = "torch.nn.utils.spectral_norm"

    def __init__(self, path: str, module: nn.Module, impl: str, key: int) -> None:
        super().__init__(path, module, impl)
        self._key = key
        self._hook: Any = module._forward_pre_hooks[key]

    def weight(self) -> Tensor:
        return getattr(self.module, self._hook.name + "_orig")

    def vectors(self) -> list[Tensor]:
        return [getattr(self.module, self._hook.name + suffix) for suffix in ("_u", "_v")]

    def normalized(self) -> Tensor:
        self.module._forward_pre_hooks[self._key](self.module, ())
        return getattr(self.module, self._hook.name)

    def _replace(self, _variant: Any) -> None:
        self.norm = self.module._forward_pre_hooks[self._key] = OlderNorm(self._hook, self.impl)


class StoredVectorSwap(NormSwap):
    def __init__(self, path: str, module: nn.Module, impl: str, spelling: Any) -> None:
        super().__init__(path, module, impl)
        self._spelling = spelling
        self.what = f"spectral norm in {spelling.method} with {spelling.u}"

    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    def vectors(self) -> list[Tensor]:
        return [getattr(self.module, self._spelling.u), getattr(self.module, self._spelling.sigma)]

    def normalized(self) -> Tensor:
        return getattr(self.module, self._spelling.method)()

    def _replace(self, _variant: Any) -> None:
        self.norm = StoredVectorNorm.put_on(self.module, self._spelling, self.impl)


class WrapperSwap(NormSwap):
    what = "module that wraps a layer for its spectral norm"

    def __init__(self, path: str, module: nn.Module, impl: str, names: tuple[nn.Module, str, str, str]) -> None:
        super().__init__(path, module, impl)
        self._names = names

    def weight(self) -> Tensor:
        owner, weight, _, _ = self._names
        return getattr(owner, weight)

    def vectors(self) -> list[Tensor]:
        owner, _, *names = self._names
        return [getattr(owner, name).data for name in names]

    def normalized(self) -> Tensor:
        wrapper: Any = self.module
        wrapper(_input_of(wrapper.module, self.weight()))
        return getattr(wrapper.module, wrapper.name)

    def _replace(self, _variant: Any) -> None:
        self.norm = WrapperNorm.put_on(self.module, self._names, self.impl)


class AttentionSwap(Swap):
    what = "self-attention block"

    def __init__(self, path: str, block: nn.Module, impl: str, roles: list[Roles]) -> None:
        super().__init__(path, block, impl)
        self._roles = roles
        self._returned: tuple[str, ...] = ()
        self._uses_arguments = self._even_only = False
        self.is_reported = is_named_like_attention(block)

    @property
    def variants(self) -> Iterator[Plan]:  # type: ignore[override]
        for roles in self._roles:
            scales = scales_of(self.module, roles)
            for pool, scale, returns in itertools.product((True, False), scales, self._returned):
                settings = AttentionSettings(pool, scale, self.impl)
                yield Plan(roles, settings, returns, self._uses_arguments, self._even_only)

    def learn(self) -> str:
        block, x = self.module, self._input(2, 8, 8)
        before = dict(block.__dict__)
        try:
            y = block(x, *[_Unused()] * unused_arguments(block))
        except Exception:  # whatever code that was never seen may raise
            y, self._uses_arguments = block(x), True
        written = [name for name, value in block.__dict__.items() if not _is_same(value, before.get(name, _Unused))]
        if written:
            return f"its forward writes its attribute {written[0]}, which fastgan's would leave as it is"
        try:
            block(self._input(1, 7, 5))
        except Exception:
            self._even_only = True
        second = y[1] if type(y) is tuple and len(y) == 2 and isinstance(y[0], Tensor) else _Unused
        if isinstance(y, Tensor):
            self._returned = RETURNS[:1]
        elif second is None:
            self._returned = RETURNS[1:2]
        elif isinstance(second, Tensor) and second.ndim in (3, 4):
            self._returned = RETURNS[2:4] if second.ndim == 3 else RETURNS[4:]
        else:
            return f"it returns a {type(y).__name__}, neither features nor a tuple of them and an attention map"
        return ""

    def tolerance(self) -> float:
        return min(super().tolerance(), TOLERANCE[torch.float32])  # see run

    def run(self) -> list[list[Tensor]]:
        block = self.module
        if super().tolerance() > self.tolerance():
            block.float()  # half precision would take one scale or role for another
        with torch.no_grad():  # zeros, such as gamma or a zero-initialized last layer, would hide differences
            for p in (p for p in block.parameters() if p.is_floating_point()):
                p.copy_(torch.randn_like(p) * (0.5 * p[0].numel() ** -0.5) if p.ndim > 1 else torch.rand_like(p) + 0.5)
        outputs, inputs = [], []
        for training, shape in ((True, (2, 8, 8)), (False, (1, 6, 4)), (True, (1, 7, 5))):
            if not self._even_only or shape[1] % 2 == 0:
                block.train(training)
                inputs.append(self._input(*shape))
                outputs += [y for y in tree_leaves(block(inputs[-1])) if isinstance(y, Tensor)]
        loss = torch.stack([(y * random_like(y)).sum() for y in outputs]).sum()
        parameters = [p for p in block.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)
        state = [b.detach().clone() for b in block.buffers() if b.is_floating_point()]
        return [[y.detach() for y in outputs], [g for g in gradients if g is not None], state]

    def _input(self, batch: int, height: int, width: int) -> Tensor:
        channels = channels_of(self.module, self._roles[0])
        like = next(p for p in self.module.parameters() if p.is_floating_point())
        return torch.randn(batch, channels, height, width).to(like).requires_grad_()

    def _replace(self, variant: Plan) -> None:
        adopt(self.module, variant)

    def revert(self) -> None:
        release(self.module)


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)


def unused_arguments(block: nn.Module) -> int:
    """Return how many arguments ``block`` takes after x."""
    parameters = list(inspect.signature(block.forward).parameters.values())[1:]
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)])


class _Unused:
    """Stands for an argument that must not be used: whatever is done with it but comparing it to None raises."""

    def __getattr__(self, name: str) -> Any:
        raise TypeError("it uses arguments beyond x")

    def __bool__(self) -> bool:
        raise TypeError("it uses arguments beyond x")


def swaps_of(model: nn.Module, impl: str, names: tuple[Mapping[str, str], ...]) -> Iterator[Swap | Refusal]:
    """Everything in ``model`` that may be swapped or looks like it: the norms first."""
    named = list(model.named_modules())
    for path, module in named:
        yield from _norms(path, module, impl)
    attention: list[AttentionSwap | Refusal] = []
    for path, module in named:
        if isinstance(module, SelfAttention2d):
            continue
        roles, reason = candidates(module, names)
        if not reason and roles and "forward" in module.__dict__:
            roles, reason = [], "its forward was replaced on the object"
        if roles:
            attention.append(AttentionSwap(path, module, impl, roles))
        elif reason:
            attention.append(Refusal(path, AttentionSwap.what, reason))
    paths = [found.path for found in attention]
    for found in attention:  # of blocks within one another, the innermost
        below = f"{found.path}." if found.path else ""
        if isinstance(found, AttentionSwap) or not any(p != found.path and p.startswith(below) for p in paths):
            yield found


def _norms(path: str, module: nn.Module, impl: str) -> Iterator[Swap | Refusal]:
    known = False
    for name in list(parametrizations(module)) if parametrize.is_parametrized(module) else ():
        norms = list(parametrizations(module)[name])
        known = known or any(isinstance(norm, _SpectralNorm) for norm in norms)
        if not any(type(norm) is _SpectralNorm for norm in norms):
            continue
        if len(norms) == 1:
            yield ParametrizationSwap(path, module, impl, name)
        else:
            yield Refusal(path, ParametrizationSwap.what, f"{name} has further parametrizations")
    for key, hook in module._forward_pre_hooks.items():
        known = known or isinstance(hook, OlderHook)
        if isinstance(hook, OlderHook) and not isinstance(hook, OlderNorm):
            yield OlderSwap(path, module, impl, key)
    spelling = stored_spelling(module)
    if spelling is not None and spelling.method not in module.__dict__:
        count = vectors_stored(module, spelling)
        if count > 1:
            reason = f"it keeps {count} singular vectors (num_SVs), and fastgan's would update only one"
            yield Refusal(path, f"spectral norm in {spelling.method} with {spelling.u}", reason)
        else:
            yield StoredVectorSwap(path, module, impl, spelling)
    names = wrapped(module)
    if names is not None and "forward" not in module.__dict__:
        yield WrapperSwap(path, module, impl, names)
    if not known and spelling is None and names is None:
        what = unknown_norm(module)
        if what:
            yield Refusal(path, "spectral norm", what)


def unnormed_weights(model: nn.Module) -> tuple[str, ...]:
    """Return the names of weights without a spectral norm, if ``model`` has such norms at all."""
    normed = {id(weight) for module in model.modules() for weight in _normed(module)}
    if not normed:
        return ()
    found = ((name, p) for name, p in model.named_parameters() if p.ndim > 1 and p.numel() > 1)
    return tuple(name for name, p in found if id(p) not in normed)


def _normed(module: nn.Module) -> Iterator[Any]:
    for name in list(parametrizations(module)) if parametrize.is_parametrized(module) else ():
        if any(isinstance(norm, _SpectralNorm) for norm in parametrizations(module)[name]):
            yield parametrizations(module)[name].original
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, OlderHook):
            yield getattr(module, f"{hook.name}_orig")
    if stored_spelling(module) is not None:
        yield module.weight
    names = wrapped(module)
    if names is not None:
        yield from (getattr(names[0], name) for name in names[1:])


def release_norms(module: nn.Module) -> None:
    """Give ``module`` back the norms that were swapped on it."""
    for name in list(parametrizations(module)) if parametrize.is_parametrized(module) else ():
        norm = only_norm(module, name)
        if isinstance(norm, SpectralNorm) and norm.once:
            parametrizations(module)[name][0] = norm.released()
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, OlderNorm):
            module._forward_pre_hooks[key] = hook.replaced
    for name, value in list(module.__dict__.items()):
        if isinstance(getattr(value, "__self__", value), StoredVectorNorm | WrapperNorm):
            del module.__dict__[name]


def _input_of(layer: Any, weight: Tensor) -> Tensor:
    """Something that ``layer`` can be called with."""
    if isinstance(layer, nn.Embedding):
        return torch.zeros(1, dtype=torch.int64, device=weight.device)
    if isinstance(layer, nn.Linear):
        return weight.new_ones(1, layer.in_features)
    conv: Any = layer
    return weight.new_ones(1, conv.in_channels, *(8 * k for k in conv.kernel_size))
