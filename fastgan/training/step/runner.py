"""Runners of one update: eagerly, by a graph that is compared with the eager update, or by the graph alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fastgan.backend import warn_once
from fastgan.distributed import World, current_world
from fastgan.losses.noise import draw
from fastgan.training.gan import Batch, Draws, Terms
from fastgan.training.step.capture import CapturedUpdate, Fit
from fastgan.training.step.eager import JointUpdate, Update
from fastgan.training.step.optimizers import CaptureError
from fastgan.training.step.snapshot import Snapshot, differences, differing_terms, distances

MOST_GRAPHS = 8
VERIFIED_CALLS = 2
EAGER, CAPTURE, COMPARE, GRAPH = range(4)  # how one call runs
TOLERANCE = 3.4e-4  # the root of float32's epsilon
ROUNDING_ERRORS = 100.0
LOW_PRECISION = 1e-4  # bfloat16 and float16 round by more
TF32 = 2.0**-10


class Step(Protocol):
    """The part of a train step that its runners use: options and the compiler."""

    mode: str
    backend: str
    verify: bool
    rng: torch.Generator | None
    device: torch.device
    world: World
    follows_default: bool

    def compile(self, graph: torch.fx.GraphModule, arguments: list[Tensor]) -> Callable[..., Any]: ...

    def graph_pool(self) -> Any: ...

    def device_rng(self) -> torch.Generator: ...


class UpdateRunner:
    """One update: eager, or captured from the first call on if that is possible."""

    def __init__(self, owner: Step, update: Update | JointUpdate) -> None:
        self._owner, self._update = owner, update
        self._graphs: list[CapturedUpdate] = []
        self._missed: Fit | None = None
        self._is_eager = owner.mode == "eager"
        self._counts: list[int] = []  # samples of each process
        self._described: tuple[list[int], list[str]] = [], []

    def share(self, batch: Batch) -> None:
        """Exchange the size of each process's part, which is needed to draw before the call."""
        if self._update.mean is not None:
            self._counts = [n for (n,) in self._update.mean.agree({}, len(next(iter(batch.values()))))]

    def draws(self, batch: Batch, *, known: Draws | None = None, rng: torch.Generator | None = None) -> Draws:
        """Random numbers of the loss, those of ``known`` or from ``rng``, by default the run's generator."""
        owner, known = self._owner, known or {}
        specs = self._update.draws(batch)
        wanted = {name: spec for name, spec in specs.items() if name not in known}
        rng = owner.rng if rng is None else rng
        new = draw(wanted, rng, owner.device, rank=owner.world.rank, counts=self._counts)
        return {name: known[name] if name in known else new[name] for name in specs}

    def __call__(self, batch: Batch, draws: Draws | None = None) -> Terms:
        if not isinstance(batch, Mapping) or not batch:
            raise TypeError(f"batch must be a mapping of names to tensors, got {type(batch).__name__}")
        n = len(next(iter(batch.values())))
        if n % self._update.accumulate:
            raise ValueError(f"accumulate must divide the batch, got {self._update.accumulate} for {n} samples")
        graph, plan = self._plan(batch)
        if (mean := self._update.mean) is not None:
            plans = self._agree(batch, n, plan)
            if plan in (CAPTURE, COMPARE) and len(set(plans)) > 1:
                plan = EAGER
            mean.set_share(n / sum(self._counts))
        if plan == CAPTURE:
            graph = self._capture(batch)
            plan = EAGER if graph is None else COMPARE if graph.unverified else GRAPH
        if plan == GRAPH and draws is None and self._owner.mode == "cudagraph":
            assert graph is not None
            return self._replay(graph, batch)
        draws = self.draws(batch) if draws is None else draws
        if plan == EAGER or graph is None:
            return self._update(batch, draws)
        return self._compare(graph, batch, draws) if plan == COMPARE else graph(batch, draws)

    def _plan(self, batch: Batch) -> tuple[CapturedUpdate | None, int]:
        """Return a graph that serves this call, if there is one, and the plan for it."""
        if self._is_eager:
            return None, EAGER
        if any([p.grad is not None for p in self._update.trained()]):
            warn_once(f"a {self._update.name} step runs eagerly: gradients in .grad are added to its own")
            return None, EAGER
        misfits = []
        for graph in self._graphs:
            if (misfit := graph.misfit(batch)) is None:
                self._missed = None
                return graph, COMPARE if graph.unverified else GRAPH
            misfits.append(misfit)
        if not misfits:
            return None, CAPTURE
        # Twice in a row the same: the change has come to stay.
        if len(self._graphs) < MOST_GRAPHS and self._missed is not None and self._missed.misfit(batch) is None:
            self._missed = None
            return None, CAPTURE
        warn_once(f"a {self._update.name} step runs eagerly: {misfits[-1]} has changed since the capture")
        self._missed = Fit(self._update, batch, self._graphs[-1].unread)
        return None, EAGER

    def _agree(self, batch: Batch, n: int, plan: int) -> list[int]:
        """Compare this call with those of the other processes; keep the sizes of their parts. Returns their plans."""
        owner, mean = self._owner, self._update.mean
        assert mean is not None
        if owner.follows_default and owner.world != current_world():
            raise RuntimeError(
                f"the processes must be those that the TrainStep was made with, {owner.world.size} of them, "
                f"got {current_world().size}: make a new one after init_process_group"
            )
        if (ids := [id(p) for p in self._update.trained()]) != self._described[0]:
            self._described = (
                ids,
                [
                    f"{name}.{key} {tuple(p.shape)}"
                    for name, network in self._update.networks.items()
                    for key, p in network.named_parameters()
                    if p.requires_grad
                ],
            )
        structure = {
            "which update they run": self._update.name,
            "the batch": [(name, tuple(value.shape[1:]), str(value.dtype)) for name, value in batch.items()],
            "the weights that are trained": self._described[1],
            "the optimizer's options": [
                {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}
                for part in self._update.parts
                for group in part.optimizer.param_groups
            ],
        }
        rows = mean.agree(structure, n, plan)
        self._counts = [row[0] for row in rows]
        if 0 in self._counts:
            raise ValueError(f"batch must have samples in every process, got {self._counts}")
        return [row[1] for row in rows]

    def _replay(self, graph: CapturedUpdate, batch: Batch) -> Terms:
        owner = self._owner
        try:
            replay = graph.capture_replay(batch, self.draws, owner.device_rng(), owner.graph_pool())
        except Exception as error:  # whatever warm-up or capture may raise: both leave the state as it was
            self._give_up(error)
            return self._update(batch, self.draws(batch))
        return replay(batch)

    def _capture(self, batch: Batch) -> CapturedUpdate | None:
        """Make a graph for calls like this one, or None if a process fails; all is as before."""
        owner, reason = self._owner, None
        start = None
        try:
            if owner.mode == "cudagraph" and owner.device.type != "cuda":
                raise CaptureError(f"CUDA graphs need a CUDA device, the generator is on {owner.device}")
            start = Snapshot(self._update.state(), owner.rng)
            # From a generator of their own, so that no random number of the run is used up.
            example = self.draws(batch, rng=torch.Generator(owner.device))
            graph = CapturedUpdate(self._update, batch, example, owner.compile)
        except Exception as error:  # whatever tracing and compilers may raise: an eager step needs none of it
            reason = _first_line(error)
        if start is not None:
            start.restore()
        reasons = [r for r in owner.world.gather(reason) if r is not None]
        if reasons:
            self._give_up(reasons[0])
            return None
        graph.unverified = VERIFIED_CALLS if owner.verify else 0
        self._graphs.append(graph)
        return graph

    def _compare(self, graph: CapturedUpdate, batch: Batch, draws: Draws) -> Terms:
        """Run the update eagerly, by the traced graph and by the compiled one, each from the same state.

        If all agree, the compiled one's results stay in place, else the eager one's.
        """
        owner, update = self._owner, self._update
        low = graph.eps > LOW_PRECISION
        start = Snapshot(update.state(), owner.rng)
        terms = update(batch, draws)
        end = Snapshot(update.state(), owner.rng)
        found: Terms = {}

        def differs(
            run: Callable[[Batch, Draws], Terms], tolerance: float, rounding: dict[str, float], draws_alike: bool
        ) -> str | None:
            """Run it from the start; return why it may not take the eager update's place in all processes, or None."""
            nonlocal found
            start.restore()
            reason = None
            try:
                found = run(batch, draws)
                left = Snapshot(update.state(), owner.rng)
                names = differences(left, end, start, tolerance, rounding, draws=draws_alike)
                names += [f"the term {name!r}" for name in differing_terms(found, terms, tolerance)]
                if names:
                    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                    reason = f"captured, it would leave other values in {', '.join(names[:3])}{more}"
            except Exception as error:  # whatever the graph may raise
                reason = _first_line(error)
            return next((r for r in owner.world.gather(reason) if r is not None), None)

        is_compiled = owner.backend != "eager"
        # The traced graph runs the same kernels; a compiler rounds otherwise.
        reason = differs(graph.run_traced, 1e-2 if low else TOLERANCE, {}, draws_alike=True)
        if reason is None and is_compiled and not graph.draws_itself:
            rounding = self._effect_of_rounding(graph, batch, draws, start, end)
            reason = differs(graph, 0.5 if low else TOLERANCE**0.5, rounding, draws_alike=False)
        if reason is not None:
            end.restore()
            self._give_up(reason)
            return terms
        if is_compiled and graph.draws_itself:
            start.restore()
            found = graph(batch, draws)
        graph.unverified -= 1
        return found

    def _effect_of_rounding(
        self, graph: CapturedUpdate, batch: Batch, draws: Draws, start: Snapshot, end: Snapshot
    ) -> dict[str, float]:
        """Map each tensor to how far rounding may move it: by what some rounding errors in each weight do.

        Gradients of a penalty and of normalized layers may magnify it a thousandfold, a unit next to a kink may come to
        lie on its other side, and a moment of Adam's may change by rounding alone, if two batches are equal.
        """
        start.restore()
        rng = torch.Generator().manual_seed(0)
        weights = {id(p): p for network in self._update.networks.values() for p in network.parameters()}
        with torch.no_grad():
            for p in weights.values():
                if p.is_floating_point():
                    error = torch.randn(p.shape, dtype=torch.float64, generator=rng).mul_(_error_of_products(graph, p))
                    p.copy_(p.double() * (1 + error.to(p.device)))
        graph.run_traced(batch, draws)
        return distances(Snapshot(self._update.state(), self._owner.rng), end)

    def _give_up(self, error: Exception | str) -> None:
        self._is_eager, self._graphs = True, []
        reason = error if isinstance(error, str) else _first_line(error)
        warn_once(f"the {self._update.name} step runs eagerly: {reason}")


def _error_of_products(graph: CapturedUpdate, weight: Tensor) -> float:
    """Return the relative error that a compiler's own order of sums may make in products of a weight."""
    if graph.eps > LOW_PRECISION:
        return graph.eps
    error = ROUNDING_ERRORS * graph.eps
    is_tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return max(error, TF32) if weight.is_cuda and weight.dtype == torch.float32 and is_tf32 else error


def _first_line(error: Exception) -> str:
    if isinstance(error, GuardOnDataDependentSymNode):  # in a hook of autograd, which runs without function modes
        return "it reads a tensor's value"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
