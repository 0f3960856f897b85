"""Train steps that run eagerly, as one compiled graph each, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fastgan.backend import warn_once
from fastgan.distributed import World, current_world
from fastgan.losses.noise import Draw, draw
from fastgan.training.ema import EMA
from fastgan.training.gan import GAN, Batch, Draws, Terms, checked_terms, with_shared
from fastgan.training.step.capture import CapturedUpdate, Fit
from fastgan.training.step.eager import JointUpdate, LazyTerm, Update
from fastgan.training.step.optimizers import CaptureError
from fastgan.training.step.process_mean import ProcessMean, broadcast_, broadcast_optimizer_
from fastgan.training.step.reachable import Snapshot, differences, differing_terms, distances

MODES = ("eager", "compile", "cudagraph")
MOST_GRAPHS = 8
VERIFIED_CALLS = 2
EAGER, CAPTURE, COMPARE, GRAPH = range(4)  # how one call runs
TOLERANCE = 3.4e-4  # the root of float32's epsilon
ROUNDING_ERRORS = 100.0
LOW_PRECISION = 1e-4  # bfloat16 and float16 round by more
TF32 = 2.0**-10


class TrainStep:
    """Discriminator and generator updates of a GAN.

    A captured update is one graph: forward, gradient penalty with its double backward, backward, optimizer, clipping,
    moving average, spectral-norm and batch-norm buffers. It updates the same tensors that the networks, optimizers and
    average hold, so these can be used, saved and loaded between steps as usual, and a run may move between modes. The
    graph is made at the first call. Learning rates may change at each call.

    A captured step equals the eager one, or it runs eagerly with one :class:`fastgan.backend.BackendWarning` that names
    the reason. The first two calls are run both ways and compared in everything that the networks, losses, optimizer
    and average reach: tensors, Python values, gradients, states of random number generators. Later, a call for which
    anything differs that the graph may hold - the batch's shape, options, modes, frozen weights, hooks, attributes of
    modules, variables of losses - runs eagerly; if the next call agrees with it, a new graph is made, up to
    :data:`MOST_GRAPHS` of them. Weights that a loss does not reach are left alone.

    Processes of a ``torch.distributed`` group share a batch: each gives its part and gets the update and the losses of
    the whole. Gradients, running statistics and singular vectors are averaged between two graphs, weighted by the
    parts' sizes, so weights, buffers, optimizers and averages stay equal in all processes. Noise is drawn for the whole
    batch, and each process takes its part. The numbers are those of one process with the whole batch, except for batch
    norm, which normalizes each part by itself. Losses are taken to be means over samples. Processes that disagree in
    structure all raise one error.

    In your own loop, with modules ``g`` and ``d`` and their optimizers::

        def d_loss(batch, draws):
            return softplus(d(g(draws["z"]).detach())).mean() + softplus(-d(batch["images"])).mean()

        def g_loss(batch, draws):
            return softplus(-d(g(draws["z"]))).mean()

        gan = FunctionalGAN(g, d, d_loss, g_loss, lambda n: {"z": normal(n, 128)})
        step = TrainStep(gan, optimizer_g, optimizer_d, mode="compile")
        for images in loader:
            losses = step.discriminator({"images": images}) | step.generator({"images": images})

    Args:
        gan: networks and losses; :class:`fastgan.training.FunctionalGAN` makes one of any two modules.
        optimizer_g: of the generator: for a captured step Adam, AdamW, RMSprop, or SGD without dampening.
        optimizer_d: of the discriminator. Both hold weights of their own network alone; see :meth:`of_updates` for
            more networks and optimizers.
        mode: "eager"; "compile", captured and compiled; or "cudagraph", that and replayed as a CUDA graph.
        backend: the compiler, a backend of ``torch.compile``.
        ema: average of the generator that moves after each of its updates.
        clip: bound of the discriminator's weights after each of its updates; 0 for none.
        rng: generator that the draws of the losses come from, in all modes alike; None for the device's default one.
            Modules that draw by themselves (dropout) use the default one, when compiled in an order of their own.
            Processes that share a batch seed it alike.
        world: processes that share the batches, a process group; None for the default one, if it is initialized. They
            begin with the weights, buffers, averages and optimizer states of the first.
        clip_grad_norm, clip_grad_value, accumulate, scaler: see :class:`NetworkUpdate`; for both updates.
        lazy: terms that only every n-th update has, by the name of the update and their own:
            ``{"discriminator": {"r1": LazyTerm(loss, 16)}}``. Each choice of terms has a graph of its own.
        verify: compare the first two calls of a captured update with the eager one. The memory of two more copies of
            weights and optimizer states is needed meanwhile.

    Attributes:
        compilations: graphs compiled so far: 1 per update after its first call, 2 if processes share a batch.
        counts: updates done so far, by name; they decide which have lazy terms. Set them when a run is resumed.

    Raises:
        ValueError: an unknown mode, an optimizer with none of its network's weights or with others', sharded weights,
            or a negative bound.

    Example:
        >>> net, critic = nn.Linear(4, 2), nn.Linear(2, 1)
        >>> gan = FunctionalGAN(
        ...     net,
        ...     critic,
        ...     lambda batch, draws: critic(net(draws["z"]).detach()).mean() - critic(batch["images"]).mean(),
        ...     lambda batch, draws: -critic(net(draws["z"])).mean(),
        ...     draws=lambda n: {"z": normal(n, 4)},
        ... )
        >>> step = TrainStep(gan, *(torch.optim.Adam(m.parameters()) for m in (net, critic)))
        >>> loss_d = step.discriminator({"images": torch.randn(8, 2)})["loss"]
        >>> loss_g = step.generator({"images": torch.randn(8, 2)})["loss"]
    """

    def __init__(
        self,
        gan: GAN,
        optimizer_g: torch.optim.Optimizer,
        optimizer_d: torch.optim.Optimizer,
        *,
        mode: str = "eager",
        backend: str = "inductor",
        ema: EMA | None = None,
        clip: float = 0.0,
        rng: torch.Generator | None = None,
        world: World | dist.ProcessGroup | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int = 1,
        scaler: GradScaler | None = None,
        lazy: Mapping[str, Mapping[str, LazyTerm]] | None = None,
        verify: bool = True,
    ) -> None:
        lazy = {} if lazy is None else lazy
        if unknown := sorted(lazy.keys() - {"discriminator", "generator"}):
            raise ValueError(f"lazy must have terms of 'discriminator' and 'generator', got {', '.join(unknown)}")
        options: dict[str, Any] = {
            "clip_grad_norm": clip_grad_norm,
            "clip_grad_value": clip_grad_value,
            "accumulate": accumulate,
            "scaler": scaler,
        }
        _check_optimizer("optimizer_g", optimizer_g, {"generator": gan.generator})
        _check_optimizer("optimizer_d", optimizer_d, {"discriminator": gan.discriminator})
        updates = [
            Update.of_gan(gan, "discriminator", optimizer_d, clip=clip, lazy=lazy.get("discriminator", {}), **options),
            Update.of_gan(gan, "generator", optimizer_g, ema=ema, lazy=lazy.get("generator", {}), **options),
        ]
        self.gan: GAN | None = gan
        self._set_up(
            updates, getattr(gan, "shared", None), mode=mode, backend=backend, rng=rng, world=world, verify=verify
        )

    @classmethod
    def of_updates(
        cls,
        networks: Mapping[str, nn.Module],
        updates: Mapping[str, NetworkUpdate],
        *,
        shared: Callable[[Batch, Draws], Mapping[str, Tensor]] | None = None,
        mode: str = "eager",
        backend: str = "inductor",
        rng: torch.Generator | None = None,
        world: World | dist.ProcessGroup | None = None,
        verify: bool = True,
    ) -> TrainStep:
        """Make the step of any number of networks and optimizers; :meth:`update` runs one of the updates.

        Args:
            networks: every network that a loss uses, by name.
            updates: by name.
            shared: ``(batch, draws)`` -> tensors by name that every loss finds in its batch, such as generated images.
                :meth:`both` computes them once, :meth:`update` once per call.
            mode, backend, rng, world, verify: as for two networks.

        Raises:
            ValueError: an update trains an unknown network, its optimizer holds other weights, or two updates train one
                weight without ``shares_weights``.

        Example::

            step = TrainStep.of_updates(
                {"g": g, "d": d, "q": q},
                {
                    "d": NetworkUpdate(d_loss, ["d"], optimizer_d, draws),
                    "g": NetworkUpdate(g_and_code_loss, ["g", "q"], optimizer_gq, draws),
                },
            )
            losses = step.update("d", batch) | step.update("g", batch)
        """
        made, trained_by = [], dict[int, str]()
        for name, update in updates.items():
            names = [update.trains] if isinstance(update.trains, str) else list(update.trains)
            if unknown := [n for n in names if n not in networks]:
                allowed = ", ".join(networks)
                raise ValueError(f"updates[{name!r}] must train some of {allowed}, got {', '.join(unknown)}")
            modules = {n: networks[n] for n in names}
            _check_optimizer(f"the optimizer of updates[{name!r}]", update.optimizer, modules)
            for p in (p for group in update.optimizer.param_groups for p in group["params"]):
                other = trained_by.setdefault(id(p), name)
                if other != name and not (update.shares_weights or updates[other].shares_weights):
                    raise ValueError(
                        f"updates[{name!r}] and updates[{other!r}] must not train one weight both, unless one of them "
                        "has shares_weights=True"
                    )
            made.append(update.of_networks(name, networks, list(modules.values()), shared))
        step = cls.__new__(cls)
        step.gan = None
        step._set_up(made, shared, mode=mode, backend=backend, rng=rng, world=world, verify=verify)
        return step

    def _set_up(
        self,
        updates: Sequence[Update],
        shared: Callable[[Batch, Draws], Mapping[str, Tensor]] | None,
        *,
        mode: str,
        backend: str,
        rng: torch.Generator | None,
        world: World | dist.ProcessGroup | None,
        verify: bool,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        for update in updates:
            for name in ("clip", "clip_grad_norm", "clip_grad_value"):
                if (value := getattr(update, name)) is not None and value < 0:
                    raise ValueError(f"{name} must be at least 0, got {value}")
            if update.accumulate < 1:
                raise ValueError(f"accumulate must be at least 1, got {update.accumulate}")
            for name, network in update.networks.items():
                if any(type(p).__name__ == "DTensor" for p in network.parameters()):
                    raise ValueError(f"the {name} must have whole weights in each process, they are sharded (FSDP2)")
        self.mode, self.backend, self.verify, self.rng = mode, backend, verify, rng
        self.ema = next((update.ema for update in updates if update.ema), None)
        self.compilations = 0
        networks = list({id(m): m for update in updates for m in update.networks.values()}.values())
        self.device = next(p for m in networks for p in m.parameters()).device
        self.world, self.follows_default = _checked_world(world), world is None
        self._pool: Any = None
        mean = ProcessMean(self.world, device=self.device) if self.world.size > 1 else None
        averages = [tensor for update in updates if update.ema for tensor in update.ema.tensors()]
        broadcast_([t for m in networks for t in (*m.parameters(), *m.buffers())] + averages, self.world)
        self._updates = {
            update.name: replace(update, mean=mean, scaler=_started(update.scaler, self.device)) for update in updates
        }
        for update in self._updates.values():
            broadcast_optimizer_(update.optimizer, self.world)
            if (scaler := update.scaler) is not None:
                broadcast_([scaler._scale, scaler._growth_tracker], self.world)  # type: ignore[list-item]
        self._shared = shared
        self._steps: dict[tuple[tuple[str, tuple[str, ...]], ...], _Step] = {}
        self.counts = dict.fromkeys(self._updates, 0)

    def update(self, name: str, batch: Batch, *, draws: Draws | None = None) -> Terms:
        """Run the update of this name once. Returns the terms of its loss, detached scalars on the device.

        Args:
            name: of the update.
            batch: tensors by name, samples in their first dimension.
            draws: the loss's random numbers; None draws them anew.

        Raises:
            ValueError: an unknown name, or a batch that ``accumulate`` does not divide.
            RuntimeError: processes disagree in structure.
        """
        terms = self._next(name)(batch, draws)
        self.counts[name] += 1
        return terms

    def both(self, batch: Batch, *, first: str = "discriminator", second: str = "generator") -> Terms:
        """Run two updates on one batch and the same random numbers, as loops do that generate one fake batch for both.

        The result of ``shared`` is computed once for both. Without ``shared``, the second update generates its images
        again. They are the same images if the first update has not trained the generator, but the generator's running
        statistics and singular vectors are then updated twice.

        Returns:
            The terms of both losses, as "discriminator/loss" and so on.

        Raises:
            ValueError: an unknown name, or one update twice.
        """
        if first == second:
            raise ValueError(f"second must be another update than first, got {second!r} for both")
        if self._shared is not None:
            terms = self._next(first, second)(batch)
            self.counts[first] += 1
            self.counts[second] += 1
            return terms
        step = self._next(first)
        step.share(batch)
        draws = step.draws(batch)
        terms = {f"{first}/{name}": term for name, term in self.update(first, batch, draws=draws).items()}
        step = self._next(second)
        step.share(batch)
        draws = step.draws(batch, known=draws)
        return terms | {f"{second}/{name}": term for name, term in self.update(second, batch, draws=draws).items()}

    def _next(self, *names: str) -> _Step:
        """The next call of one update, or of several together, with the lazy terms that they have."""
        for name in names:
            if name not in self._updates:
                raise ValueError(f"name must be one of {', '.join(map(repr, self._updates))}, got {name!r}")
        key = tuple((name, self._updates[name].at(self.counts[name])) for name in names)
        if key not in self._steps:
            parts = tuple(self._updates[name].with_lazy(lazy) for name, lazy in key)
            update = parts[0] if self._shared is None or len(parts) == 1 else JointUpdate(parts, self._shared)
            self._steps[key] = _Step(self, update)
        return self._steps[key]

    def discriminator(self, batch: Batch) -> Terms:
        """Update the discriminator once. Returns the terms of its loss, detached scalars on the device."""
        return self.update("discriminator", batch)

    def generator(self, batch: Batch) -> Terms:
        """Update the generator once, with as many images as ``batch`` has. Returns the terms of its loss."""
        return self.update("generator", batch)

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Within the block every update runs eagerly; graphs are kept for later."""
        steps, mode, self._steps, self.mode = self._steps, self.mode, {}, "eager"
        try:
            yield
        finally:
            self._steps, self.mode = steps, mode

    @torch.no_grad()
    def compile(self, graph: torch.fx.GraphModule, arguments: list[Tensor]) -> Callable[..., Any]:
        """Compile ``graph`` for arguments like these by the backend of ``torch.compile``, and count.

        Dynamo is skipped: it would trace the graph again and guard hundreds of tensors at each call.
        """
        compiled = torch._dynamo.lookup_backend(self.backend)(graph, arguments)
        self.compilations += 1
        return compiled

    def graph_pool(self) -> Any:
        """Memory that the CUDA graphs of both networks share."""
        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        return self._pool

    def device_rng(self) -> torch.Generator:
        """``rng``, or the default generator of the CUDA device."""
        if self.rng is not None:
            return self.rng
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        return torch.cuda.default_generators[index]


@dataclass(frozen=True)
class NetworkUpdate:
    """One update of :meth:`TrainStep.of_updates`.

    Args:
        loss: ``(batch, draws)`` -> a scalar, or a dict of scalars whose sum is minimized.
        trains: names of the networks whose weights ``optimizer`` holds.
        optimizer: for a captured step Adam, AdamW, RMSprop, or SGD without dampening.
        draws: maps the number of samples in a batch to the random numbers that the loss needs, by name.
        clip: bound of the trained weights after each step; 0 for none.
        clip_grad_norm: largest norm of all gradients together; the terms then have "grad_norm", the norm before.
        clip_grad_value: largest absolute value of a gradient's entry.
        accumulate: number of equal micro-batches that each batch is split into; their gradients are averaged.
        scaler: multiplies the loss before it is differentiated in float16, and skips a step whose gradients are not
            finite; its scale moves after each update. Cast the networks by ``torch.autocast`` in the losses.
        ema: an average of the first of ``trains`` that moves after each step.
        lazy: terms that only every n-th update has, by name.
        shares_weights: another update may train weights of this one too, with an optimizer of its own.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> loss = lambda batch, draws: (net(draws["z"]) - batch["target"]).square().mean()
        >>> update = NetworkUpdate(loss, "net", torch.optim.Adam(net.parameters()), draws=lambda n: {"z": normal(n, 4)})
        >>> step = TrainStep.of_updates({"net": net}, {"net": update})
        >>> sorted(step.update("net", {"target": torch.zeros(8, 2)}))
        ['loss']
    """

    loss: Callable[[Batch, Draws], Tensor | Terms]
    trains: str | Sequence[str]
    optimizer: torch.optim.Optimizer
    draws: Callable[[int], Mapping[str, Draw]] | None = None
    clip: float = 0.0
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    accumulate: int = 1
    scaler: GradScaler | None = None
    ema: EMA | None = None
    lazy: Mapping[str, LazyTerm] = field(default_factory=dict)
    shares_weights: bool = False

    def of_networks(
        self,
        name: str,
        networks: Mapping[str, nn.Module],
        trained: Sequence[nn.Module],
        shared: Callable[[Batch, Draws], Mapping[str, Tensor]] | None = None,
    ) -> Update:
        """The same as a step runs it."""

        def loss(batch: Batch, draws: Draws) -> Terms:
            return checked_terms(f"the loss of updates[{name!r}]", self.loss(with_shared(batch, draws, shared), draws))

        def draws(batch: Batch) -> Mapping[str, Draw]:
            return {} if self.draws is None else self.draws(len(next(iter(batch.values()))))

        names = ("clip", "clip_grad_norm", "clip_grad_value", "accumulate", "scaler", "ema", "lazy")
        options = {key: getattr(self, key) for key in names}
        owner = {"loss": self.loss, "draws": self.draws, "shared": shared}
        return Update(name, networks, trained, loss, draws, self.optimizer, owner=owner, **options)


class _Step:
    """One update: eager, or captured from the first call on if that is possible."""

    def __init__(self, owner: TrainStep, update: Update | JointUpdate) -> None:
        self._owner, self._update = owner, update
        self._graphs: list[CapturedUpdate] = []
        self._missed: Fit | None = None
        self._is_eager = owner.mode == "eager"
        self._counts: list[int] = []  # samples of each process
        self._described: tuple[list[int], list[str]] = [], []

    def share(self, batch: Batch) -> None:
        """Learn the size of each process's part, which draws before the call need."""
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


def _started(scaler: GradScaler | None, device: torch.device) -> GradScaler | None:
    """The scaler with its tensors on ``device``, None if it is disabled."""
    if scaler is None or not scaler.is_enabled():
        return None
    scaler.scale(torch.zeros((), device=device))  # makes them
    return scaler


def _checked_world(world: World | dist.ProcessGroup | None) -> World:
    if world is None:
        return current_world()
    if not isinstance(world, World):
        return current_world(world)
    if world != current_world(world.group):
        raise ValueError(f"world must be a process group or its current_world(), got {world}")
    return world


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, networks: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` unless the optimizer holds weights of these networks, and no others."""
    weights = {id(p) for network in networks.values() for p in network.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    of = " and the ".join(networks)
    if not any(id(p) in weights for p in held):
        raise ValueError(f"{name} must hold weights of the {of}, it has none of them")
    if others := [tuple(p.shape) for p in held if id(p) not in weights]:
        raise ValueError(
            f"{name} must hold weights of the {of} alone, it has {len(others)} others, of shapes "
            f"{', '.join(map(str, others[:4]))}: TrainStep.of_updates trains more networks"
        )
