"""Recipes: the files that come with the package, overrides, and what is wrong in one's own."""

import math

import pytest

from fastgan._checks import InputError
from fastgan.recipes import (
    ModelConfig,
    Recipe,
    TrainConfig,
    available,
    differences,
    dump_recipe,
    explain_recipe,
    load_recipe,
    override,
    parse_recipe,
)
from fastgan.training import Objective, build_networks

NINE = ("acgan", "csagan-w", "dcgan", "dcgan64", "sagan", "sketch-cgan", "wgan", "wgan-gp", "wgan-gp-ac")


def test_all_nine_systems_are_there():
    assert set(NINE) <= set(available())


def test_published_settings():
    recipes = {name: load_recipe(name) for name in NINE}
    sagan = recipes["sagan"]
    assert (sagan.train.loss, sagan.model.head, sagan.model.attention_resolution) == ("hinge", "projection", 16)
    assert (sagan.train.lr_generator, sagan.train.lr_discriminator, sagan.train.betas) == (1e-4, 4e-4, (0.0, 0.9))
    assert sagan.model.generator_spectral_norm
    assert sagan.model.discriminator_norm == "spectral"
    for name in ("wgan-gp", "wgan-gp-ac"):
        assert (recipes[name].train.gradient_penalty, recipes[name].train.n_critic) == (10, 5)
    ac = recipes["wgan-gp-ac"].train
    assert (ac.class_weight_discriminator, ac.class_weight_generator) == (1.0, 0.1)
    for name in ("wgan", "csagan-w"):
        train = recipes[name].train
        assert (train.clip, train.optimizer, train.lr_discriminator, train.n_critic) == (0.01, "rmsprop", 5e-5, 5)
    assert (recipes["csagan-w"].model.head, recipes["csagan-w"].model.attention_resolution) == ("one-hot", 16)
    sketch = recipes["sketch-cgan"]
    assert (sketch.model.resolution, sketch.train.gradient_penalty, sketch.train.n_critic) == (64, 100, 5)
    assert (recipes["dcgan64"].model.dim_z, recipes["dcgan64"].model.resolution) == (100, 64)
    assert recipes["acgan"].train.class_loss_on_generated


@pytest.mark.parametrize("name", available())
def test_every_recipe_can_be_built_and_written(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about
    Objective.of(recipe.train)
    small = override(recipe, ["generator_width=8", "discriminator_width=8"])
    generator, discriminator = build_networks(small.model, 2, 3)
    assert generator.resolution == discriminator.resolution == recipe.model.resolution
    import yaml

    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    explained = explain_recipe(recipe)
    assert parse_recipe(yaml.safe_load(explained)) == recipe
    for key, before in zip(explained.splitlines()[1:], explained.splitlines(), strict=False):
        if key.startswith("  ") and not key.startswith("  #"):
            name = key.split(":")[0].strip()
            assert before.startswith("  # ") or f", {name}" in explained, name  # described with those before it


def test_own_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrain:\n  steps: 5\n  lr_generator: 1\n  augment: [translation]\n")
    recipe = load_recipe(path)
    assert recipe.train == TrainConfig(steps=5, lr_generator=1.0, augment=("translation",))
    assert recipe.model == ModelConfig()


def test_numbers_in_any_spelling(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrain:\n  steps: 2e3\n  batch_size: 8.0\n  lr_generator: 1e-4\n  betas: [0, 9e-1]\n")
    train = load_recipe(path).train
    assert (train.steps, train.batch_size, train.lr_generator, train.betas) == (2000, 8, 1e-4, (0.0, 0.9))
    assert type(train.steps) is int
    assert override(Recipe("x"), ["steps=1e3", "log.score_sizes=[1e2]"]).log.score_sizes == (100,)
    for wrong in ("1.5", "1e-3", "yes", "many", "nan"):
        with pytest.raises(InputError, match="recipe.train.steps must be of type int"):
            override(Recipe("x"), [f"steps={wrong}"])


def test_settings_that_follow_from_the_data():
    recipe = load_recipe("dcgan")
    assert recipe.data.flip is None
    assert "flip: auto" in dump_recipe(recipe)
    assert override(recipe, ["flip=true"]).data.flip is True
    assert override(override(recipe, ["flip=true"]), ["flip=auto"]) == recipe
    with pytest.raises(InputError, match="recipe.data.flip must be of type bool"):
        override(recipe, ["flip=perhaps"])


def test_overrides():
    recipe = override(
        Recipe("x"),
        ["steps=7", "train.lr_generator=1e-3", "augment=[color, cutout]", "data.source=a folder", "betas=[0, 8e-1]"],
    )
    assert recipe.train.steps == 7
    assert recipe.train.lr_generator == 1e-3
    assert recipe.train.augment == ("color", "cutout")
    assert recipe.train.betas == (0.0, 0.8)
    assert recipe.data.source == "a folder"
    assert set(differences(recipe, Recipe("x"))) == {
        "train.steps",
        "train.lr_generator",
        "train.augment",
        "train.betas",
        "data.source",
    }


@pytest.mark.parametrize(
    ("assignment", "match"),
    [
        ("steps", "an override must be key=value, got 'steps'"),
        ("stps=3", "there is no key 'stps' in a recipe; did you mean 'steps'?"),
        ("train.head=plain", "there is no key 'train.head' in a recipe; did you mean 'model.head'?"),
        ("steps=many", "recipe.train.steps must be of type int, got 'many'"),
        ("steps=[", "steps must have a YAML value"),
        ("loss=1", "recipe.train.loss must be of type str, got 1"),
        ("optimizer=lion", "recipe.train: optimizer must be one of 'adam', 'adamw', 'rmsprop', 'sgd', got 'lion'"),
    ],
)
def test_bad_override(assignment, match):
    with pytest.raises(InputError) as raised:
        override(Recipe("x"), [assignment])
    assert match in str(raised.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([], "recipe must be a mapping, got list"),
        ({}, "recipe needs the key 'name'"),
        ({"name": "x", "trian": {}}, "recipe has no key 'trian'; there are .*; did you mean 'train'?"),
        ({"name": "x", "train": {"step": 1}}, "recipe.train has no key 'step'.*; did you mean 'steps'?"),
        ({"name": "x", "train": {"steps": "many"}}, "recipe.train.steps must be of type int, got 'many'"),
        ({"name": "x", "train": {"steps": True}}, "recipe.train.steps must be of type int, got True"),
        ({"name": "x", "train": {"steps": 1.5}}, "recipe.train.steps must be of type int, got 1.5"),
        ({"name": "x", "train": {"betas": 0.5}}, "recipe.train.betas must be a list, got 0.5"),
        ({"name": "x", "train": {"steps": 0}}, "steps must be at least 1, got 0"),
        ({"name": "x", "train": {"betas": [0.5]}}, "betas must be two numbers"),
        ({"name": "x", "train": {"betas": [0.5, 1.0]}}, "betas must be two numbers"),
        ({"name": "x", "train": {"lr_generator": -1}}, "lr_generator must be positive"),
        ({"name": "x", "train": {"gradient_penalty": -1}}, "gradient_penalty must be at least 0"),
        ({"name": "x", "train": {"precision": "fp8"}}, "precision must be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ({"name": "x", "train": {"ema_decay": 1}}, r"ema_decay must be in \[0, 1\)"),
        ({"name": "x", "train": {"decay_from": 2}}, r"decay_from must be in \[0, 1\]"),
        ({"name": "x", "data": {"channels": 2}}, "channels must be 0, 1 or 3, got 2"),
        ({"name": "x", "data": {"sketches": "some"}}, "sketches must be one of"),
        ({"name": "x", "log": {"score_sizes": [1]}}, "score_sizes must be numbers of at least 2"),
        ({"name": "x", "train": {"class_weight_generator": 1}}, "class_weight_generator needs model.head 'auxiliary'"),
        ({"name": "x", "model": {"head": "auxiliary"}}, "'auxiliary' needs a train.class_weight_discriminator"),
        ({"name": "x", "log": {"grid_every": 0}}, "grid_every must be at least 1"),
        ({"name": "x", "train": {"lr_generator": math.inf}}, "lr_generator must be positive and finite, got inf"),
        ({"name": "x", "train": {"r1": math.inf}}, "r1 must be at least 0 and finite, got inf"),
        ({"name": "x", "train": {"seed": -1}}, r"seed must be from 0 to 2\*\*63 - 1, got -1"),
        ({"name": "x", "train": {"seed": 2**63}}, "seed must be from 0"),
        ({"name": "x", "model": {"resolution": 0}}, "resolution must be at least 1 or auto, got 0"),
        ({"name": "x", "model": {"discriminator_width": 12}}, "discriminator_width must be a positive multiple of 8"),
    ],
)
def test_bad_recipe(content, match):
    with pytest.raises(InputError, match=match):
        parse_recipe(content)


def test_unknown_recipe(tmp_path):
    with pytest.raises(InputError, match="recipe must be one of .* or a YAML file, got 'sagn'; did you mean 'sagan'"):
        load_recipe("sagn")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("")
    with pytest.raises(InputError, match="broken.yaml: recipe must be a mapping, got NoneType"):
        load_recipe(broken)
    broken.write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="broken.yaml is not a text file"):
        load_recipe(broken)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"architecture": "gru"}, "model.architecture must be one of 'resnet', 'dcgan', 'sketch', 'vit', got 'gru'"),
        ({"architecture": "dcgan", "attention": "cosine"}, "model.attention has no meaning for architecture 'dcgan'"),
        ({"architecture": "vit"}, "model: logits must be one of 'product', 'cosine', 'distance', got 'sagan'"),
        (
            {"attention": "cos", "attention_resolution": 8},
            "attention must be one of 'sagan', 'product', 'cosine', 'dist",
        ),
        ({"architecture": "vit", "attention": "cosine", "depth": 0}, "model: depth must be at least 1, got 0"),
        ({"architecture": "resnet", "sees_sketch": True}, "model.sees_sketch has no meaning for architecture 'resnet'"),
        ({"architecture": "sketch", "dim_z": 3}, "model.dim_z has no meaning for architecture 'sketch'"),
        ({"resolution": 50}, "model: resolution must be 4, 5, 6 or 7 times a power of two, at least 16, got 50"),
        ({"architecture": "sketch", "conditional": False}, "model: n_classes must be at least 1, got 0"),
        ({"discriminator_norm": "batch"}, "discriminator_norm must be 'none' or 'spectral', got 'batch'"),
        ({"head": "projektion"}, "head must be one of 'plain', 'projection', 'auxiliary', got 'projektion'"),
        ({"architecture": "dcgan", "attention_resolution": 64}, "attention_resolution must be one of 8, 16"),
    ],
)
def test_networks_that_cannot_be(model, match):
    with pytest.raises(InputError, match=match):
        build_networks(ModelConfig(**model), 2, 3)
