"""Runs of a moment: shrunken recipes, a backbone of pixels to score them, and a comparison of states bit for bit."""

import torch

from fastgan.metrics import Backbone
from fastgan.recipes import load_recipe, override
from fastgan.training.pictures import encoded
from fastgan.training.starting import resume_run, start_run

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


def start(recipe, out, notes=None, **options):
    return start_run(recipe, out, tell=([] if notes is None else notes).append, show_progress=False, **options)


def resume(out, notes=None, **options):
    return resume_run(out, tell=([] if notes is None else notes).append, show_progress=False, **options)


def folder_of_images(folder, n=12):
    rng = torch.Generator().manual_seed(0)
    for i in range(n):
        path = folder / f"c{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(torch.randint(0, 256, (3, 20, 20), generator=rng, dtype=torch.uint8)))
    return folder
