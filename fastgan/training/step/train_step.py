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

from fastgan.distributed import World, current_world
from fastgan.losses.noise import Draw
from fastgan.training.ema import EMA
from fastgan.training.gan import GAN, Batch, Draws, Terms, checked_terms, with_shared
from fastgan.training.step.eager import JointUpdate, LazyTerm, Update
from fastgan.training.step.process_mean import ProcessMean, broadcast_, broadcast_optimizer_
from fastgan.training.step.runner import UpdateRunner

MODES = ("eager", "compile", "cudagraph")


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
    :data:`fastgan.training.step.runner.MOST_GRAPHS` of them. Weights that a loss does not reach are left alone.

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
        self._steps: dict[tuple[tuple[str, tuple[str, ...]], ...], UpdateRunner] = {}
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

    def _next(self, *names: str) -> UpdateRunner:
        """The next call of one update, or of several together, with the lazy terms that they have."""
        for name in names:
            if name not in self._updates:
                raise ValueError(f"name must be one of {', '.join(map(repr, self._updates))}, got {name!r}")
        key = tuple((name, self._updates[name].at(self.counts[name])) for name in names)
        if key not in self._steps:
            parts = tuple(self._updates[name].with_lazy(lazy) for name, lazy in key)
            update = parts[0] if self._shared is None or len(parts) == 1 else JointUpdate(parts, self._shared)
            self._steps[key] = UpdateRunner(self, update)
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
        raise ValueError(f"{name} must hold weights of the {of}, it holds none")
    if others := [tuple(p.shape) for p in held if id(p) not in weights]:
        raise ValueError(
            f"{name} must hold weights of the {of} alone, it has {len(others)} others, of shapes "
            f"{', '.join(map(str, others[:4]))}: TrainStep.of_updates trains more networks"
        )
