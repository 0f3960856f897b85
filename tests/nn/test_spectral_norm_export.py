"""Networks with spectral norms leave Python: ONNX, torch.export and torch.jit.trace, as graphs of torch's operators."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as older_spectral_norm

from fastgan.models import DCGANDiscriminator, DCGANGenerator, SAGANDiscriminator, SAGANGenerator
from fastgan.nn import fuse, group_spectral_norm, spectral_norm
from tests.nn.normed_networks import grouped, images, network, train

KINDS = {
    "single": lambda: network(spectral_norm, torch.float32),
    "grouped": lambda: grouped(torch.float32),
    "step": lambda: grouped(torch.float32, updates="step"),
    "fused": lambda: fuse(network(parametrizations.spectral_norm, torch.float32))[0],
    "fused older": lambda: fuse(network(older_spectral_norm, torch.float32))[0],
}
SMALL = {"resolution": 16, "width": 8}


def trained(kind):
    model = KINDS[kind]()
    train(model, 2)
    return model.eval()


def changed(model):
    """Another state for the model, far from the first."""
    return {name: value.flip(0) * 1.5 + 0.1 for name, value in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_onnx(kind, dynamo, tmp_path):
    model = trained(kind)
    x = images().float()
    model(x)  # fills what evaluation keeps: no exported constant may come from there
    run_onnx_export(model, (x,), tmp_path, dynamo=dynamo)


def run_onnx_export(model, arguments, tmp_path, **options):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, arguments, path, verbose=False, **options)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    inputs = {node.name: x.numpy() for node, x in zip(graph.input, arguments, strict=True)}
    expected = model(*arguments)
    for actual, y in zip(ReferenceEvaluator(path).run(None, inputs), [expected], strict=True):
        torch.testing.assert_close(torch.tensor(actual), y, rtol=1e-3, atol=1e-5)


MODELS = {
    "SAGANGenerator": lambda: SAGANGenerator(3, dim_z=4, attention_resolution=8, **SMALL),
    "SAGANDiscriminator": lambda: SAGANDiscriminator(3, attention_resolution=8, **SMALL),
    "DCGANGenerator": lambda: DCGANGenerator(3, dim_z=4, attention_resolution=8, spectral_norm=True, **SMALL),
    "DCGANDiscriminator": lambda: DCGANDiscriminator(3, norm="spectral", head="projection", **SMALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_to_onnx(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    arguments = (torch.randn(2, 4) if "Generator" in name else torch.randn(2, 3, 16, 16), torch.tensor([0, 2]))
    model(*arguments)
    run_onnx_export(model.eval(), arguments, tmp_path, dynamo=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_to_exported_programs(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    arguments = (torch.randn(2, 4) if "Generator" in name else torch.randn(2, 3, 16, 16), torch.tensor([0, 2]))
    model(*arguments)
    program = torch.export.export(model.eval(), arguments)
    assert not any("spectral_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*arguments), model(*arguments), rtol=1e-4, atol=1e-5)


def saved_and_loaded(program):
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_export_round_trip(kind, strict):
    model, x = trained(kind), images().float()
    model(x)
    program = saved_and_loaded(torch.export.export(model, (x,), strict=strict))
    assert not any("fastgan" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    torch.testing.assert_close(exported(x), model(x))
    state = changed(model)
    exported.load_state_dict(state), model.load_state_dict(state)
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_in_training(strict):
    model, x = grouped().train(), images()
    program = saved_and_loaded(torch.export.export(copy.deepcopy(model), (x,), strict=strict))
    assert not any("fastgan" in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    for _ in range(3):
        torch.testing.assert_close(exported(x), model(x))
    state = exported.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value)


def test_exported_graphs_leave_zero_weights_at_zero():
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(2, 4)
    nn.init.zeros_(model[0].weight)
    group_spectral_norm(model)
    for training in (True, False):
        exported = torch.export.export(copy.deepcopy(model).train(training), (x,)).module()
        assert not exported(x).any()
        vectors = [value for name, value in exported.state_dict().items() if "_u" in name or "_v" in name]
        assert len(vectors) == 2
        assert all(vector.any() for vector in vectors)


def test_an_interrupted_export_leaves_nothing_behind():
    for exception in (KeyboardInterrupt, ValueError):
        model = group_spectral_norm(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).eval()
        x = torch.randn(2, 4)
        expected = model(x)

        def stop(*_, exception=exception):
            raise exception

        handle = model[1].register_forward_pre_hook(stop)
        with pytest.raises(BaseException):  # noqa: B017, PT011 - as torch.export wraps it
            torch.export.export(model, (x,), strict=False)
        handle.remove()
        torch.testing.assert_close(model[1](model[0](x)), expected)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_trace(kind):
    model, x = trained(kind), images().float()
    with torch.no_grad():
        model(x)  # with what evaluation keeps at hand, which is no constant of the trace
        traced = torch.jit.trace(model, (x,))
    assert not any(node.kind().startswith("fastgan") for node in traced.inlined_graph.nodes())
    stream = io.BytesIO()
    torch.jit.save(traced, stream)
    stream.seek(0)
    loaded = torch.jit.load(stream)
    assert list(loaded.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    state = changed(model)
    loaded.load_state_dict(state), model.load_state_dict(state)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_export_under_autocast_normalizes_in_float32():
    model, x = grouped(torch.float32).eval(), images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        exported = torch.export.export(model, (x,), strict=False).module()
        torch.testing.assert_close(exported(x), expected)
