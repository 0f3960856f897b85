"""Regularizers of a discriminator: gradient penalties, weight clipping, consistency and LeCam."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgan._checks import check_tensor
from fastgan._twice_differentiable import check_twice_differentiable
from fastgan.losses.augmentation import augment, augment_draws

__all__ = [
    "LeCam",
    "augment",
    "augment_draws",
    "clip_weights_",
    "consistency_penalty",
    "gradient_penalty",
    "r1_penalty",
]


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    alpha: Tensor,
    *,
    target: float = 1.0,
    eps: float = 1e-12,
) -> Tensor:
    """mean over the samples of (|grad critic(x)| - target)^2 at x = real + alpha (fake - real).

    The norm is over all dimensions but the first, in float32 even under autocast, and is sqrt(sum g^2 + eps), so its
    gradient is finite even if the critic is flat. Differentiable in the critic's weights. A critic with batch norm
    has no gradient of one sample alone: use another norm.

    Args:
        critic: from a batch like ``real`` to logits of any shape, sample by sample.
        real, fake: (n, ...), no gradient flows into either.
        alpha: one number in [0, 1] a sample, (n, 1, ..., 1).
        target: the wanted norm; 1 in the paper, 0 for a penalty on the slope.
        eps: added under the root.

    Returns:
        A scalar, float32 (float64 for float64 images).

    Raises:
        ValueError: shapes disagree.
        RuntimeError: the critic has attention of torch's that cannot be differentiated twice; see
            :func:`fastgan.nn.second_order_attention`.

    Source: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv 1704.00028.

    Example:
        >>> critic = lambda images: 1.5 * images.flatten(1).square().sum(1)
        >>> real, fake = torch.randn(4, 1, 1, 1), torch.randn(4, 1, 1, 1)
        >>> penalty = gradient_penalty(critic, real, fake, alpha=torch.rand(4, 1, 1, 1))
        >>> gradient_penalty(lambda x: 3 * x.flatten(1).sum(1), real, fake, torch.rand(4, 1, 1, 1))  # (3 - 1)^2
        tensor(4.)
    """
    check_tensor("real", real)
    check_tensor("fake", fake)
    if real.shape != fake.shape:
        raise ValueError(f"fake must have the shape of real, {tuple(real.shape)}, got {tuple(fake.shape)}")
    check_tensor("alpha", alpha)
    expected = (len(real), *(1,) * (real.ndim - 1))
    if tuple(alpha.shape) != expected:
        raise ValueError(f"alpha must have shape {expected}, one number per sample, got {tuple(alpha.shape)}")
    real, fake = _full(real.detach()), _full(fake.detach())
    squares = _squared_gradient(critic, real + alpha.to(real.dtype) * (fake - real))
    return ((squares + eps).sqrt() - target).square().mean()


def r1_penalty(critic: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """mean over the samples of |grad critic(real)|^2 / 2, float32; differentiable in the critic's weights.

    Args:
        critic: as in :func:`gradient_penalty`.
        real: (n, ...).

    Returns:
        A scalar, float32 (float64 for float64 images).

    Raises:
        RuntimeError: as :func:`gradient_penalty`.

    Source: Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?", arXiv 1801.04406.

    Example:
        >>> critic = lambda images: 3 * images.flatten(1).sum(1)
        >>> penalty = r1_penalty(critic, torch.randn(4, 1, 1, 1))
    """
    check_tensor("real", real)
    return _squared_gradient(critic, _full(real)).mean() / 2


def consistency_penalty(logits: Tensor, augmented_logits: Tensor) -> Tensor:
    """Mean squared difference between the logits of images and of the same images augmented.

    For balanced consistency regularization, add it for real and for generated images.

    Args:
        logits, augmented_logits: of one shape, real numbers.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes disagree.

    Source: Zhao et al. 2021, "Improved Consistency Regularization for GANs", arXiv 2002.04724.

    Example:
        >>> consistency_penalty(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)
    """
    check_tensor("logits", logits)
    check_tensor("augmented_logits", augmented_logits)
    if logits.shape != augmented_logits.shape:
        got = tuple(augmented_logits.shape)
        raise ValueError(f"augmented_logits must have the shape of logits, {tuple(logits.shape)}, got {got}")
    return (_full(logits) - _full(augmented_logits)).square().mean()


class LeCam(nn.Module):
    """Regularization that keeps logits near the averages of the other kind's: real ones near fake, fake near real.

    ``penalty`` is mean((real - average of fake)^2) + mean((fake - average of real)^2). It helps if data are few.

    Args:
        decay: of the averages per call, in [0, 1).
        device: of the averages.

    Attributes:
        averages: of real and fake logits, (2,), float32, a buffer that is written in place. Make the module a part of
            the discriminator, and they are saved with it and averaged over processes.

    Source: Tseng et al. 2021, "Regularizing Generative Adversarial Networks under Limited Data", arXiv 2104.03310.

    Example:
        >>> regularizer = LeCam()
        >>> regularizer(torch.tensor([1.0, 3.0]), torch.tensor([-2.0]))
        tensor(9.1608)
    """

    def __init__(self, decay: float = 0.99, device: torch.device | str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        super().__init__()
        self.decay = decay
        self.averages: Tensor
        self.register_buffer("averages", torch.zeros(2, device=device))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Move the averages towards these logits, then return the penalty, a scalar.

        Raises:
            TypeError, ValueError: logits are not tensors of floating-point numbers.
        """
        check_tensor("real", real)
        check_tensor("fake", fake)
        real, fake = _full(real), _full(fake)
        with torch.no_grad():
            means = torch.stack([real.mean(), fake.mean()]).to(self.averages.dtype)
            self.averages.lerp_(means, 1 - self.decay)
        average_real, average_fake = self.averages.clone().unbind()
        return (real - average_fake).square().mean() + (fake - average_real).square().mean()


@torch.no_grad()
def clip_weights_(module: nn.Module, limit: float) -> None:
    """Clamp every parameter of ``module`` to [-limit, limit], in place (Arjovsky et al. 2017, arXiv 1701.07875).

    Raises:
        ValueError: ``limit`` is not positive.

    Example:
        >>> critic = nn.Linear(2, 1)
        >>> clip_weights_(critic, 0.01)
        >>> bool(critic.weight.abs().max() <= 0.01)
        True
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    parameters = [p.detach() for p in module.parameters()]
    torch._foreach_clamp_min_(parameters, -limit)
    torch._foreach_clamp_max_(parameters, limit)


def _squared_gradient(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """|grad critic(x)|^2 of each sample, (n,), with a graph behind it."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_(True)
        score = critic(x).sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=True)
        check_twice_differentiable(score, gradient, x)
    return gradient.flatten(1).square().sum(1)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
