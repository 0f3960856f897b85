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


def test_aliases_are_networks_that_timm_has():
    timm = pytest.importorskip("timm")
    for name in zoo.ALIASES.values():
        library, _, model = name.partition(":")
        assert library == "timm"
        assert model in timm.list_pretrained(model)


def test_what_cannot_be_had(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(InputError, match="backbone timm:no_such_net cannot be had from timm"):
        load_backbone("timm:no_such_net")
    with pytest.raises(InputError, match="does not fit"):
        load_backbone("timm:test_vit", weights=save_weights(torch.nn.Linear(2, 2), tmp_path / "w.pth"))
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match="backbone dinov2 needs timm: run `pip install timm`"):
        load_backbone("dinov2")
