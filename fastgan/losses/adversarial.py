"""Adversarial losses on discriminator logits, by name.

Each :class:`GANLoss` holds the two objectives, both to be minimized. Logits may have any shape; the mean over all
of them is taken, in float32 if they are in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan._checks import check_tensor


@dataclass(frozen=True)
class GANLoss:
    """The two objectives of a name.

    Attributes:
        name: what recipes and :func:`gan_loss` call it.
        discriminator: (real logits, fake logits) to a scalar.
        generator: fake logits to a scalar, or (real logits, fake logits) if ``is_paired``.
        is_paired: the generator's loss compares fake logits with real ones.

    Example:
        >>> loss = gan_loss("hinge")
        >>> loss.discriminator(torch.tensor([2.0]), torch.tensor([-2.0])), loss.generator(torch.tensor([1.0]))
        (tensor(0.), tensor(-1.))
    """

    name: str
    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[..., Tensor]
    is_paired: bool = False


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean(max(0, 1 - real)) + mean(max(0, 1 + fake)) (Lim & Ye 2017)."""
    real, fake = _full(real=real), _full(fake=fake)
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean(fake)."""
    return -_full(fake=fake).mean()


def bce_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-mean(log sigmoid(real)) - mean(log(1 - sigmoid(fake))) (Goodfellow et al. 2014)."""
    real, fake = _full(real=real), _full(fake=fake)
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """-mean(log sigmoid(fake)) (Goodfellow et al. 2014)."""
    return F.softplus(-_full(fake=fake)).mean()


def saturating_generator(fake: Tensor) -> Tensor:
    """mean(log(1 - sigmoid(fake))), the minimax objective (Goodfellow et al. 2014)."""
    return -F.softplus(_full(fake=fake)).mean()


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean(fake) - mean(real) (Arjovsky et al. 2017)."""
    real, fake = _full(real=real), _full(fake=fake)
    return fake.mean() - real.mean()


def wasserstein_generator(fake: Tensor) -> Tensor:
    """-mean(fake)."""
    return -_full(fake=fake).mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean((real - 1)^2) / 2 + mean(fake^2) / 2 (Mao et al. 2017)."""
    real, fake = _full(real=real), _full(fake=fake)
    return (real - 1).square().mean() / 2 + fake.square().mean() / 2


def least_squares_generator(fake: Tensor) -> Tensor:
    """mean((fake - 1)^2) / 2 (Mao et al. 2017)."""
    return (_full(fake=fake) - 1).square().mean() / 2


def relativistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean(softplus(fake - real)): each real image should score higher than the fake one beside it.

    Source: Jolicoeur-Martineau 2019, arXiv 1807.00734; with R1 and R2 in Huang et al. 2024, "The GAN is dead; long live
    the GAN!", arXiv 2501.05441.

    Example:
        >>> relativistic_discriminator(torch.tensor([1.0]), torch.tensor([1.0]))
        tensor(0.6931)
    """
    real, fake = _full(real=real), _full(fake=fake)
    if real.shape != fake.shape:
        raise ValueError(f"fake must have the shape of real, {tuple(real.shape)}, got {tuple(fake.shape)}")
    return F.softplus(fake - real).mean()


def relativistic_generator(real: Tensor, fake: Tensor) -> Tensor:
    """mean(softplus(real - fake)): each fake image should score higher than the real one beside it."""
    return relativistic_discriminator(fake, real)


def auxiliary_class_loss(class_logits: Tensor, labels: Tensor) -> Tensor:
    """-mean(log softmax(class_logits)[label]), the L_C of an auxiliary classifier (Odena et al. 2017).

    Args:
        class_logits: (n, n_classes).
        labels: int64 (n,).

    Example:
        >>> auxiliary_class_loss(torch.zeros(1, 2), torch.tensor([1]))
        tensor(0.6931)
    """
    check_tensor("class_logits", class_logits, ndim=2)
    check_tensor("labels", labels, ndim=1, dtypes=(torch.int64,))
    return F.cross_entropy(_full(class_logits=class_logits), labels)


LOSSES = {
    loss.name: loss
    for loss in (
        GANLoss("hinge", hinge_discriminator, hinge_generator),
        GANLoss("non-saturating", bce_discriminator, non_saturating_generator),
        GANLoss("saturating", bce_discriminator, saturating_generator),
        GANLoss("wasserstein", wasserstein_discriminator, wasserstein_generator),
        GANLoss("least-squares", least_squares_discriminator, least_squares_generator),
        GANLoss("relativistic", relativistic_discriminator, relativistic_generator, is_paired=True),
    )
}


def gan_loss(name: str) -> GANLoss:
    """Look up a loss of :data:`LOSSES`.

    Raises:
        ValueError: there is none of this name.

    Example:
        >>> gan_loss("hinge").generator(torch.tensor([1.0, 3.0]))
        tensor(-2.)
    """
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {name!r}")
    return LOSSES[name]


def _full(**logits: Tensor) -> Tensor:
    """The one named tensor, checked, in float32 at least."""
    ((name, tensor),) = logits.items()
    check_tensor(name, tensor)
    if tensor.numel() == 0:
        raise ValueError(f"{name} must hold at least one logit, got shape {tuple(tensor.shape)}")
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
