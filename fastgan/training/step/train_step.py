"""Train steps that run eagerly, as one compiled graph each, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.backend import warn_once
from fastgan.distributed import World, current_world
from fastgan.losses.noise import draw
from fastgan.training.ema import EMA
from fastgan.training.gan import GAN, Batch, Draws, Terms
from fastgan.training.step.capture import CapturedUpdate
from fastgan.training.step.eager import Update
from fastgan.training.step.optimizers import CaptureError
from fastgan.training.step.process_mean import ProcessMean, broadcast_

MODES = ("eager", "compile", "cudagraph")


class TrainStep:
    """Discriminator and generator updates of a GAN.

    A captured update is one graph: forward, gradient penalty with its double backward, backward, optimizer, clipping,
    moving average, spectral-norm and batch-norm buffers. It updates the same tensors that the networks, optimizers and
    average hold, so these can be used, saved and loaded between steps as usual, and a run may move between modes. The
    graph is made at the first call. Learning rates may change at each call.

    A graph serves one shape, dtype and layout of batches, and the optimizer options, modules' train or eval modes and
    frozen weights that it was made with. Any other call, such as an odd last batch, runs eagerly, with the same result
    and one warning. A step that cannot be captured also runs eagerly, with one
    :class:`fastgan.backend.BackendWarning` that names the reason. Weights that a loss does not reach are left alone.

    Processes of a ``torch.distributed`` group share a batch: each gives its part, all parts of one size, and gets the
    update and the losses of the whole. Gradients, running statistics and singular vectors are averaged between two
    graphs, so weights, buffers, optimizers and averages stay equal in all processes. Noise is drawn for the whole
    batch, and each process takes its part. The numbers are those of one process with the whole batch, except for batch
    norm, which normalizes each part by itself.

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
        optimizer_d: of the discriminator.
        mode: "eager"; "compile", captured and compiled; or "cudagraph", that and replayed as a CUDA graph.
        backend: the compiler, a backend of ``torch.compile``.
        ema: average of the generator that moves after each of its updates.
        clip: bound of the discriminator's weights after each of its updates; 0 for none.
        rng: generator that the draws of the losses come from, in all modes alike; None for the device's default one.
            Modules that draw by themselves (dropout) use the default one, when compiled in an order of their own.
            Processes that share a batch seed it alike.
        world: processes that share the batches; None for those of the default process group, if it is initialized.
            They begin with the weights and averages of the first.

    Attributes:
        compilations: graphs compiled so far: 1 per network after its first step, 2 if processes share a batch.

    Raises:
        ValueError: an unknown mode, or an optimizer that has none of its network's weights.
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
        world: World | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if clip < 0:
            raise ValueError(f"clip must be at least 0, got {clip}")
        _check_optimizer("optimizer_g", optimizer_g, "generator", gan.generator)
        _check_optimizer("optimizer_d", optimizer_d, "discriminator", gan.discriminator)
        self.gan, self.mode, self.backend, self.ema = gan, mode, backend, ema
        self.compilations = 0
        self.device = next(gan.generator.parameters()).device
        self.rng = rng
        self.world = current_world() if world is None else world
        self._pool: Any = None
        mean = ProcessMean(self.world) if self.world.size > 1 else None
        networks = [tensor for m in (gan.generator, gan.discriminator) for tensor in (*m.parameters(), *m.buffers())]
        broadcast_([*networks, *(ema.tensors() if ema else ())], self.world)
        self._discriminator = _Step(self, Update(gan, "discriminator", optimizer_d, clip=clip, mean=mean))
        self._generator = _Step(self, Update(gan, "generator", optimizer_g, ema=ema, mean=mean))

    def discriminator(self, batch: Batch) -> Terms:
        """Update the discriminator once. Returns the terms of its loss, detached scalars on the device."""
        return self._discriminator(batch)

    def generator(self, batch: Batch) -> Terms:
        """Update the generator once, with as many images as ``batch`` has. Returns the terms of its loss."""
        return self._generator(batch)

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


class _Step:
    """Update of one network: eager, or captured from the first call on if that is possible."""

    def __init__(self, owner: TrainStep, update: Update) -> None:
        self._owner, self._update = owner, update
        self._captured: CapturedUpdate | None = None
        self._is_eager = owner.mode == "eager"

    def __call__(self, batch: Batch) -> Terms:
        if not isinstance(batch, Mapping) or not batch:
            raise TypeError(f"batch must be a mapping of names to tensors, got {type(batch).__name__}")
        owner, name = self._owner, self._update.name
        if not self._is_eager and self._captured is None:
            self._capture(batch)
        if self._captured is None:
            return self._update(batch, self._draws(batch))
        if not self._captured.fits(batch):
            warn_once(
                f"a {name} step runs eagerly: its batch, optimiser options, module modes or frozen weights are "
                "not those that it was captured with"
            )
            return self._update(batch, self._draws(batch))
        if owner.mode == "compile":
            return self._captured(batch, self._draws(batch))
        try:
            replay = self._captured.capture_replay(batch, self._draws, owner.device_rng(), owner.graph_pool())
        except Exception as error:  # whatever warm-up or capture may raise: both leave the state as it was
            self._give_up(error)
            return self._update(batch, self._draws(batch))
        return replay(batch)

    def _draws(self, batch: Batch, rng: torch.Generator | None = None) -> Draws:
        """Random numbers of the loss, from ``rng`` or else the run's generator."""
        owner, world, n = self._owner, self._owner.world, len(next(iter(batch.values())))
        rng = owner.rng if rng is None else rng
        return draw(self._update.draws(batch), rng, owner.device, n=n, rank=world.rank, parts=world.size)

    def _capture(self, batch: Batch) -> None:
        owner = self._owner
        try:
            if owner.mode == "cudagraph" and owner.device.type != "cuda":
                raise CaptureError(f"CUDA graphs need a CUDA device, the generator is on {owner.device}")
            # From a generator of their own, so that no random number of the run is used up.
            example = self._draws(batch, torch.Generator(owner.device))
            self._captured = CapturedUpdate(self._update, batch, example, owner.compile)
        except Exception as error:  # whatever tracing and compilers may raise: an eager step needs none of it
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._is_eager, self._captured = True, None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warn_once(f"the {self._update.name} step runs eagerly: {reason}")


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, of: str, network: nn.Module) -> None:
    weights = {id(p) for p in network.parameters()}
    if not any(id(p) in weights for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{name} must hold weights of the {of}, it has none of them")
