"""Adversarial losses, penalties, differentiable augmentation, and the noise that a train step draws."""

from fastgan.losses.adversarial import LOSSES, GANLoss, auxiliary_class_loss, gan_loss
from fastgan.losses.augmentation import AUGMENTATIONS, AdaptiveAugment, augment, augment_draws
from fastgan.losses.noise import Draw, draw, integers, normal, uniform
from fastgan.losses.penalties import LeCam, clip_weights_, consistency_penalty, gradient_penalty, r1_penalty

__all__ = [
    "AUGMENTATIONS",
    "LOSSES",
    "AdaptiveAugment",
    "Draw",
    "GANLoss",
    "LeCam",
    "augment",
    "augment_draws",
    "auxiliary_class_loss",
    "clip_weights_",
    "consistency_penalty",
    "draw",
    "gan_loss",
    "gradient_penalty",
    "integers",
    "normal",
    "r1_penalty",
    "uniform",
]
