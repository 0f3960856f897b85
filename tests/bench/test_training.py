"""The training runs that are kept as evidence."""

import pytest
import torch

from bench.training import N_CLASSES, RUNS, _spreads
from fastgan.recipes import available, load_recipe, override
from fastgan.recipes.build import build_networks


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_recipe_and_networks(name):
    recipe_name, changes = RUNS[name]
    recipe = override(load_recipe(recipe_name), changes)
    channels = 1 if recipe.data.source == "digits" else 3
    generator, discriminator = build_networks(recipe.model, N_CLASSES, channels)
    labels, size = torch.arange(2), recipe.model.resolution
    with torch.no_grad():
        images = generator(
            torch.randn(2, 1, size, size) if generator.sketch_channels else torch.randn(2, generator.dim_z), labels
        )
        seen = torch.randn(2, 1, size, size) if getattr(discriminator, "sees_sketch", False) else images[:, :0]
        scores = discriminator(torch.cat([images, seen], 1), labels)
    assert images.shape == (2, channels, size, size)
    assert (scores[0] if isinstance(scores, tuple) else scores).shape == (2,)


def test_each_recipe_sized_for_digits_has_a_run():
    trained = {recipe for recipe, _ in RUNS.values()}
    sized = {name for name in available() if name.endswith("-digits")}
    assert sized - trained == {"sagan-quick-digits"}  # for a quick look


def test_spreads_within_classes():
    pixels, labels = torch.tensor([[0.0], [3.0], [1.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1, 1])
    spreads = _spreads(pixels, labels)
    assert spreads[:2].tolist() == [3.0, 2.0]
    assert spreads[2:].isnan().all()
