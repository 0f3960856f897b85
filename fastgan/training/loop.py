"""The training loop: alternating discriminator and generator updates, moving average, loss history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.data import DeviceLoader, LabelledImages
from fastgan.losses import gan_loss
from fastgan.recipes.schema import TrainConfig
from fastgan.training.augment import augment, check_policy
from fastgan.training.callbacks import Callback
from fastgan.training.ema import EMA

FLUSH_INTERVAL = 10


class NonFiniteLossError(FloatingPointError):
    """A loss became infinite or not a number; ``step`` is the first such step, counted from 1."""

    def __init__(self, step: int, discriminator: float, generator: float) -> None:
        super().__init__(f"loss is not finite at step {step}: discriminator {discriminator}, generator {generator}")
        self.step = step


@dataclass
class History:
    """Losses of each step done; of the discriminator the mean over its ``n_critic`` updates."""

    discriminator: list[float] = field(default_factory=list)
    generator: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.generator)


class Trainer:
    """Trains a conditional GAN on one device.

    Args:
        generator: called as ``generator(z, labels)``, with attributes ``n_classes`` and ``dim_z``.
        discriminator: called as ``discriminator(images, labels)``, gives logits.
        data: real images; moved to ``device``.
        config: learning rates, batch size, loss and the rest.
        device: where to train; both networks are moved there.

    Attributes:
        ema: moving average of the generator; ``ema.module`` is the network to sample from.
        history: losses so far.
        step: generator updates done.

    Raises:
        ValueError: the networks and the data disagree in classes, or the configuration names something unknown.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        data: LabelledImages,
        config: TrainConfig,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, network in (("generator", generator), ("discriminator", discriminator)):
            if network.n_classes != data.n_classes:
                raise ValueError(f"{name} must have the data's {data.n_classes} classes, got {network.n_classes}")
        check_policy(config.augment)
        self.loss = gan_loss(config.loss)
        self.config = config
        self.device = torch.device(device)
        self.n_classes = data.n_classes
        self.dim_z = int(generator.dim_z)  # type: ignore[arg-type]
        self.generator = generator.to(self.device).train()
        self.discriminator = discriminator.to(self.device).train()
        self.loader = DeviceLoader(data.to(self.device), config.batch_size, seed=config.seed)
        self.rng = torch.Generator(self.device).manual_seed(config.seed)
        self.ema = EMA(self.generator, config.ema_decay)
        self.optimizer_g = self._adam(self.generator, config.lr_generator)
        self.optimizer_d = self._adam(self.discriminator, config.lr_discriminator)
        self.history = History()
        self.step = 0
        self._pending: list[tuple[Tensor, Tensor]] = []

    def run(self, steps: int | None = None, callbacks: Sequence[Callback] = ()) -> History:
        """Do ``steps`` more steps, by default up to ``config.steps``.

        Raises:
            NonFiniteLossError: a loss is infinite or not a number.
        """
        steps = max(self.config.steps - self.step, 0) if steps is None else steps
        for callback in callbacks:
            callback.on_start(self, steps)
        try:
            for i in range(steps):
                self.train_step()
                if len(self._pending) >= FLUSH_INTERVAL or i == steps - 1:
                    self._flush()
                for callback in callbacks:
                    callback.on_step(self)
        finally:
            for callback in callbacks:
                callback.on_end(self)
        return self.history

    def train_step(self) -> None:
        """``n_critic`` discriminator updates and one generator update."""
        self._set_learning_rates()
        losses_d = [self._discriminator_update(*self.loader.next()) for _ in range(self.config.n_critic)]
        loss_g = self._generator_update()
        self.ema.update(self.generator)
        self.step += 1
        self._pending.append((torch.stack(losses_d).mean(), loss_g))

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next step, as tensors and plain numbers: ``torch.load(weights_only=True)`` reads it."""
        self._flush()
        return {
            "step": self.step,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.module.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer_g": self.optimizer_g.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": self.rng.get_state(),
            "history": {"discriminator": self.history.discriminator, "generator": self.history.generator},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; on the same device the run goes on bit for bit."""
        self.step = state["step"]
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.ema.module.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizer_g.load_state_dict(state["optimizer_g"])
        self.optimizer_d.load_state_dict(state["optimizer_d"])
        self.loader.load_state_dict(state["loader"])
        self.rng.set_state(state["rng"])
        history = state["history"]
        self.history = History(list(history["discriminator"]), list(history["generator"]))
        self._pending = []

    def _discriminator_update(self, real: Tensor, labels: Tensor) -> Tensor:
        z, fake_labels = self._latents()
        with torch.no_grad():
            fake = self.generator(z, fake_labels)
        # One forward for both halves: one power iteration of the spectral norms, and a batch twice as large.
        images = augment(torch.cat([real.to(fake.dtype), fake]), self.config.augment, self.rng)
        real_logits, fake_logits = self.discriminator(images, torch.cat([labels, fake_labels])).chunk(2)
        loss = self.loss.discriminator(real_logits, fake_logits)
        return _minimise(loss, self.discriminator, self.optimizer_d)

    def _generator_update(self) -> Tensor:
        z, labels = self._latents()
        images = augment(self.generator(z, labels), self.config.augment, self.rng)
        loss = self.loss.generator(self.discriminator(images, labels))
        return _minimise(loss, self.generator, self.optimizer_g)

    def _latents(self) -> tuple[Tensor, Tensor]:
        n = self.config.batch_size
        z = torch.randn(n, self.dim_z, generator=self.rng, device=self.device)
        return z, torch.randint(self.n_classes, (n,), generator=self.rng, device=self.device)

    def _adam(self, network: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=lr, betas=self.config.betas, fused=True)

    def _set_learning_rates(self) -> None:
        config = self.config
        start = config.decay_from * config.steps
        decaying = start < config.steps and self.step > start
        factor = max(config.steps - self.step, 0) / (config.steps - start) if decaying else 1.0
        self.optimizer_g.param_groups[0]["lr"] = config.lr_generator * factor
        self.optimizer_d.param_groups[0]["lr"] = config.lr_discriminator * factor

    def _flush(self) -> None:
        """Read the losses of the last steps from the device and stop at the first that is not finite."""
        if not self._pending:
            return
        rows = torch.stack([torch.stack(pair) for pair in self._pending]).tolist()
        first = self.step - len(rows) + 1
        self._pending = []
        for step, (loss_d, loss_g) in enumerate(rows, first):
            if not (math.isfinite(loss_d) and math.isfinite(loss_g)):
                raise NonFiniteLossError(step, loss_d, loss_g)
            self.history.discriminator.append(loss_d)
            self.history.generator.append(loss_g)


def _minimise(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """One optimiser step on ``network`` alone: gradients of the other network's weights are never computed."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
