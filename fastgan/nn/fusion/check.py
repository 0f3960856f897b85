"""How :func:`fastgan.nn.fuse` runs a module without leaving a trace, and what it takes for equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
_WHOLE_MODEL = 10  # times that, as differences grow through layers

Results = Sequence[Sequence[Tensor]]


@contextmanager
def trial(module: nn.Module) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Yields a function that runs another with fixed random numbers; then puts ``module`` back as it was."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    saved = [(t, t.detach().clone(), t.requires_grad) for t in tensors.values()]
    flags = [(m, m.training) for m in module.modules()]
    attributes = [(m, {k: v for k, v in m.__dict__.items() if isinstance(v, Tensor)}) for m in module.modules()]
    cuda = sorted({t.device.index for t in tensors.values() if t.is_cuda})

    def seeded(run: Callable[[], Any]) -> Any:
        with torch.random.fork_rng(devices=cuda), torch.enable_grad():
            torch.manual_seed(0)
            return run()

    try:
        yield seeded
    finally:
        for t, value, requires_grad in saved:
            t.requires_grad_(requires_grad)
            with torch.no_grad():
                t.copy_(value)
        for m, training in flags:
            m.training = training
        for m, before in attributes:
            for name in [k for k, v in m.__dict__.items() if isinstance(v, Tensor) and k not in before]:
                del m.__dict__[name]
            m.__dict__.update(before)


def tolerance_of(module: nn.Module) -> float:
    """The relative difference that rounding explains, for the coarsest dtype in ``module``."""
    return max((_TOLERANCE.get(p.dtype, 0.0) for p in module.parameters()), default=_TOLERANCE[torch.float32])


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


def run_whole(model: nn.Module, example_input: Any) -> dict[str, Results]:
    """Outputs, gradients and state of two forwards in training mode, then of two in eval mode.

    A mode is left out where the model cannot run in it, or gives what is not finite, as before vectors are trained.
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
        raise ValueError(f"example_input must be what model can be called with: {why}")
    return results


def same_whole(model: nn.Module, example_input: Any, before: dict[str, Results]) -> bool:
    """Whether the model still gives what :func:`run_whole` gave."""
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
        cotangents = [torch.randn_like(t) for t in floating]
        if floating:
            found = torch.autograd.grad(floating, parameters, cotangents, allow_unused=True)
            gradients += [torch.zeros(()) if g is None else g for g in found]
        outputs += [t.detach() for t in leaves]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    state = [t.detach().clone() for t in (*model.buffers(), *frozen) if t.is_floating_point()]
    return [outputs, gradients, state]


def _call(model: nn.Module, example_input: Any) -> Any:
    if isinstance(example_input, dict):
        return model(**example_input)
    if isinstance(example_input, tuple | list):
        return model(*example_input)
    return model(example_input)
