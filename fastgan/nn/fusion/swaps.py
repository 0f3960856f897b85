"""The swaps that :func:`fastgan.nn.fuse` may try in a model: how each is made, undone and run for the check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from fastgan.nn.attention import SelfAttention2d
from fastgan.nn.fusion.attention_blocks import AdoptedAttention2d, Roles, conv_of, roles_of, unused_arguments
from fastgan.nn.fusion.foreign_norms import (
    OlderNorm,
    StoredVectorNorm,
    WrapperNorm,
    older_hooks,
    stored_spelling,
    wrapped,
)
from fastgan.nn.normed_weight import NormedWeight
from fastgan.nn.spectral_norm_group import adopted
from fastgan.nn.spectral_norm_state import only_norm, parametrizations
from fastgan.nn.spectral_norms import SpectralNorm


class Refusal(NamedTuple):
    """Something that looks like what is swapped and is not tried."""

    path: str
    what: str
    reason: str


class Swap:
    """One replacement in a model."""

    what = ""
    variants: Sequence[Any] = (None,)

    def __init__(self, path: str, module: nn.Module, impl: str) -> None:
        self.path, self.module, self.impl = path, module, impl
        self._variant: Any = None

    def run(self) -> list[list[Tensor]] | str:
        """Outputs and first gradients of the part, in groups of like size; or why it is not to be replaced."""
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

    def weight(self) -> Tensor:
        """The raw parameter."""
        raise NotImplementedError

    def vectors(self) -> list[Tensor]:
        raise NotImplementedError

    def normalized(self) -> Tensor:
        """The normalised weight, as a forward gets it."""
        raise NotImplementedError

    def run(self) -> list[list[Tensor]] | str:
        raw = self.weight()
        if raw.ndim < 2:
            return f"its weight has {raw.ndim} dimension, and is divided by its length"
        for vector in self.vectors():  # away from convergence, where every order of updates gives the same
            with torch.no_grad():
                vector.copy_(nn.functional.normalize(torch.randn_like(vector).flatten(), dim=0).view_as(vector))
        raw.requires_grad_()
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        for training in (True, True, False):
            self.module.train(training)
            output = self.normalized()
            gradients += torch.autograd.grad(output, raw, torch.randn_like(output))
            outputs.append(output.detach())
        return [outputs, gradients, [v.detach().clone() for v in self.vectors()]]


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

    def revert(self) -> None:
        release_norms(self.module)


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

    def revert(self) -> None:
        release_norms(self.module)


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
        self.norm = norm = StoredVectorNorm(self.module, self._spelling, self.impl)
        setattr(self.module, self._spelling.method, norm)

    def revert(self) -> None:
        release_norms(self.module)


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
        self.norm = norm = WrapperNorm(self.module, self._names, self.impl)
        self.module.forward = norm

    def revert(self) -> None:
        release_norms(self.module)


class AttentionSwap(Swap):
    what = "self-attention block"
    variants = tuple((pool, scale) for pool in (True, False) for scale in (1.0, None))

    def __init__(self, path: str, block: nn.Module, impl: str, holder: nn.Module, roles: Roles) -> None:
        super().__init__(path, block, impl)
        self._block, self._holder, self._roles = block, holder, roles

    def run(self) -> list[list[Tensor]] | str:
        block = self.module
        parameters = [p for p in block.parameters() if p.requires_grad]
        gamma: Any = block._parameters[self._roles.gamma]
        with torch.no_grad():
            gamma.fill_(0.7)
        theta = conv_of(block, self._roles.theta)
        outputs, inputs = [], []
        for training, shape in ((True, (2, 8, 8)), (False, (1, 6, 4))):
            block.train(training)
            batch, height, width = shape
            x = torch.randn(batch, theta.in_channels, height, width).to(gamma).requires_grad_()
            y = block(x, *[_Unused()] * unused_arguments(self._block))
            if not isinstance(y, Tensor):
                return "it returns its attention map beside the features" if isinstance(y, tuple) else "no tensor comes"
            outputs.append(y)
            inputs.append(x)
        loss = torch.stack([(y * torch.randn_like(y)).sum() for y in outputs]).sum()
        gradients = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)
        return [[y.detach() for y in outputs], [g for g in gradients if g is not None]]

    def _replace(self, variant: Any) -> None:
        pool, scale = variant
        self.module = AdoptedAttention2d.adopt(self._block, self._roles, pool=pool, scale=scale, impl=self.impl)
        replace_everywhere(self._holder, self._block, self.module)

    def revert(self) -> None:
        replace_everywhere(self._holder, self.module, self._block)
        self.module = self._block


class _Unused:
    """Stands for an argument that must not be used: whatever is done with it but comparing it to None raises."""

    def __getattr__(self, name: str) -> Any:
        raise TypeError("it uses arguments beyond x")

    def __bool__(self) -> bool:
        raise TypeError("it uses arguments beyond x")


def swaps_of(holder: nn.Module, impl: str) -> Iterator[Swap | Refusal]:
    """Everything below ``holder``'s child ``model`` that may be swapped or looks like it: the norms first."""
    named = list(holder.get_submodule("model").named_modules())
    for path, module in named:
        yield from _norms(path, module, impl)
    for path, module in named:
        roles = None if isinstance(module, SelfAttention2d) else roles_of(module)
        if roles is not None:
            yield AttentionSwap(path, module, impl, holder, roles)
        elif "attention" in type(module).__name__.lower() and not isinstance(module, SelfAttention2d):
            yield Refusal(path, AttentionSwap.what, f"{type(module).__name__} has not the parts of a known block")


def _norms(path: str, module: nn.Module, impl: str) -> Iterator[Swap | Refusal]:
    for name in list(parametrizations(module)) if parametrize.is_parametrized(module) else ():
        norms = list(parametrizations(module)[name])
        if not any(type(norm) is _SpectralNorm for norm in norms):
            continue
        if len(norms) == 1:
            yield ParametrizationSwap(path, module, impl, name)
        else:
            yield Refusal(path, ParametrizationSwap.what, f"{name} has further parametrizations")
    for key, _ in older_hooks(module):
        yield OlderSwap(path, module, impl, key)
    spelling = stored_spelling(module)
    if spelling is not None and spelling.method not in module.__dict__:
        yield StoredVectorSwap(path, module, impl, spelling)
    names = wrapped(module)
    if names is not None and "forward" not in module.__dict__:
        yield WrapperSwap(path, module, impl, names)


def release_norms(module: nn.Module) -> None:
    """Give ``module`` back the norms that were swapped on it."""
    for name in list(parametrizations(module)) if parametrize.is_parametrized(module) else ():
        norm = only_norm(module, name)
        if isinstance(norm, SpectralNorm) and norm.once:
            parametrizations(module)[name][0] = norm.released()
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, OlderNorm):
            module._forward_pre_hooks[key] = hook.replaced
    for name in [n for n, value in module.__dict__.items() if isinstance(value, StoredVectorNorm | WrapperNorm)]:
        del module.__dict__[name]


def replace_everywhere(holder: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(holder.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _input_of(layer: Any, weight: Tensor) -> Tensor:
    """Something that ``layer`` can be called with."""
    if isinstance(layer, nn.Embedding):
        return torch.zeros(1, dtype=torch.int64, device=weight.device)
    if isinstance(layer, nn.Linear):
        return weight.new_ones(1, layer.in_features)
    conv: Any = layer
    return weight.new_ones(1, conv.in_channels, *(8 * k for k in conv.kernel_size))
