"""Training loop: alternating discriminator and generator updates, moving average, loss history, callbacks."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Dataset

from fastgan._progress import progress_bar
from fastgan.data import DeviceLoader, LabeledImages, StreamLoader
from fastgan.data.images import mostly_color
from fastgan.data.loader import part_size
from fastgan.distributed import World, current_world
from fastgan.recipes.schema import DataConfig, TrainConfig
from fastgan.training.ema import EMA
from fastgan.training.finite import first_non_finite
from fastgan.training.gan import Batch, Objective, RecipeGAN, Terms, total
from fastgan.training.step.eager import LazyTerm
from fastgan.training.step.optimizers import make_optimizer
from fastgan.training.step.train_step import TrainStep

if TYPE_CHECKING:
    from rich.progress import Progress

FLUSH_INTERVAL = 10


class NonFiniteLossError(FloatingPointError):
    """A loss became infinite or not a number.

    Attributes:
        step: the first such step, counted from 1.
        where: the first tensor that was not finite, "" if it was not found.
    """

    def __init__(self, step: int, discriminator: float, generator: float, where: str = "") -> None:
        first = f"; first {where}" if where else ""
        super().__init__(
            f"loss is not finite at step {step}: discriminator {discriminator}, generator {generator}{first}"
        )
        self.step, self.losses, self.where = step, (discriminator, generator), where


@dataclass
class History:
    """Losses of each step so far; for the discriminator the mean over its ``n_critic`` updates.

    Example:
        >>> len(History([0.5, 0.4], [1.0, 1.1]))
        2
    """

    discriminator: list[float] = field(default_factory=list)
    generator: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.generator)


class Callback:
    """Base class of a run's observers; override any method. ``trainer.step`` is the number of steps done.

    Example:
        >>> class Print(Callback):
        ...     def on_losses(self, trainer, rows):
        ...         print(trainer.step, rows[-1])
    """

    def on_start(self, trainer: Trainer, steps: int) -> None:
        """Before the first of ``steps`` steps."""

    def on_step(self, trainer: Trainer) -> None:
        """After each step. Losses reach ``trainer.history`` with a delay, as reading them stalls a GPU."""

    def on_losses(self, trainer: Trainer, rows: list[dict[str, float]]) -> None:
        """After losses have been read: one mapping per step since the last call, up to ``trainer.step``, with
        "discriminator", "generator", and their terms as "discriminator/adversarial" and so on."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or after an error, once :meth:`on_start` was called."""


class Trainer:
    """Trains a GAN on one device or several.

    Several processes take equal parts of each batch and do the same number of steps; see :class:`TrainStep`.

    Args:
        generator: called as ``generator(z, labels)`` or ``generator(sketches, labels)``; has ``n_classes`` and
            ``dim_z`` like :class:`fastgan.models.Generator`.
        discriminator: called as ``discriminator(images, labels)``, returns logits, or logits and class logits.
        data: real images, kept on ``device`` if ``images.on_device``; or any dataset, loader or iterable of batches, as
            :class:`fastgan.data.StreamLoader` takes them: each process then reads its own part, and a resumed run
            begins its data anew.
        config: learning rates, batch size, loss and the rest.
        images: flips, noise and sketches of the batches.
        device: where to train; both networks are moved there.
        world: the processes; None for the default process group's, if it is initialized.

    Attributes:
        gan: the networks and losses, a :class:`fastgan.training.GAN`.
        steps: both updates, eager or captured as ``config.step_mode`` says.
        discriminator_step, generator_step: those of ``steps``, from a batch to the terms of the loss. The generator's
            also moves the average.
        ema: moving average of the generator; ``ema.module`` is the network to sample from.
        history: losses so far.
        step: generator updates done.
        stop_requested: set this to end :meth:`run` after the current step. If one of several processes sets it, all end
            together within the next :data:`FLUSH_INTERVAL` steps.
        stop_signal: number of the signal that requested the stop, the same in all processes; 0 for none.

    Raises:
        ValueError: the networks and the data disagree in classes, the configuration names something unknown, or the
            batch size is not divisible by the number of processes.

    Example:
        >>> recipe = override(load_recipe("sagan-quick-digits"), ["steps=1", "batch_size=4"])
        >>> data, held_out = digits(32)
        >>> networks = build_networks(recipe.model, data.n_classes, image_channels=1)
        >>> trainer = Trainer(*networks, data, recipe.train)
        >>> len(trainer.run())
        1
    """

    discriminator_step: Callable[[Batch], Terms]
    generator_step: Callable[[Batch], Terms]

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        data: LabeledImages | Dataset[Any] | Iterable[Any],
        config: TrainConfig,
        *,
        images: DataConfig | None = None,
        device: torch.device | str = "cpu",
        world: World | None = None,
    ) -> None:
        self.world = current_world() if world is None else world
        if isinstance(data, LabeledImages):
            if data.images.is_floating_point():
                least, most = data.images.aminmax()
                if not (least >= -1 and most <= 1):
                    raise ValueError(f"images must be in [-1, 1], got [{float(least):.4g}, {float(most):.4g}]")
            for name, network in (("generator", generator), ("discriminator", discriminator)):
                if network.n_classes not in (0, data.n_classes):
                    raise ValueError(f"{name} must have the data's {data.n_classes} classes, got {network.n_classes}")
        objective = Objective.of(config)
        images = DataConfig() if images is None else images
        self.config = config
        self.device = torch.device(device)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.generator = generator.to(self.device).to(memory_format=self.layout).train()
        self.discriminator = discriminator.to(self.device).to(memory_format=self.layout).train()
        autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        self.gan = RecipeGAN(self.generator, self.discriminator, objective, autocast=autocast)
        if self.gan.from_sketches and images.sketches == "none":
            raise ValueError("sketches must be 'edges', 'paired' or 'unpaired' for a generator that starts from them")
        if self.gan.sees_sketch and images.sketches == "unpaired":
            raise ValueError("sketches must be 'edges' or 'paired' for a discriminator that sees them, got 'unpaired'")
        if config.pixel_weight and images.sketches == "unpaired":
            raise ValueError("pixel_weight must be 0 for unpaired sketches, which belong to no image")
        self.loader: DeviceLoader | StreamLoader
        if isinstance(data, LabeledImages):
            self.loader = DeviceLoader(
                data.to(self.device) if images.on_device else data,
                config.batch_size,
                seed=config.seed,
                flip=mostly_color(data.images) if images.flip is None else images.flip,
                dequantize=images.dequantize,
                sketches=images.sketches,
                device=self.device,
                rank=self.world.rank,
                parts=self.world.size,
            )
        else:
            if images.flip or images.dequantize or images.sketches == "edges":
                raise ValueError("images.flip, dequantize and sketches 'edges' need LabeledImages: transform the data")
            self.loader = StreamLoader(
                data,
                part_size(config.batch_size, self.world.size),
                n_classes=max(int(getattr(m, "n_classes", 0)) for m in (generator, discriminator)),
                device=self.device,
                seed=config.seed + self.world.rank,
            )
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        self.ema = EMA(self.generator, config.ema_decay)
        self.optimizer_g = make_optimizer(self.generator, config.lr_generator, config)
        self.optimizer_d = make_optimizer(self.discriminator, config.lr_discriminator, config)
        mode = config.step_mode
        if mode == "auto":
            mode = "compile" if self.device.type == "cuda" else "eager"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        lazy = {}
        if config.penalty_every > 1 and (config.r1 or config.r2):
            lazy["penalties"] = LazyTerm(self.gan.zero_centered_penalties, config.penalty_every)
        self.steps = TrainStep(
            self.gan,
            self.optimizer_g,
            self.optimizer_d,
            mode=mode,
            ema=self.ema,
            clip=config.clip,
            clip_grad_norm=config.clip_grad_norm or None,
            clip_grad_value=config.clip_grad_value or None,
            accumulate=config.accumulate,
            scaler=self.scaler,
            lazy={"discriminator": lazy},
            rng=self.rng,
            world=self.world,
        )
        self.discriminator_step, self.generator_step = self.steps.discriminator, self.steps.generator
        # Dropout draws from the default generators, which then belong to the state.
        self._draws_itself = any(
            isinstance(module, _DropoutNd) and module.p > 0
            for network in (self.generator, self.discriminator)
            for module in network.modules()
        )
        self.history = History()
        self.step = 0
        self.stop_requested = False
        self.stop_signal = 0
        self._callbacks: Sequence[Callback] = ()
        self._pending: list[dict[str, Tensor]] = []

    def run(self, steps: int | None = None, callbacks: Sequence[Callback] = ()) -> History:
        """Do ``steps`` more steps, by default up to ``config.steps``, or fewer if a stop is requested.

        With images in memory a single process keeps a copy of the state every :data:`FLUSH_INTERVAL` steps. If a loss
        is not finite, it repeats the steps since then, and is left in the state before the step of the error.

        Raises:
            NonFiniteLossError: a loss is infinite or not a number; it names the tensor that was first so.
        """
        steps = max(self.config.steps - self.step, 0) if steps is None else steps
        self._callbacks = callbacks
        started: list[Callback] = []
        repeatable = self.world.size == 1 and isinstance(self.loader, DeviceLoader)
        good = self._copied_state() if repeatable and steps else {}
        try:
            with self.world.agreed():
                for callback in callbacks:
                    started.append(callback)
                    with self._default_rng_kept():
                        callback.on_start(self, steps)
            for i in range(steps):
                if not self._pending and good and self.step - good["step"] >= FLUSH_INTERVAL:
                    good = self._copied_state()
                self.train_step()
                if len(self._pending) >= FLUSH_INTERVAL or i == steps - 1 or self.stop_requested:
                    self.flush()
                for callback in callbacks:
                    with self._default_rng_kept():
                        callback.on_step(self)
                if self._all_stop():
                    self.flush()
                    break
        except NonFiniteLossError as error:
            if not good:
                raise
            self._callbacks = ()
            raise NonFiniteLossError(error.step, *error.losses, self._go_back(good, error.step)) from None
        finally:
            for callback in started:
                callback.on_end(self)
            self._callbacks = ()
        return self.history

    def _copied_state(self) -> dict[str, Any]:
        """Copies of everything that decides the next step."""
        return copy.deepcopy(self._state())

    def _go_back(self, good: dict[str, Any], failed: int) -> str:
        """Return to the state before the step ``failed``, and name the tensor that was first not finite."""
        self._load(copy.deepcopy(good))  # an optimizer keeps the tensors that it loads
        try:
            while self.step < failed - 1:
                self.train_step()
                self.flush()
        except NonFiniteLossError:  # a step that is not deterministic may fail earlier
            self._load(good)
            return ""
        before = self._copied_state()
        where = first_non_finite(self)
        self._load(before)
        return where

    def train_step(self) -> None:
        """``n_critic`` discriminator updates and one generator update."""
        self._set_learning_rates()
        terms: list[Terms] = []
        if self.config.shared_fake:
            both = self.steps.both(self._next_batch())
            terms = [{name.partition("/")[2]: t for name, t in both.items() if name.startswith("discriminator/")}]
            terms_g = {name.partition("/")[2]: t for name, t in both.items() if name.startswith("generator/")}
        else:
            for _ in range(self.config.n_critic):
                batch = self._next_batch()
                terms.append(self.discriminator_step(batch))
            terms_g = self.generator_step(batch)
        self.step += 1
        # Lazy terms stand in some updates alone; zero in the others.
        means = {name: torch.stack([t[name] for t in terms if name in t]).sum() / len(terms) for name in _names(terms)}
        self._pending.append(
            {"discriminator": _loss(means), "generator": _loss(terms_g)}
            | {f"discriminator/{name}": term for name, term in means.items()}
            | {f"generator/{name}": term for name, term in terms_g.items()}
        )

    def _next_batch(self) -> Batch:
        return {
            name: value.contiguous(memory_format=self.layout) if value.ndim == 4 else value
            for name, value in self.loader.next().items()
        }

    def flush(self) -> None:
        """Read the losses of the last steps from the device and pass them to the callbacks.

        Raises:
            NonFiniteLossError: one is infinite or not a number; the history ends before it.
        """
        if not self._pending:
            return
        names, zero = _names(self._pending), torch.zeros((), device=self.device)
        values = torch.stack(
            [torch.stack([row.get(name, zero).float() for name in names]) for row in self._pending]
        ).tolist()
        first = self.step - len(values) + 1
        self._pending = []
        rows = []
        for step, row in enumerate(values, first):
            losses = dict(zip(names, row, strict=True))
            if not (math.isfinite(losses["discriminator"]) and math.isfinite(losses["generator"])):
                raise NonFiniteLossError(step, losses["discriminator"], losses["generator"])
            self.history.discriminator.append(losses["discriminator"])
            self.history.generator.append(losses["generator"])
            rows.append(losses)
        for callback in self._callbacks:
            callback.on_losses(self, rows)

    def _parts(self) -> dict[str, Any]:
        """Parts of the state that have a state dict of their own."""
        parts = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema.module,
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
            "loader": self.loader,
        }
        if self.gan.state:
            parts["state"] = self.gan.state
        if self.scaler.is_enabled():
            parts["scaler"] = self.scaler
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Return all state that the next step depends on, in tensors and numbers that need no pickle."""
        self.flush()
        return self._state() | {"history": asdict(self.history)}

    def _state(self) -> dict[str, Any]:
        state = {name: part.state_dict() for name, part in self._parts().items()} | {
            "step": self.step,
            "ema_updates": self.ema.updates,
            "rng": self.rng.get_state(),
        }
        if self._draws_itself:
            state["default_rng"] = self._default_rng()
        return state

    def _default_rng(self) -> Tensor:
        """State of the default generator that dropout draws from."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set_default_rng(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state.cpu(), self.device)
        else:
            torch.set_rng_state(state.cpu())

    @contextmanager
    def _default_rng_kept(self) -> Iterator[None]:
        """Let callbacks draw without an effect on dropout, so that a resumed run, which scores anew, stays the same."""
        before = self._default_rng() if self._draws_itself else None
        yield
        if before is not None:
            self._set_default_rng(before)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, bit for bit on the same device."""
        self._load(state)
        self.history = History(**{name: list(losses) for name, losses in state["history"].items()})

    def _load(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.steps.counts = {"discriminator": self.step * self.config.n_critic, "generator": self.step}
        self.ema.updates.copy_(state["ema_updates"])
        self.rng.set_state(state["rng"].cpu())
        if "default_rng" in state:
            self._set_default_rng(state["default_rng"])
        for losses in (self.history.discriminator, self.history.generator):
            del losses[self.step :]
        self._pending = []

    def _all_stop(self) -> bool:
        """Return whether to stop; all processes decide so at the same step."""
        if self.world.size == 1:
            return self.stop_requested
        if self.step % FLUSH_INTERVAL == 0:
            stops = self.world.gather((self.stop_requested, self.stop_signal))
            self.stop_requested = any(requested for requested, _ in stops)
            self.stop_signal = max(number for _, number in stops)
            return self.stop_requested
        return False

    def _set_learning_rates(self) -> None:
        config = self.config
        start = config.decay_from * config.steps
        decaying = start < config.steps and self.step > start
        factor = max(config.steps - self.step, 0) / (config.steps - start) if decaying else 1.0
        self.optimizer_g.param_groups[0]["lr"] = config.lr_generator * factor
        self.optimizer_d.param_groups[0]["lr"] = config.lr_discriminator * factor


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All keys, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _loss(terms: Terms) -> Tensor:
    """Sum of the terms, without the norm of the gradients that stands beside them."""
    return total({name: term for name, term in terms.items() if name != "grad_norm"})


class ProgressBar(Callback):
    """Bar with the latest losses, images per second and the remaining time.

    Args:
        progress: a running bar to add a task to; without it the callback owns one.

    Example:
        >>> callbacks = [ProgressBar()]  # for Trainer.run
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._bar, self._owned = progress, progress is None

    def on_start(self, trainer: Trainer, steps: int) -> None:
        if self._owned:
            self._bar = progress_bar()
            self._bar.start()
        assert self._bar is not None
        self._task = self._bar.add_task("training", total=trainer.step + steps, completed=trainer.step)
        self._clock = time.perf_counter()

    def on_losses(self, trainer: Trainer, rows: list[dict[str, float]]) -> None:
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        self._clock = time.perf_counter()
        rate = len(rows) * trainer.config.n_critic * trainer.config.batch_size / seconds
        losses = f"loss D {rows[-1]['discriminator']:.2f}, G {rows[-1]['generator']:.2f}"
        assert self._bar is not None
        self._bar.update(self._task, description=f"training ({losses}, {rate:.0f} images/s)")

    def on_step(self, trainer: Trainer) -> None:
        assert self._bar is not None
        self._bar.update(self._task, advance=1)

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None and self._owned:
            self._bar.stop()


class Every(Callback):
    """Calls ``action(trainer)`` after every ``interval`` steps.

    Args:
        interval: number of steps.
        action: called with the trainer.
        at_end: call it after the last step too.
        early: call it after a tenth of the first interval too.

    Example:
        >>> callback = Every(100, lambda trainer: print(trainer.step), at_end=True)
    """

    def __init__(
        self, interval: int, action: Callable[[Trainer], None], *, at_end: bool = False, early: bool = False
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval, self.action, self.at_end = interval, action, at_end
        self._early = interval // 10 if early else None
        self._last: int | None = None

    def on_start(self, trainer: Trainer, steps: int) -> None:
        self._last = trainer.step + steps if self.at_end else None

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step % self.interval == 0 or trainer.step in (self._early, self._last):
            self.action(trainer)
