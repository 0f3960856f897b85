"""Generators in folders and on the Hugging Face Hub: written, read back, and refused if they are damaged."""

import inspect
import json
import runpy
import shutil
import sys
from types import SimpleNamespace

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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the Hugging Face Hub: repositories are folders, and calls must fit the library's signatures."""
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("FASTGAN_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    repositories, calls = tmp_path / "hub", []

    def stand_in(function, action):
        def call(*arguments, **options):
            bound = inspect.signature(function).bind(*arguments, **options)
            calls.append((function.__name__, {k: v for k, v in bound.arguments.items() if k != "self"}))
            return action(**calls[-1][1])

        return call

    def download(repo_id, allow_patterns, **options):
        if not (repositories / repo_id).exists():
            raise library.errors.LocalEntryNotFoundError(f"{repo_id} is not there")
        return str(repositories / repo_id)

    def upload(repo_id, folder_path, **options):
        shutil.copytree(folder_path, repositories / repo_id)
        return f"https://hub/{repo_id}"

    api = library.HfApi
    monkeypatch.setattr(library, "snapshot_download", stand_in(library.snapshot_download, download))
    monkeypatch.setattr(api, "create_repo", stand_in(api.create_repo, lambda **options: SimpleNamespace(**options)))
    monkeypatch.setattr(api, "upload_folder", stand_in(api.upload_folder, upload))
    return calls


def test_the_hub_holds_generators(hub):
    generator = MAKERS["dcgan"]().eval()
    assert generator.push_to_hub("user/repo", private=True, commit_message="First") == "https://hub/user/repo"
    assert [name for name, _ in hub] == ["create_repo", "upload_folder"]
    assert hub[0][1] == {"repo_id": "user/repo", "private": True, "exist_ok": True}
    assert hub[1][1]["commit_message"] == "First"
    loaded = Generator.from_pretrained("user/repo", revision="v1", token="secret")
    assert hub[2][1].items() >= {"revision": "v1", "token": "secret"}.items()
    z, labels = torch.randn(2, 4), torch.tensor([0, 2])
    assert torch.equal(loaded(z, labels), generator(z, labels))


def test_uploads_have_a_model_card(hub, tmp_path):
    MAKERS["dcgan"]().push_to_hub("user/repo")
    assert sorted(p.name for p in (tmp_path / "hub/user/repo").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = (tmp_path / "hub/user/repo/README.md").read_text()
    assert 'Generator.from_pretrained("user/repo")' in card
    assert {"library_name: fastgan", "- gan", "- pytorch_model_hub_mixin"} <= set(card.splitlines())
    MAKERS["dcgan"]().save_pretrained(tmp_path / "named", push_to_hub=True, repo_id="user/other")
    assert (tmp_path / "hub/user/other/model.safetensors").exists()


@pytest.mark.parametrize("name", MAKERS)
def test_the_mixin_of_huggingface_hub_loads_the_weights(name, tmp_path):
    library = pytest.importorskip("huggingface_hub")
    generator = MAKERS[name]()
    assert isinstance(generator, library.PyTorchModelHubMixin)
    generator.save_pretrained(tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["arguments"]
    loaded = type(generator)(**arguments)
    library.PyTorchModelHubMixin._load_as_safetensor(loaded, str(tmp_path / "model.safetensors"), "cpu", True)
    for key, value in generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_folders_go_before_the_hub(hub, tmp_path):
    MAKERS["dcgan"]().save_pretrained(tmp_path / "user" / "repo")
    Generator.from_pretrained("user/repo")
    assert hub == []


def test_a_hub_that_cannot_be_read(hub, monkeypatch):
    with pytest.raises(InputError, match="no folder and no repository on the Hugging Face Hub: 'user/other'"):
        Generator.from_pretrained("user/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="'user/other' does not exist.*pip install huggingface_hub"):
        Generator.from_pretrained("user/other")


def test_offline_only_the_cache_of_the_hub_is_read(hub, monkeypatch):
    MAKERS["dcgan"]().push_to_hub("user/repo")
    hub.clear()
    monkeypatch.setenv("FASTGAN_OFFLINE", "1")
    Generator.from_pretrained("user/repo")
    assert [options["local_files_only"] for _, options in hub] == [True]
    with pytest.raises(InputError, match="in the Hub's cache .FASTGAN_OFFLINE is set.: 'user/other'"):
        Generator.from_pretrained("user/other")
    with pytest.raises(InputError, match="push_to_hub.*FASTGAN_OFFLINE"):
        MAKERS["dcgan"]().push_to_hub("user/repo")


@pytest.mark.parametrize("version", ["none", "old"])
def test_without_huggingface_hub_folders_still_work(version, monkeypatch):
    module = None if version == "none" else SimpleNamespace(PyTorchModelHubMixin=object)  # it takes no options
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    mixin = runpy.run_path(inspect.getfile(Generator).replace("base.py", "_hub.py"))["HubMixin"]
    generator = type("Plain", (torch.nn.Linear, mixin), {})(2, 3)
    advice = "pip install huggingface_hub" if version == "none" else "a newer huggingface_hub.*: TypeError"
    with pytest.raises(InputError, match=advice):
        generator.push_to_hub("user/repo")
    with pytest.raises(InputError, match=advice):
        generator.save_pretrained("folder", push_to_hub=True)
