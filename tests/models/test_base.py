"""Generators in a folder: written, read back, and what is wrong with one."""

import json

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastgan._checks import InputError
from fastgan.models import (
    DCGANDiscriminator,
    DCGANGenerator,
    Generator,
    ResNetGenerator,
    SAGANGenerator,
    SketchGenerator,
)

SMALL = {"resolution": 16, "image_channels": 1, "width": 8}
MAKERS = {
    "dcgan": lambda: DCGANGenerator(3, dim_z=4, **SMALL),
    "resnet": lambda: ResNetGenerator(dim_z=4, **SMALL),
    "sagan": lambda: SAGANGenerator(3, dim_z=4, attention_resolution=8, **SMALL),
    "sketch": lambda: SketchGenerator(3, label_channels=5, **SMALL),
}


@pytest.mark.parametrize("name", MAKERS)
def test_round_trip(name, tmp_path):
    generator = MAKERS[name]()
    inputs = torch.randn(2, 1, 16, 16) if name == "sketch" else torch.randn(2, 4)
    generator(inputs, torch.tensor([0, 2]))  # moves the batch norms' statistics
    generator.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new/folder").iterdir()) == ["config.json", "model.safetensors"]
    for cls in (Generator, type(generator)):
        loaded = cls.from_pretrained(tmp_path / "new" / "folder")
        assert type(loaded) is type(generator)
        assert loaded.config == generator.config
        assert not loaded.training
        assert torch.equal(loaded(inputs, torch.tensor([0, 2])), generator.eval()(inputs, torch.tensor([0, 2])))


def test_bad_folders(tmp_path):
    MAKERS["dcgan"]().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="class must be one of SketchGenerator, got 'DCGANGenerator'"):
        SketchGenerator.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="config.json does not exist: a folder written by save_pretrained is needed"):
        Generator.from_pretrained(tmp_path / "nothing")
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, match in (
        ({"class": "StyleGAN"}, "class must be one of .*, got 'StyleGAN'"),
        ({"arguments": {"resolution": 50}}, "arguments do not make a DCGANGenerator: resolution must be 4, 5"),
        ({"arguments": {"depth": 3}}, "arguments do not make a DCGANGenerator: .*depth"),
        ({"arguments": {**config["arguments"], "width": 16}}, "model.safetensors does not fit DCGANGenerator"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=match):
            Generator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json must hold JSON with 'class' and 'arguments'"):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="model.safetensors cannot be read"):
        Generator.from_pretrained(tmp_path)


def test_class_names_travel_with_the_generator(tmp_path):
    generator = DCGANGenerator(3, resolution=16, width=8)
    assert generator.label_of("2") == 2
    generator.class_names = ("cat", "dog", "7")
    generator.save_pretrained(tmp_path / "run" / "generator")
    again = Generator.from_pretrained(tmp_path / "run")  # a training run
    assert again.class_names == ("cat", "dog", "7")
    assert [again.label_of(name) for name in ("dog", "7", "1")] == [1, 2, 1]
    for wrong in ("cow", "3", "-1"):
        with pytest.raises(ValueError, match=f"class must be one of cat, dog, 7, or in .0, 3., got {wrong}"):
            again.label_of(wrong)
    with pytest.raises(InputError, match="config.json does not exist"):
        Generator.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", ["plain", "projection", "auxiliary", "one-hot"])
def test_labels_out_of_range_are_a_sentence(head):
    generator = DCGANGenerator(3, resolution=16, width=8)
    discriminator = DCGANDiscriminator(3, resolution=16, width=8, head=head)
    for labels in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        for network, inputs in (
            (generator, torch.randn(2, generator.dim_z)),
            (discriminator, torch.zeros(2, 3, 16, 16)),
        ):
            with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got "):
                network(inputs, labels)


def test_labels_are_not_read_in_graphs():
    generator = DCGANGenerator(3, resolution=16, width=8).eval()
    z, labels = torch.randn(2, generator.dim_z), torch.tensor([0, 2])
    graph = make_fx(generator, tracing_mode="fake", _allow_non_fake_inputs=True)(z, labels)
    assert not [node for node in graph.graph.nodes if "_local_scalar_dense" in str(node.target)]
    rows = torch.func.vmap(generator, randomness="different")(z[:, None], labels[:, None])
    torch.testing.assert_close(rows[:, 0], generator(z, labels))
