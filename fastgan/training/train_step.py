"""Train steps that run eagerly, as one compiled graph each, or as CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.backend import warn_once
from fastgan.draws import Draw, draw
from fastgan.training.capture import Update
from fastgan.training.cuda_graphs import CudaGraph
from fastgan.training.ema import EMA
from fastgan.training.gan import Batch, Draws, Gan, Terms
from fastgan.training.optimizer_state import CaptureError
from fastgan.training.step import discriminator_step, generator_step

MODES = ("eager", "compile", "cudagraph")


class TrainStep:
    """Discriminator and generator updates of a GAN.

    Captured, an update is one graph of its own: forward, gradient penalty with its double backward, backward,
    optimiser, clipping, moving average, spectral-norm and batch-norm buffers. It updates the same tensors that the
    networks, optimisers and average hold: those can be used, saved and loaded between steps as ever, and a run may move
    between modes. The graph is made at the first call; learning rates may change at each.

    A graph serves batches of one shape, dtype and layout, and the optimiser options and train or eval mode of modules
    that it was made with. Any other call - an odd last batch - runs eagerly, with the same result and one warning. What
    cannot be captured runs eagerly too, with one :class:`fastgan.backend.BackendWarning` that names the reason.

    Args:
        gan: networks and losses, as :class:`OwnGan` makes of any two modules.
        optimizer_g: of the generator: for a captured step Adam, AdamW, RMSprop, or SGD without dampening.
        optimizer_d: of the discriminator.
        mode: "eager"; "compile", by ``torch.compile``; or "cudagraph", that and replayed as a CUDA graph.
        backend: of ``torch.compile``.
        ema: average of the generator that moves after each of its updates.
        clip: bound of the discriminator's weights after each of its updates; 0 for none.
        rng: generator that the draws of the losses come from, in all modes alike; None for the device's default one.
            What modules draw by themselves (dropout) comes from the default one, compiled in an order of its own.

    Attributes:
        compilations: graphs compiled so far: 1 a network, after its first step.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        gan: Gan,
        optimizer_g: torch.optim.Optimizer,
        optimizer_d: torch.optim.Optimizer,
        *,
        mode: str = "eager",
        backend: str = "inductor",
        ema: EMA | None = None,
        clip: float = 0.0,
        rng: torch.Generator | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if clip < 0:
            raise ValueError(f"clip must be at least 0, got {clip}")
        self.gan, self.mode, self.backend = gan, mode, backend
        self.compilations = 0
        self.device = next(gan.generator.parameters()).device
        self.rng = rng
        self._pool: Any = None
        self._discriminator = _Step(
            self,
            "discriminator",
            functools.partial(discriminator_step, gan, optimizer_d, clip=clip),
            functools.partial(Update, gan, "discriminator", optimizer_d, clip=clip),
        )
        self._generator = _Step(
            self,
            "generator",
            functools.partial(generator_step, gan, optimizer_g, ema=ema),
            functools.partial(Update, gan, "generator", optimizer_g, ema=ema),
        )

    def discriminator(self, batch: Batch) -> Terms:
        """Update the discriminator once. Returns the terms of its loss, detached scalars on the device."""
        return self._discriminator(batch)

    def generator(self, batch: Batch) -> Terms:
        """Update the generator once, with as many images as ``batch`` has. Returns the terms of its loss."""
        return self._generator(batch)

    def compile(self, graph: torch.fx.GraphModule) -> Callable[..., Any]:
        """``torch.compile`` of a captured graph; counts."""
        compiler = torch._dynamo.lookup_backend(self.backend)

        def counted(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            compiled = compiler(module, inputs)
            self.compilations += 1
            return compiled

        return torch.compile(graph, backend=counted, fullgraph=True, dynamic=False)

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
    """Update of one network: eager, and captured from the first call on where it can be."""

    def __init__(
        self,
        owner: TrainStep,
        name: str,
        eager: Callable[[Batch, Draws], Terms],
        make_update: Callable[[], Update],
    ) -> None:
        self.owner, self.name, self._eager, self._make_update = owner, name, eager, make_update
        self._captured: _Captured | None = None
        self._is_eager = owner.mode == "eager"

    def __call__(self, batch: Batch) -> Terms:
        if not self._is_eager and self._captured is None:
            self._capture(batch)
        if self._captured is None or not self._captured.fits(batch):
            return self._eager(batch, self.draws(batch))
        if self.owner.mode == "cudagraph":
            return self._replay(self._captured, batch)
        draws = self.draws(batch)
        try:
            return self._captured(batch, draws)
        except Exception as error:
            if not _failed_to_compile(error):
                raise
            self._give_up(error)  # torch.compile compiles at the first call, before anything is updated
            return self._eager(batch, draws)

    def _replay(self, captured: _Captured, batch: Batch) -> Terms:
        try:
            graph = captured.cuda_graph(batch)
        except Exception as error:  # whatever warm-up or capture may raise: both leave the state as it was
            self._give_up(error)
            return self._eager(batch, self.draws(batch))
        return graph(batch)

    def draws(self, batch: Batch) -> Draws:
        return draw(self._specs(batch), self.owner.rng, self.owner.device)

    def example_draws(self, batch: Batch) -> Draws:
        """Like :meth:`draws`, and no random number of the run is used up."""
        return draw(self._specs(batch), torch.Generator(self.owner.device), self.owner.device)

    def _specs(self, batch: Batch) -> Mapping[str, Draw]:
        gan = self.owner.gan
        return (gan.discriminator_draws if self.name == "discriminator" else gan.generator_draws)(batch)

    def _capture(self, batch: Batch) -> None:
        try:
            if self.owner.mode == "cudagraph" and self.owner.device.type != "cuda":
                raise CaptureError(f"CUDA graphs need a CUDA device, the generator is on {self.owner.device}")
            self._captured = _Captured(self, self._make_update(), batch)
        except Exception as error:  # whatever tracing may raise: an eager step needs none of it
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._is_eager, self._captured = True, None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warn_once(f"the {self.name} step runs eagerly: {reason}")


def _failed_to_compile(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # takes long to import

    return isinstance(error, TorchDynamoException)


class _Captured:
    """A captured update and what it was captured for."""

    def __init__(self, step: _Step, update: Update, batch: Batch) -> None:
        self._step, self._update = step, update
        networks = (update.gan.generator, update.gan.discriminator)
        self._modules = [module for network in networks for module in network.modules()]
        graph, self._names = update.trace(batch, step.example_draws(batch))
        self._compiled = step.owner.compile(graph)
        self._key = self._key_of(batch)
        self._replay: CudaGraph | None = None

    def fits(self, batch: Batch) -> bool:
        if self._key_of(batch) == self._key:
            return True
        warn_once(
            f"a {self._step.name} step runs eagerly: its batch, optimiser options or module modes are not those that "
            "it was captured with"
        )
        return False

    def __call__(self, batch: Batch, draws: Draws) -> Terms:
        self._update.optimizer.refresh()
        return self._run(self._update.tensors(), batch, draws)

    def cuda_graph(self, batch: Batch) -> CudaGraph:
        """The same as a CUDA graph, the draws in it; made anew where state tensors have been replaced."""
        self._update.optimizer.refresh()
        tensors = self._update.tensors()
        if self._replay is None or not all(a is b for a, b in zip(tensors, self._replay.tensors, strict=True)):
            owner = self._step.owner
            self._replay = CudaGraph(
                lambda batch: self._run(tensors, batch, self._step.draws(batch)),
                batch,
                tensors,
                owner.device_rng(),
                owner.graph_pool(),
            )
        return self._replay

    def _run(self, tensors: Sequence[Tensor], batch: Batch, draws: Draws) -> Terms:
        with torch.no_grad():
            terms = self._compiled(tensors, dict(batch), draws)
        return dict(zip(self._names, terms, strict=True))

    def _key_of(self, batch: Batch) -> tuple[Any, ...]:
        shapes = tuple((name, tuple(t.shape), t.stride(), t.dtype, t.device) for name, t in batch.items())
        modes = tuple(module.training for module in self._modules)
        return shapes, modes, self._update.optimizer.options()


class OwnGan:
    """A :class:`Gan` of any two modules and two loss functions, to be given to :class:`TrainStep`.

    Args:
        generator, discriminator: modules; each loss is minimised in the weights of its own.
        discriminator_loss: ``(batch, draws)`` -> a scalar, or a dict of scalars of which the sum is the loss. It calls
            the modules; like all that is captured, it branches on no tensor's value.
        generator_loss: likewise.
        draws: from the number of images in a batch to the random numbers that the losses need, by name
            (:func:`fastgan.draws.normal` and its kin); both losses get them, drawn anew.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        discriminator_loss: Callable[[Batch, Draws], Tensor | Terms],
        generator_loss: Callable[[Batch, Draws], Tensor | Terms],
        draws: Callable[[int], Mapping[str, Draw]],
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self._discriminator_loss, self._generator_loss, self._draws = discriminator_loss, generator_loss, draws

    def discriminator_draws(self, batch: Batch) -> dict[str, Draw]:
        return dict(self._draws(len(next(iter(batch.values())))))

    def generator_draws(self, batch: Batch) -> dict[str, Draw]:
        return self.discriminator_draws(batch)

    def discriminator_loss(self, batch: Batch, draws: Draws) -> Terms:
        return _terms(self._discriminator_loss(batch, draws))

    def generator_loss(self, batch: Batch, draws: Draws) -> Terms:
        return _terms(self._generator_loss(batch, draws))


def _terms(loss: Tensor | Terms) -> Terms:
    return {"loss": loss} if isinstance(loss, Tensor) else loss
