"""Recipes: the files that come with the package, and what is wrong in one's own."""

import pytest

from fastgan.losses import gan_loss
from fastgan.models import SAGANDiscriminator, SAGANGenerator
from fastgan.recipes import ModelConfig, Recipe, TrainConfig, available, load_recipe, parse_recipe
from fastgan.training.augment import check_policy


def test_sagan_has_the_published_settings():
    recipe = load_recipe("sagan")
    assert recipe.train.loss == "hinge"
    assert (recipe.train.lr_generator, recipe.train.lr_discriminator) == (1e-4, 4e-4)
    assert recipe.train.betas == (0.0, 0.9)
    assert recipe == Recipe("sagan", "digits", ModelConfig(), TrainConfig())


@pytest.mark.parametrize("name", available())
def test_every_recipe_can_be_built(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    gan_loss(recipe.train.loss)
    check_policy(recipe.train.augment)
    model = recipe.model
    shared = {"resolution": model.resolution, "max_multiplier": model.max_multiplier}
    SAGANGenerator(2, width=model.generator_width, attention_resolution=model.attention_resolution, **shared)
    SAGANDiscriminator(2, width=model.discriminator_width, attention_resolution=model.attention_resolution, **shared)


def test_own_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrain:\n  steps: 5\n  lr_generator: 1\n  augment: [translation]\n")
    recipe = load_recipe(path)
    assert recipe.train == TrainConfig(steps=5, lr_generator=1.0, augment=("translation",))
    assert recipe.model == ModelConfig()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], "recipe must be a mapping, got list"),
        ({}, "recipe needs the key 'name'"),
        ({"name": "x", "trian": {}}, "recipe has no key 'trian'; there are name, data, model, train"),
        ({"name": "x", "train": {"step": 1}}, "recipe.train has no key 'step'"),
        ({"name": "x", "train": {"steps": "many"}}, "recipe.train.steps must be of type int, got 'many'"),
        ({"name": "x", "train": {"steps": True}}, "recipe.train.steps must be of type int, got True"),
        ({"name": "x", "train": {"steps": 1.5}}, "recipe.train.steps must be of type int, got 1.5"),
        ({"name": "x", "train": {"betas": 0.5}}, "recipe.train.betas must be a list, got 0.5"),
        ({"name": "x", "train": {"steps": 0}}, "steps must be at least 1, got 0"),
        ({"name": "x", "train": {"betas": [0.5]}}, "betas must be two numbers"),
        ({"name": "x", "train": {"betas": [0.5, 1.0]}}, "betas must be two numbers"),
        ({"name": "x", "train": {"lr_generator": -1}}, "lr_generator must be positive"),
        ({"name": "x", "train": {"ema_decay": 1}}, r"ema_decay must be in \[0, 1\)"),
        ({"name": "x", "train": {"decay_from": 2}}, r"decay_from must be in \[0, 1\]"),
    ],
)
def test_bad_recipe(content, match):
    with pytest.raises(ValueError, match=match):
        parse_recipe(content)


def test_unknown_recipe(tmp_path):
    with pytest.raises(ValueError, match="recipe must be one of sagan, sagan-digits or a YAML file, got 'sagn'"):
        load_recipe("sagn")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(broken)
