"""Recipes shrunk to run in a moment, a backbone of pixels to score them, and a comparison of states bit for bit."""

import torch

from fastgan.metrics import Backbone
from fastgan.recipes import load_recipe, override

PIXELS = Backbone(lambda images: torch.nn.functional.avg_pool2d(images, 4).flatten(1), name="pixels")


def tiny(name, *changes):
    """A recipe at 16x16 with the narrowest networks, scored on eight images."""
    recipe = load_recipe(name)
    attention = ["attention_resolution=8"] if recipe.model.attention_resolution else []
    small = ["resolution=16", "generator_width=8", "discriminator_width=8", "batch_size=4", "steps=2"]
    return override(recipe, [*small, *attention, "score_sizes=[8]", "data.source=digits", *changes])


def everything(value, prefix=""):
    """All tensors and numbers of a nested state, by path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in everything(item, f"{prefix}{key}.").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in everything(item, f"{prefix}{i}.").items()}
    return {prefix: value}


def assert_same(first, second):
    first, second = everything(first), everything(second)
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key
