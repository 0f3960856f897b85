"""Train steps that run eagerly, as one compiled graph each, or as CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.backend import warn_once
from fastgan.distributed import World, current_world
from fastgan.losses.noise import Draw, draw
from fastgan.training.ema import EMA
from fastgan.training.gan import Batch, Draws, Gan, Terms
from fastgan.training.step.capture import Update
from fastgan.training.step.cuda_graphs import CudaGraph
from fastgan.training.step.eager import discriminator_step, generator_step
from fastgan.training.step.optimizer_state import CaptureError
from fastgan.training.step.process_mean import ProcessMean, broadcast_

MODES = ("eager", "compile", "cudagraph")


class TrainStep:
    """Discriminator and generator updates of a GAN.

    Captured, an update is one graph of its own: forward, gradient penalty with its double backward, backward,
    optimiser, clipping, moving average, spectral-norm and batch-norm buffers. It updates the same tensors that the
    networks, optimisers and average hold: those can be used, saved and loaded between steps as ever, and a run may move
    between modes. The graph is made at the first call; learning rates may change at each.

    A graph serves batches of one shape, dtype and layout, and the optimiser options, train or eval mode of modules and
    frozen weights that it was made with. Any other call - an odd last batch - runs eagerly, with the same result and
    one warning. What cannot be captured runs eagerly too, with one :class:`fastgan.backend.BackendWarning` that names
    the reason. Weights that a loss does not reach are left alone.

    Processes of a ``torch.distributed`` group share a batch: each gives its part, all parts of one size, and gets the
    update and the losses of the whole. Gradients are averaged between two graphs, and with them running statistics and
    singular vectors, so that weights, buffers, optimisers and averages stay equal in all. Noise is drawn for the whole
    batch, of which each takes its part: the numbers are those of one process with the whole batch, but for batch norm,
    which normalises each part by itself.

    In a loop of one's own, with modules ``g`` and ``d`` and their optimisers::

        def d_loss(batch, draws):
            return softplus(d(g(draws["z"]).detach())).mean() + softplus(-d(batch["images"])).mean()

        def g_loss(batch, draws):
            return softplus(-d(g(draws["z"]))).mean()

        gan = OwnGan(g, d, d_loss, g_loss, lambda n: {"z": normal(n, 128)})
        step = TrainStep(gan, optimizer_g, optimizer_d, mode="compile")
        for images in loader:
            losses = step.discriminator({"images": images}) | step.generator({"images": images})

    Args:
        gan: networks and losses, as :class:`OwnGan` makes of any two modules.
        optimizer_g: of the generator: for a captured step Adam, AdamW, RMSprop, or SGD without dampening.
        optimizer_d: of the discriminator.
        mode: "eager"; "compile", captured and compiled; or "cudagraph", that and replayed as a CUDA graph.
        backend: the compiler, a backend of ``torch.compile``.
        ema: average of the generator that moves after each of its updates.
        clip: bound of the discriminator's weights after each of its updates; 0 for none.
        rng: generator that the draws of the losses come from, in all modes alike; None for the device's default one.
            What modules draw by themselves (dropout) comes from the default one, compiled in an order of its own.
            Processes that share a batch seed it alike.
        world: processes that share the batches; None for those of the default process group, where it is initialised.
            They begin with the weights and averages of the first.

    Attributes:
        compilations: graphs compiled so far: 1 a network after its first step, 2 where processes share a batch.

    Raises:
        ValueError: an unknown mode, or an optimiser that has none of its network's weights.
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
        broadcast_(
            [*_tensors(gan.generator), *_tensors(gan.discriminator), *(ema.tensors() if ema else ())], self.world
        )
        self._discriminator = _Step(
            self,
            "discriminator",
            functools.partial(discriminator_step, gan, optimizer_d, clip=clip, mean=mean),
            functools.partial(Update, gan, "discriminator", optimizer_d, clip=clip, mean=mean),
        )
        self._generator = _Step(
            self,
            "generator",
            functools.partial(generator_step, gan, optimizer_g, ema=ema, mean=mean),
            functools.partial(Update, gan, "generator", optimizer_g, ema=ema, mean=mean),
        )

    def discriminator(self, batch: Batch) -> Terms:
        """Update the discriminator once. Returns the terms of its loss, detached scalars on the device."""
        return self._discriminator(batch)

    def generator(self, batch: Batch) -> Terms:
        """Update the generator once, with as many images as ``batch`` has. Returns the terms of its loss."""
        return self._generator(batch)

    @torch.no_grad()
    def compile(self, graph: torch.fx.GraphModule, arguments: list[Tensor]) -> Callable[..., Any]:
        """``graph`` compiled for arguments like these by the backend of ``torch.compile``; counts.

        Dynamo, which would trace it again and guard hundreds of tensors at each call, has nothing to find in it.
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
        if not isinstance(batch, Mapping) or not batch:
            raise TypeError(f"batch must be a mapping of names to tensors, got {type(batch).__name__}")
        if not self._is_eager and self._captured is None:
            self._capture(batch)
        if self._captured is None or not self._captured.fits(batch):
            return self._eager(batch, self.draws(batch))
        if self.owner.mode == "compile":
            return self._captured(batch, self.draws(batch))
        try:
            replay = self._captured.replay_for(batch)
        except Exception as error:  # whatever warm-up or capture may raise: both leave the state as it was
            self._give_up(error)
            return self._eager(batch, self.draws(batch))
        return replay(batch)

    def draws(self, batch: Batch) -> Draws:
        return self._drawn(batch, self.owner.rng)

    def example_draws(self, batch: Batch) -> Draws:
        """Like :meth:`draws`, and no random number of the run is used up."""
        return self._drawn(batch, torch.Generator(self.owner.device))

    def _drawn(self, batch: Batch, rng: torch.Generator | None) -> Draws:
        gan, world = self.owner.gan, self.owner.world
        specs = (gan.discriminator_draws if self.name == "discriminator" else gan.generator_draws)(batch)
        n = len(next(iter(batch.values())))
        return draw(specs, rng, self.owner.device, n=n, rank=world.rank, parts=world.size)

    def _capture(self, batch: Batch) -> None:
        try:
            if self.owner.mode == "cudagraph" and self.owner.device.type != "cuda":
                raise CaptureError(f"CUDA graphs need a CUDA device, the generator is on {self.owner.device}")
            self._captured = _Captured(self, self._make_update(), batch)
        except Exception as error:  # whatever tracing and compilers may raise: an eager step needs none of it
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._is_eager, self._captured = True, None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warn_once(f"the {self.name} step runs eagerly: {reason}")


class _Captured:
    """A captured update and what it was captured for."""

    def __init__(self, step: _Step, update: Update, batch: Batch) -> None:
        self._step, self._update = step, update
        networks = (update.gan.generator, update.gan.discriminator)
        self._modules = [module for network in networks for module in network.modules()]
        self._weights = list(update.network.parameters())
        traced = update.trace(batch, step.example_draws(batch))
        compile_graph, self._names = step.owner.compile, traced.names
        self._first = compile_graph(traced.graph, traced.arguments)
        self._second = compile_graph(traced.second, traced.second_arguments) if traced.second else None
        self._key = self._key_of(batch)
        self._replay: _Replay | None = None

    def fits(self, batch: Batch) -> bool:
        if self._key_of(batch) == self._key:
            return True
        warn_once(
            f"a {self._step.name} step runs eagerly: its batch, optimiser options, module modes or frozen weights are "
            "not those that it was captured with"
        )
        return False

    def __call__(self, batch: Batch, draws: Draws) -> Terms:
        tensors = self.refreshed_state()
        outputs = self.first(tensors, batch, draws)
        if self._second is not None:
            self.reduce_(outputs)
            outputs = self.second(tensors, outputs)
        return self.named(outputs)

    def replay_for(self, batch: Batch) -> _Replay:
        """The same as CUDA graphs, the draws in them; made anew where state tensors have been replaced."""
        tensors = self.refreshed_state()
        if self._replay is None or not all(a is b for a, b in zip(tensors, self._replay.state, strict=True)):
            self._replay = None  # its memory goes back to the pool first
            self._replay = _Replay(self, self._step, batch, tensors)
        return self._replay

    def refreshed_state(self) -> list[Tensor]:
        self._update.optimizer.refresh()
        return self._update.tensors()

    @torch.no_grad()
    def first(self, tensors: Sequence[Tensor], batch: Batch, draws: Draws) -> list[Tensor]:
        return list(self._first(*tensors, *batch.values(), *draws.values()))

    @property
    def exchanges(self) -> bool:
        """Whether processes exchange buckets between a first and a second graph."""
        return self._second is not None

    def reduce_(self, buckets: Sequence[Tensor]) -> None:
        assert self._update.mean is not None
        self._update.mean.reduce_(buckets)

    @torch.no_grad()
    def second(self, tensors: Sequence[Tensor], buckets: Sequence[Tensor]) -> list[Tensor]:
        assert self._second is not None
        return list(self._second(*tensors, *buckets))

    def named(self, outputs: Sequence[Tensor]) -> Terms:
        return dict(zip(self._names, outputs, strict=True))

    def _key_of(self, batch: Batch) -> tuple[Any, ...]:
        shapes = tuple((name, tuple(t.shape), t.stride(), t.dtype, t.device) for name, t in batch.items())
        modes = tuple([module.training for module in self._modules])
        trained = tuple([weight.requires_grad for weight in self._weights])
        return shapes, modes, trained, self._update.optimizer.options()


class _Replay:
    """A captured update as one CUDA graph, or as two with the exchange between processes outside of them."""

    def __init__(self, captured: _Captured, step: _Step, batch: Batch, state: list[Tensor]) -> None:
        self._captured, self.state = captured, state
        rng, pool = step.owner.device_rng(), step.owner.graph_pool()
        self._first = CudaGraph(lambda batch: captured.first(state, batch, step.draws(batch)), batch, state, rng, pool)
        self._second: CudaGraph | None = None
        if captured.exchanges:
            buckets = self._first.outputs
            self._second = CudaGraph(lambda _: captured.second(state, buckets), {}, state, rng, pool)

    def __call__(self, batch: Batch) -> Terms:
        outputs = self._first(batch)
        if self._second is not None:
            self._captured.reduce_(outputs)
            outputs = self._second({})
        return self._captured.named([output.clone() for output in outputs])


class OwnGan:
    """A :class:`Gan` of any two modules and two loss functions, to be given to :class:`TrainStep`.

    Args:
        generator, discriminator: modules; each loss is minimised in the weights of its own.
        discriminator_loss: ``(batch, draws)`` -> a scalar, or a dict of scalars of which the sum is the loss. It calls
            the modules; like all that is captured, it branches on no tensor's value.
        generator_loss: likewise.
        draws: from the number of images in a batch to the random numbers that the losses need, by name
            (:func:`fastgan.losses.noise.normal` and its kin); both losses get them, drawn anew.
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
        return _terms("discriminator_loss", self._discriminator_loss(batch, draws))

    def generator_loss(self, batch: Batch, draws: Draws) -> Terms:
        return _terms("generator_loss", self._generator_loss(batch, draws))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _terms(name: str, loss: Tensor | Terms) -> Terms:
    terms = {"loss": loss} if isinstance(loss, Tensor) else loss
    for key, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim:
            got = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise ValueError(f"{name} must return scalar tensors, got {got} for {key!r}")
    return terms


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, of: str, network: nn.Module) -> None:
    weights = {id(p) for p in network.parameters()}
    if not any(id(p) in weights for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{name} must hold weights of the {of}, it has none of them")
