"""timm's and torchvision's networks as backbones, without a download: weights from a file."""

import pytest
import torch

from fastgan.metrics import InputError, load_backbone
from fastgan.metrics.backbones import zoo


def save_weights(model, path):
    torch.save(model.state_dict(), path)
    return path


def test_timm(tmp_path):
    timm = pytest.importorskip("timm")
    reference = timm.create_model("test_vit", pretrained=False).eval()
    path = save_weights(reference, tmp_path / "vit.pth")  # with its head
    backbone = load_backbone("timm:test_vit", weights=path, precision="fp32")
    assert backbone.name.startswith("timm:test_vit-")
    size = backbone.input_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    config = timm.data.resolve_model_data_config(reference)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        inputs = (images / 255 - mean) / std
        expected = reference.forward_head(reference.forward_features(inputs), pre_logits=True)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)
    assert backbone.dim == expected.shape[1]


@pytest.mark.slow
def test_torchvision(tmp_path):
    models = pytest.importorskip("torchvision.models")
    reference = models.squeezenet1_1(weights=None).eval()
    path = save_weights(reference, tmp_path / "squeezenet.pth")
    backbone = load_backbone("torchvision:squeezenet1_1", weights=path, precision="fp32")
    images = torch.rand(1, 3, 224, 224)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = reference.features((images - mean) / std).flatten(1)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def published():
    """Random weights under the keys of torch.hub's DINOv2, at its size of 518: 37 x 37 positions and a mask token."""
    timm = pytest.importorskip("timm")
    reference = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    state = reference.state_dict() | {"mask_token": torch.zeros(1, 384)}
    keys = {"cls_token", "blocks.11.attn.qkv.weight", "blocks.0.ls1.gamma", "patch_embed.proj.weight", "norm.bias"}
    assert keys <= set(state)
    assert state["pos_embed"].shape == (1, 1 + 37**2, 384)
    return reference, state


@pytest.mark.slow
def test_dinov2_of_a_file(published, tmp_path):
    """The class token, with position embeddings resized as DINOv2's code does, of images of 224."""
    reference, state = published
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    backbone = load_backbone("timm:vit_small_patch14_dinov2", weights=tmp_path / "dinov2_vits14_pretrain.pth")
    assert (backbone.dim, backbone.input_size) == (384, 224)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    factor = (16 + 0.1) / 37
    resized = torch.nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    expected = torch.cat([state["pos_embed"][:, :1], resized.permute(0, 2, 3, 1).reshape(1, 256, 384)], dim=1)
    torch.testing.assert_close(backbone._network.pos_embed, expected)

    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        patches = reference.patch_embed.proj((images / 255 - mean) / std).flatten(2).mT
        tokens = torch.cat([state["cls_token"].expand(2, -1, -1), patches], dim=1) + expected
        tokens = reference.norm(reference.blocks(tokens))
    torch.testing.assert_close(backbone(images), tokens[:, 0], rtol=1e-4, atol=1e-4)


def test_dinov2_takes_torch_hubs_cached_file(tmp_path, monkeypatch):
    """The file is found by name, without asking timm for weights, and recorded under the published name."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    network(torch.zeros(1, 3, 8, 8))
    network.register_buffer("pos_embed", torch.zeros(1, 5, 3))
    state = {key: torch.full_like(value, 0.01) for key, value in network.state_dict().items()}
    torch.save(state | {"mask_token": torch.zeros(1)}, tmp_path / "checkpoints" / zoo.DINOV2_FILE)
    asked = []

    def build(model, *, pretrained):
        asked.append((model, pretrained))
        return network, 8, (0.5,) * 3, (0.5,) * 3

    monkeypatch.setattr(zoo, "_timm", build)
    backbone = load_backbone("dinov2")
    assert (backbone.name, backbone.dim) == ("dinov2", 3)
    assert asked == [("vit_large_patch14_dinov2.lvd142m", False)]
    assert (network[1].weight == 0.01).all()


def test_aliases_are_networks_that_timm_has():
    timm = pytest.importorskip("timm")
    for name in zoo.ALIASES.values():
        library, _, model = name.partition(":")
        assert library == "timm"
        assert model in timm.list_pretrained(model)


def test_unavailable_backbones_are_an_error(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(InputError, match="backbone timm:no_such_net cannot be had from timm"):
        load_backbone("timm:no_such_net")
    with pytest.raises(InputError, match="does not fit"):
        load_backbone("timm:test_vit", weights=save_weights(torch.nn.Linear(2, 2), tmp_path / "w.pth"))
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match="backbone dinov2 needs timm: run `pip install timm`"):
        load_backbone("dinov2")
