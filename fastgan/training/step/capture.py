"""One update as one graph over fake tensors: loss, penalties, backward, clipping, optimizer, average.

``make_fx`` runs the real autograd engine while it records ATen ops, so that a gradient penalty's double backward,
custom ops and the optimizer come out as one flat graph without autograd. All state goes in as arguments and is updated
in place. Tracing runs on fake tensors and changes no weight.

Python runs once, while the graph is traced. :class:`Fit` checks whether the values that Python read then are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import optimizer as optimizers
from torch.overrides import TorchFunctionMode

from fastgan.training.gan import Batch, Draws, Terms, gradients_of
from fastgan.training.step.cuda_graphs import CudaGraph
from fastgan.training.step.eager import JointUpdate, MicroBatch, Update, copy_all_, mean_terms
from fastgan.training.step.optimizers import CaptureError, OptimizerState, unscaled
from fastgan.training.step.process_mean import Shared, floating_buffers
from fastgan.training.step.watch import Watch

Attribute = tuple[nn.Module, str]


class Fit:
    """Checks whether a later call of ``update`` would run the same Python as one with ``batch`` does now."""

    def __init__(self, update: Update | JointUpdate, batch: Batch, written: Sequence[Attribute] = ()) -> None:
        self._update = update
        self._weights = list({id(p): p for m in update.networks.values() for p in m.parameters()}.values())
        self._trained = update.trained()
        self._watch = Watch(update.constants())
        self.ignore(written)
        self._buffers = _held_buffers(update)
        self._held = [owner[key] for owner, key in self._buffers]
        self._kept = self._state(batch)

    def ignore(self, written: Sequence[Attribute]) -> None:
        """Take these attributes to be written by each update."""
        for module, key in written:
            self._watch.ignore(vars(module), key)

    def misfit(self, batch: Batch) -> str | None:
        """Return the name of a value that has changed, or None."""
        for (name, now), kept in zip(self._state(batch).items(), self._kept.values(), strict=True):
            if now != kept:
                return name
        held = [owner[key] for owner, key in self._buffers]
        if not all(map(is_, held, self._held)):
            for new, old in zip(held, self._held, strict=True):
                if not isinstance(new, Tensor) or _metadata(new) != _metadata(old):
                    return "a buffer"
            self._held = held
        return self._watch.changed()

    def _state(self, batch: Batch) -> dict[str, Any]:
        parts = self._update.parts
        device = self._weights[0].device.type
        return {
            "its batch": [(name, _metadata(value)) for name, value in batch.items()],
            "the set of frozen weights": [p.requires_grad for p in self._weights],
            "a hook of a weight": [dict(h) if (h := p._backward_hooks) else None for p in self._trained],
            "its optimizer's options": [options_of(part.optimizer) for part in parts],
            "its gradient scaler's options": [_scaler_options(part.scaler) for part in parts],
            "a hook": unseen_hooks(self._update, self._trained),
            "a switch of torch": (
                torch.is_autocast_enabled(device),
                torch.get_autocast_dtype(device),
                torch.get_default_dtype(),
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.cuda.matmul.allow_tf32,
                torch.backends.cudnn.allow_tf32,
            ),
        }


def options_of(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    """All options that a graph of an optimizer's update holds as constants."""
    left = ("params", "lr", "initial_lr")
    return [tuple((k, v) for k, v in group.items() if k not in left) for group in optimizer.param_groups]


def _scaler_options(scaler: GradScaler | None) -> tuple[float, float, int] | None:
    if scaler is None:
        return None
    return scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()


def unseen_hooks(update: Update | JointUpdate, trained: Sequence[Tensor]) -> str | None:
    """Name hooks that no graph can hold, if there are any."""
    for optimizer in (part.optimizer for part in update.parts):
        step = vars(optimizer).get("step")
        if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
            return "its optimizer's step has been replaced"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return "its optimizer has hooks"
    if optimizers._global_optimizer_pre_hooks or optimizers._global_optimizer_post_hooks:
        return "all optimizers have hooks"
    if any([p._post_accumulate_grad_hooks for p in trained]):
        return "weights have hooks that run after gradients are accumulated"
    return None


class _Traceable(TorchFunctionMode):
    """Guards against Python that a trace misses: refuses to read a tensor's value; ``x.data = y`` copies in place."""

    NAMES = "item tolist numpy __bool__ __float__ __int__ __index__ __complex__ __array__"
    READS = frozenset(getattr(Tensor, name) for name in NAMES.split())
    SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS:
            raise CaptureError(f"it reads a tensor's value, by Tensor.{func.__name__}")
        if func == self.SET_DATA:
            tensor, value = args
            if _metadata(value) != _metadata(tensor):
                raise CaptureError("it gives a tensor's data another shape, layout or dtype")
            # A backward that saved this tensor reads the new value, as it does eagerly.
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):
                return tensor.copy_(value)
        return func(*args, **(kwargs or {}))


class _Part:
    """One update within a graph: the state that it changes besides the networks, and the findings of tracing."""

    def __init__(self, update: Update, *, holds_scaler: bool) -> None:
        self.update, self.trained, self._holds_scaler = update, update.trained(), holds_scaler
        self.optimizer = OptimizerState(update.optimizer, self.trained)
        self.terms: list[str] = []
        self.reached: list[nn.Parameter] = []

    def state(self) -> list[Tensor]:
        """All of it as it is now: optimizer, learning rates, average, gradient scaler."""
        self.optimizer.refresh()
        return [tensor for tensors in self._tensors() for tensor in tensors]

    def _tensors(self) -> list[list[Tensor]]:
        ema, scaler = self.update.ema, self.update.scaler
        scales = [] if scaler is None or not self._holds_scaler else [scaler._scale, scaler._growth_tracker]
        return [self.optimizer.tensors(), self.optimizer.rates, ema.tensors() if ema else [], scales]  # type: ignore[list-item]

    def split(self, state: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Tensors that stand for :meth:`state` as those of optimizer, rates, average and scaler."""
        ends = list(accumulate(len(tensors) for tensors in self._tensors()))
        return [state[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def names(self) -> list[str]:
        """Names of the terms that a call returns."""
        return [*self.terms, *([] if self.update.clip_grad_norm is None else ["grad_norm"])]


class CapturedUpdate:
    """``update`` as one compiled graph; if processes share a batch, as two with their exchange between them.

    Args:
        update: one to capture, or several that share tensors.
        batch, draws: examples of the arguments of a call.
        compile: maps a graph of flat arguments and examples of these to a function.

    Raises:
        CaptureError: the optimizer has no captured form, or several processes share a batch and several updates
            tensors.

    Attributes:
        written: attributes of modules that an update writes.
        unread: those and all others that the graph does not read.
        unverified: calls that are still to be compared with the eager update.
        eps: the largest rounding error of the floating-point dtypes that the graph computes in.
        draws_itself: whether it draws random numbers of its own, as for dropout.
    """

    def __init__(
        self,
        update: Update | JointUpdate,
        batch: Batch,
        draws: Draws,
        compile: Callable[[GraphModule, list[Tensor]], Callable[..., Any]],
    ) -> None:
        self._update = update
        if reason := unseen_hooks(update, update.trained()):
            raise CaptureError(reason)
        if update.mean is not None and len(update.parts) > 1:
            raise CaptureError("several processes exchange gradients between updates that share tensors")
        self._fit = Fit(update, batch)
        scalers = [part.scaler for part in update.parts]
        self._parts = [_Part(part, holds_scaler=part.scaler not in scalers[:i]) for i, part in enumerate(update.parts)]
        self._networks = _Networks(update.networks)
        self._slots = _slots(self._networks)
        self._replay: tuple[list[int], CudaGraph, CudaGraph | None] | None = None
        state, mean = self._state(), update.mean
        n, m = len(state), len(state) + len(batch)

        def first(*flat: Tensor) -> list[Tensor]:
            """The whole update; if processes share a batch, all that comes before their exchange, packed for it."""
            state = flat[:n]
            outputs: list[Tensor] = []
            before = {(module, key): value for module, key, value in self._attributes()}
            example = dict(zip(batch, flat[n:m], strict=True)), dict(zip(draws, flat[m:], strict=True))
            with torch.enable_grad(), _Traceable():
                parts = self._holding(state, update.micro_batches, *example)
            for part in self._parts:
                computed = self._differentiated(part, state, parts)
                if mean is not None:
                    self._computed = computed
                    outputs += mean.pack(computed.tensors(), flat[n - 1])
                else:
                    norm = self._apply(part, state, computed.gradients)
                    outputs += [*computed.terms.values(), *norm]
            # Tensors that modules keep outside their buffers, such as the weight of torch's older spectral norm.
            written = [(m, key, value) for m, key, value in self._attributes() if before.get((m, key)) is not value]
            self.written: list[Attribute] = [(module, key) for module, key, _ in written]
            return outputs + [value.detach() for _, _, value in written]

        def second(*flat: Tensor) -> list[Tensor]:
            """The update by the means over the processes."""
            assert mean is not None
            common = self._computed.replaced(mean.unpack(flat[n:], self._computed.tensors()))
            copy_all_(self._buffers(flat[:n]), common.buffers)
            norm = self._apply(self._parts[0], flat[:n], common.gradients)
            return [*(term.clone() for term in common.terms.values()), *norm]

        arguments = [*state, *batch.values(), *draws.values()]
        graph = _graph_of(first, arguments)
        # Tensors that modules keep and this graph does not read may be replaced, by another update for example.
        held = [*vars(graph).values(), *graph.parameters(), *graph.buffers()]
        constants = {value.data_ptr() for value in held if isinstance(value, Tensor)}
        written = set(self.written)
        kept = [(m, key, value) for m, key, value in self._attributes() if (m, key) not in written]
        unread = [(m, key) for m, key, value in kept if value.data_ptr() not in constants]
        self.unread: list[Attribute] = [*self.written, *unread]
        self._fit.ignore(self.unread)
        self.traced: tuple[Callable[..., Any], Callable[..., Any] | None] = torch.no_grad()(graph), None
        self.unverified = 0
        self.eps, self.draws_itself = _eps(graph), _draws_itself(graph)
        self._first = torch.no_grad()(compile(graph, arguments))
        self._second: Callable[..., Any] | None = None
        if mean is not None:
            (output,) = (node for node in graph.graph.nodes if node.op == "output")
            buckets = [node.meta["val"] for node in self._split(output.args[0])[0]]
            arguments = [*state, *(torch.zeros(b.shape, dtype=b.dtype, device=b.device) for b in buckets)]
            graph = _graph_of(second, arguments)
            self.traced = self.traced[0], torch.no_grad()(graph)
            self._second = torch.no_grad()(compile(graph, arguments))

    def misfit(self, batch: Batch) -> str | None:
        """Return the name of a value in the batch, networks, losses or optimizer that the graph does not fit."""
        return self._fit.misfit(batch)

    def __call__(self, batch: Batch, draws: Draws) -> Terms:
        """Update the weights once. Returns the terms of the loss."""
        return self._run(self._first, self._second, batch, draws)

    def run_traced(self, batch: Batch, draws: Draws) -> Terms:
        """The same by the graph as it was traced, op by op."""
        return self._run(*self.traced, batch, draws)

    def _run(self, first: Callable[..., Any], second: Callable[..., Any] | None, batch: Batch, draws: Draws) -> Terms:
        state = self._state()
        outputs = first(*state, *batch.values(), *draws.values())
        return self._terms(outputs, lambda buckets: second(*state, *buckets))  # type: ignore[misc]

    def capture_replay(
        self, batch: Batch, draw: Callable[[Batch], Draws], rng: torch.Generator, pool: Any
    ) -> Callable[[Batch], Terms]:
        """The same update as CUDA graphs that hold the draws too, captured anew if state has moved in memory."""
        state = self._state()
        # Not only other tensors: g.cpu() and g.cuda() leave the parameters that g has, with other data.
        addresses = [tensor.data_ptr() for tensor in state]
        if self._replay is None or addresses != self._replay[0]:
            self._replay = None  # its memory goes back to the pool first
            first = CudaGraph(
                lambda batch: list(self._first(*state, *batch.values(), *draw(batch).values())), batch, state, rng, pool
            )
            second = None
            if self._second is not None:
                run, (buckets, _) = self._second, self._split(first.outputs)
                second = CudaGraph(lambda _: list(run(*state, *buckets)), {}, state, rng, pool)
            self._replay = addresses, first, second
        _, first, second = self._replay

        def replay(batch: Batch) -> Terms:
            terms = self._terms(first(batch), lambda _: second({}))  # type: ignore[misc]
            return {name: term.clone() for name, term in terms.items()}

        return replay

    def _split(self, outputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Outputs of the first graph: terms or buckets, and the values of attributes."""
        n = len(outputs) - len(self.written)
        return outputs[:n], outputs[n:]

    def _terms(self, outputs: Sequence[Tensor], second: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Terms:
        """Terms of the loss by name, after the exchange and the second graph if processes share a batch."""
        outputs, values = self._split(outputs)
        for (module, key), value in zip(self.written, values, strict=True):
            vars(module)[key] = value
        if self._update.mean is not None:
            self._update.mean.agree(self._signature)
            self._update.mean.reduce_(outputs)
            outputs = second(outputs)
        names = []
        for part in self._parts:
            if "step" in vars(part.update.optimizer):  # a scheduler has put its own there, which sets this
                part.update.optimizer._opt_called = True  # type: ignore[attr-defined]
            names += [f"{part.update.name}/{n}" if len(self._parts) > 1 else n for n in part.names()]
        return dict(zip(names, outputs, strict=True))

    def _state(self) -> list[Tensor]:
        """All state as it is now, in the order of the graph's first arguments."""
        networks = [owner[key] for owner, key in self._slots.values()]
        shares = [self._update.mean.weight] if self._update.mean else []
        return [*networks, *(tensor for part in self._parts for tensor in part.state()), *shares]

    def _own(self, part: _Part, state: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Tensors in ``state`` that stand for the part's optimizer, rates, average and scaler."""
        start = len(self._slots)
        scales: dict[int, Sequence[Tensor]] = {}
        for other in self._parts:
            *own, held = other.split(state[start:])
            scale = scales.setdefault(id(other.update.scaler), held)
            if other is part:
                return [*own, scale]
            start += len(other.state())
        raise ValueError("part must be one of this graph's")

    def _differentiated(self, part: _Part, state: Sequence[Tensor], parts: Sequence[MicroBatch]) -> Shared:
        traced, kept, sums = self._traced(state), [], None
        stands_in = [traced[id(p)] for p in part.trained]
        scale: float | Tensor = 1 / len(parts)
        if part.update.scaler is not None:
            _, _, _, (factor, _) = self._own(part, state)
            scale = factor * scale
        for batch, draws in parts:
            with torch.enable_grad(), _Traceable():
                terms = self._holding(state, part.update.loss, batch, draws)
                gradients = gradients_of(terms, stands_in, scale=scale)
            if sums is None:
                sums = gradients
            else:
                both = zip(sums, gradients, strict=True)
                sums = [b if a is None else a if b is None else a + b for a, b in both]
            kept.append({name: term.detach() for name, term in terms.items()})
        assert sums is not None
        for i, p in enumerate(part.trained):
            for hook in (p._backward_hooks or {}).values():
                if (gradient := sums[i]) is not None and (hooked := hook(gradient)) is not None:
                    sums[i] = hooked
        part.reached = [p for p, g in zip(part.trained, sums, strict=True) if g is not None]
        shared = Shared([g for g in sums if g is not None], self._buffers(state), mean_terms(kept))
        part.terms = list(shared.terms)
        self._signature = part.update.signature(shared.terms, part.reached)
        return shared

    def _attributes(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Tensors that are plain attributes of modules."""
        modules = list(self._networks.modules())
        return [(m, key, v) for m in modules for key, v in vars(m).items() if isinstance(v, Tensor)]

    @torch.no_grad()
    def _apply(self, part: _Part, state: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Clip gradients, step, clip weights, move the average. Returns the gradients' norm if it is clipped."""
        held, rates, averages, scales = self._own(part, state)
        update, norms = part.update, []
        found_inf: Tensor | None = None
        if update.scaler is not None:
            found_inf = torch.zeros_like(scales[0])
            gradients = unscaled(gradients, scales[0], found_inf)
        if update.clip_grad_value is not None:
            gradients = [g.clamp(-update.clip_grad_value, update.clip_grad_value) for g in gradients]
        if update.clip_grad_norm is not None:
            norms = [nn.utils.get_total_norm(gradients)]
            factor = (update.clip_grad_norm / (norms[0] + 1e-6)).clamp(max=1.0)
            gradients = [g * factor for g in gradients]
        by_id = {id(p): gradient for p, gradient in zip(part.reached, gradients, strict=True)}
        part.optimizer.update(self._traced(state), by_id, held, rates, found_inf)
        if update.scaler is not None and found_inf is not None:
            growth, backoff, interval = _scaler_options(update.scaler)  # type: ignore[misc]
            torch._amp_update_scale_(scales[0], scales[1], found_inf, growth, backoff, interval)
        self._holding(state, update.finish, averages)
        return norms

    def _traced(self, state: Sequence[Tensor]) -> dict[int, Tensor]:
        """Map the id of each tensor of the networks to the one in ``state`` that stands for it."""
        return {id(owner[key]): tensor for (owner, key), tensor in zip(self._slots.values(), state, strict=False)}

    def _buffers(self, state: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that stand for :func:`fastgan.training.step.process_mean.floating_buffers`."""
        traced = self._traced(state)
        return [traced[id(buffer)] for buffer in floating_buffers(self._update.networks)]

    def _holding(self, state: Sequence[Tensor], function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` while the networks hold the tensors of ``state``.

        A buffer that a module puts in another's place is written to the tensor that stood there.
        """
        slots = list(zip(self._slots.values(), state, strict=False))

        def held(*args: Any) -> Any:
            result = function(*args)
            for (owner, key), tensor in slots:
                if (new := owner[key]) is not tensor:
                    if not isinstance(new, Tensor) or _metadata(new) != _metadata(tensor):
                        raise CaptureError(f"a module gives {key} another shape, layout or dtype")
                    with torch.no_grad():
                        tensor.copy_(new)
                    owner[key] = tensor
            return result

        return functional_call(self._networks, dict(zip(self._slots, state, strict=False)), (held, *args))


class _Networks(nn.Module):
    """All networks as one module, whose forward calls any function."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks.values())

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def _slots(networks: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Map each tensor's name to the dictionary that holds it and its key: reading there is quick and never stale."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    for prefix, module in networks.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots[f"{prefix}.{key}"] = (held, key)
    return slots


def _held_buffers(update: Update | JointUpdate) -> list[tuple[dict[str, Any], str]]:
    """The dictionary and the key of each buffer."""
    modules = {id(m): m for network in update.networks.values() for m in network.modules()}
    return [(m._buffers, key) for m in modules.values() for key in m._buffers]


def _metadata(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _eps(graph: GraphModule) -> float:
    values = [node.meta.get("val") for node in graph.graph.nodes]
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _draws_itself(graph: GraphModule) -> bool:
    tag = torch.Tag.nondeterministic_seeded
    return any(tag in getattr(node.target, "tags", ()) for node in graph.graph.nodes)


def _graph_of(function: Callable[..., Any], arguments: Sequence[Tensor]) -> GraphModule:
    # Tensors that a loss closes over stay constants of the graph.
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
