"""Trial runs of :func:`fastgan.nn.fuse`: run a module, compare its results and restore its state."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastgan._random_state import GENERATORS, set_state, state_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
_LIBRARIES = {"torch", "torchvision", "functorch", "numpy", "scipy", "triton", *sys.stdlib_module_names}
_WHOLE_MODEL = 10  # times that, as differences grow through layers

Results = Sequence[Sequence[Tensor]]


class ModuleState:
    """Everything that a forward of a module may change: attributes, buffers, hooks, modes and random numbers.

    Entered are attributes of modules, containers, and objects of classes outside of torch, NumPy and the standard
    library; of modules that are not below ``module``, nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._seen: set[int] = set()
        pending: list[Any] = [m.__dict__ for m in module.modules()]
        while pending:
            value = pending.pop()
            if id(value) not in self._seen:
                self._seen.add(id(value))
                pending += self._keep(value)
        self._global = (random.getstate(), np.random.get_state(legacy=True))  # noqa: NPY002

    def _keep(self, value: Any) -> Iterable[Any]:
        """Keep one value and return the values below it that are to be kept too."""
        if isinstance(value, Tensor):
            self._tensors.append((value, value.detach(), value.detach().clone(), value.requires_grad))
        elif isinstance(value, GENERATORS):
            self._generators.append((value, state_of(value)))
        elif isinstance(value, np.ndarray):
            self._arrays.append((value, value.copy()))
        elif isinstance(value, dict):
            self._containers.append((value, dict(value)))
            return list(value.values())
        elif isinstance(value, list | set | deque):
            self._containers.append((value, list(value)))
            return list(value)
        elif isinstance(value, tuple):
            return value
        elif not isinstance(value, nn.Module | type) and isinstance(getattr(value, "__dict__", None), dict):
            library = (type(value).__module__ or "").partition(".")[0] in _LIBRARIES
            return () if library else (value.__dict__,)
        return ()

    def restore(self) -> None:
        for live, kept in self._containers:
            if isinstance(live, dict):
                if list(live) != list(kept) or any(live[key] is not kept[key] for key in kept):
                    live.clear()
                    live.update(kept)
            elif len(live) != len(kept) or any(a is not b for a, b in zip(live, kept, strict=True)):
                live.clear()
                (live.update if isinstance(live, set) else live.extend)(kept)
        for tensor, memory, value, requires_grad in self._tensors:
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
            if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:  # through .data
                tensor.data = memory
            if not torch.equal(memory, value):
                with torch.no_grad():
                    tensor.copy_(value)
        for generator, state in self._generators:
            set_state(generator, state)
        for array, entries in self._arrays:
            array[...] = entries
        random.setstate(self._global[0])
        np.random.set_state(self._global[1])  # noqa: NPY002


@contextmanager
def trial(module: nn.Module) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Yield a function that runs another with fixed random numbers; then put ``module`` back as it was."""
    kept = ModuleState(module)
    tensors = [*module.parameters(), *module.buffers()]
    cuda = sorted({t.device.index for t in tensors if t.is_cuda})
    devices = {t.device.type for t in tensors if not t.is_meta} | {"cpu"}

    def seeded(run: Callable[[], Any]) -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            return run()

    try:
        yield seeded
    finally:
        kept.restore()


def tolerance_of(module: nn.Module) -> float:
    """The relative difference that rounding explains, for the coarsest dtype in ``module``."""
    return max((TOLERANCE.get(p.dtype, 0.0) for p in module.parameters()), default=TOLERANCE[torch.float32])


def relative_error(actual: Results | str, expected: Results) -> float:
    """The largest relative difference of a tensor; those much smaller than others of their group count less."""
    if isinstance(actual, str) or [len(group) for group in actual] != [len(group) for group in expected]:
        return float("inf")
    worst = 0.0
    for group, expected_group in zip(actual, expected, strict=True):
        norms = [float(e.double().norm()) for e in expected_group]
        for a, e, norm in zip(group, expected_group, norms, strict=True):
            if a.shape != e.shape:
                return float("inf")
            difference = float((a.double() - e.double()).norm()) / max(norm + 1e-2 * max(norms), 1e-30)
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def random_like(t: Tensor) -> Tensor:
    """Random numbers of the shape of ``t``: those of ``torch.randn_like`` depend on its memory layout too."""
    return torch.randn(t.shape, dtype=t.dtype, device=t.device)


def run_whole(model: nn.Module, example_input: Any) -> dict[str, Results]:
    """Outputs, gradients and state of two forwards in training mode, then of two in eval mode.

    A mode is left out if the model cannot run in it or its results are not finite, as with untrained vectors.
    """
    results: dict[str, Results] = {}
    why: Exception | str = ""
    with trial(model) as seeded:
        for mode in ("training", "eval"):
            model.train(mode == "training")
            try:
                found = seeded(lambda: _outputs(model, example_input))
            except Exception as error:  # whatever code that was never seen may raise
                why = error
                continue
            if all(t.isfinite().all() for group in found for t in group):
                results[mode] = found
            else:
                why = "its outputs or gradients are not finite"
    if not results:
        raise ValueError(f"example_input must be an input that model accepts: {why}")
    return results


def same_whole(model: nn.Module, example_input: Any, before: dict[str, Results]) -> bool:
    """Return whether the model still gives the results that :func:`run_whole` returned."""
    try:
        after = run_whole(model, example_input)
    except ValueError:
        return False
    allowed = _WHOLE_MODEL * tolerance_of(model)
    return set(after) == set(before) and all(relative_error(after[mode], before[mode]) <= allowed for mode in before)


def _outputs(model: nn.Module, example_input: Any) -> Results:
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for _ in range(2):
        leaves = [t for t in tree_leaves(_call(model, example_input)) if isinstance(t, Tensor)]
        floating = [t for t in leaves if t.is_floating_point() and t.requires_grad]
        cotangents = [random_like(t) for t in floating]
        if floating:
            found = torch.autograd.grad(floating, parameters, cotangents, allow_unused=True)
            gradients += [torch.zeros(()) if g is None else g for g in found]
        outputs += [t.detach() for t in leaves]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    state = [t.detach().clone() for t in (*model.buffers(), *frozen) if t.is_floating_point()]
    return [outputs, gradients, state]


def _call(model: nn.Module, example_input: Any) -> Any:
    example_input = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example_input)  # some write to it
    if isinstance(example_input, dict):
        return model(**example_input)
    if isinstance(example_input, tuple | list):
        return model(*example_input)
    return model(example_input)
