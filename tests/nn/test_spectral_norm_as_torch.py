"""The promises that PyTorch's own tests hold its spectral norms to, kept by one layer's norm and by a group's."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm

from fastgan.nn import group_spectral_norm, spectral_norm
from tests.nn.normed_networks import norms


def single(module, **arguments):
    for layer in module:
        if hasattr(layer, "weight"):
            spectral_norm(layer, **arguments)
    return module


MAKERS = {"single": single, "grouped": group_spectral_norm}
LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 5, 3), (2, 3, 6)),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    layer, shape = LAYERS[request.param]
    return layer().double(), torch.randn(shape, dtype=torch.float64)


def torchs_twin(model):
    """torch's parametrizations on layers with the same weights and vectors."""
    twin = nn.Sequential(*[bare_twin(layer) for layer in model])
    for layer in twin:
        parametrizations.spectral_norm(layer)
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


def bare_twin(layer):
    twin = copy.deepcopy(layer)
    parametrize.remove_parametrizations(twin, "weight")
    return twin


def test_structure(make, layer_and_input):
    layer, x = layer_and_input
    rows = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    raw, cls = layer.weight, type(layer)
    model = make(nn.Sequential(layer))
    norm = layer.parametrizations.weight[0]
    assert layer.parametrizations.weight.original is raw  # an optimizer made before goes on
    assert isinstance(raw, nn.Parameter)
    assert "weight" not in dict(layer.named_parameters())
    assert sorted(dict(norm.named_buffers())) == ["_u", "_v"]
    assert norm._u.shape == (rows,)
    assert norm._v.shape == (raw.numel() // rows,)
    assert list(model.state_dict()) == [
        "0.bias",
        "0.parametrizations.weight.original",
        "0.parametrizations.weight.0._u",
        "0.parametrizations.weight.0._v",
    ]
    assert isinstance(layer, cls)
    for vector in (norm._u, norm._v):
        torch.testing.assert_close(vector.norm().item(), 1.0)
    model(x).sum().backward()
    assert raw.grad is not None
    assert layer.weight.shape == raw.shape


@pytest.mark.parametrize("training", [True, False])
def test_removal(make, layer_and_input, training):
    layer, x = layer_and_input
    cls, names = type(layer), sorted(layer.state_dict())
    model = make(nn.Sequential(layer))
    model(x)
    model.train(training)
    twin = torchs_twin(model)
    for module in (layer, twin[0]):
        parametrize.remove_parametrizations(module, "weight")
    assert type(layer) is cls
    assert sorted(layer.state_dict()) == names
    assert isinstance(layer.weight, nn.Parameter)
    torch.testing.assert_close(layer.weight, twin[0].weight)
    torch.testing.assert_close(model(x), twin(x))  # the group passes over a layer that has lost its norm
    assert not layer._forward_pre_hooks
    make(nn.Sequential(layer))
    model(x)


def test_removal_that_leaves_the_raw_weight(make):
    model = make(nn.Sequential(nn.Linear(5, 7)))
    raw = model[0].parametrizations.weight.original.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert torch.equal(model[0].weight, raw)


def test_vectors_change_only_in_training(make, layer_and_input):
    layer, x = layer_and_input
    model = make(nn.Sequential(layer))
    twin = torchs_twin(model)
    norm, other = layer.parametrizations.weight[0], twin[0].parametrizations.weight[0]
    for training in (True, True, False, False, True):
        before = norm._u.clone(), norm._v.clone()
        outputs = [m.train(training)(x) for m in (model, twin)]
        torch.testing.assert_close(*outputs)
        assert torch.equal(before[0], norm._u) is not training
        assert torch.equal(before[1], norm._v) is not training
        torch.testing.assert_close(norm._u, other._u)
        torch.testing.assert_close(norm._v, other._v)


def test_the_singular_value_is_reached(make):
    torch.manual_seed(0)
    model = make(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double())
    for _ in range(200):
        model(torch.ones(1, 6).double())
    for layer in model.eval():
        raw = layer.parametrizations.weight.original
        torch.testing.assert_close(layer.weight, raw / torch.linalg.matrix_norm(raw, 2))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_two_forwards_in_one_graph(make, frozen):
    """Each forward is differentiated with the vectors that it had, though the second has moved them on."""
    torch.manual_seed(0)
    model = make(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()) if make is not single else None
    model = model or nn.Sequential(
        single([nn.Linear(4, 3).double()])[0], nn.Tanh(), single([nn.Linear(3, 2).double()])[0]
    )
    vectors = {name: b.clone() for name, b in model.named_buffers()}
    weight = model[0].parametrizations.weight.original.requires_grad_(not frozen)

    def two_forwards(x, *_):
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(vectors[name])
        return model(x) + model(2 * x).square()

    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(two_forwards, (x,))
    assert torch.autograd.gradgradcheck(two_forwards, (x,))
    if not frozen:
        assert torch.autograd.gradcheck(lambda w: evaluated(model, w, x), (weight,))
        assert torch.autograd.gradgradcheck(lambda w: evaluated(model, w, x), (weight,))


def evaluated(model, weight, x):
    model.eval()
    return functional_call(model, {"0.parametrizations.weight.original": weight}, (x,)).square()


def test_gradient_penalty_equals_torch(make, layer_and_input):
    layer, x = layer_and_input
    model = make(nn.Sequential(layer))
    gradients = []
    for m in (model, torchs_twin(model)):
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(m(images).square().sum(), images, create_graph=True)
        (gradient.flatten(1).norm(dim=1) - 1).square().mean().backward()
        gradients.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(*gradients)


def test_states_load_both_ways(make, layer_and_input):
    layer, x = layer_and_input
    model = make(nn.Sequential(layer))
    twin = torchs_twin(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2).add_(0.1)
    for _ in range(3):
        twin(x)
    model.load_state_dict(twin.state_dict())
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    for _ in range(3):
        model.train()(x)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("saved", ["now", "before versions", "without v"])
def test_states_of_the_older_hook_load(make, layer_and_input, saved):
    """State dicts of torch's first release have no version, no v, and the normalized weight besides the raw one."""
    layer, x = layer_and_input
    older = nn.Sequential(older_spectral_norm(copy.deepcopy(layer)))
    for _ in range(4):
        older(x)
    state = older.state_dict()
    if saved != "now":
        state = {name: value.clone() for name, value in state.items()}  # no metadata
    if saved == "without v":
        dim = older[0]._forward_pre_hooks[next(iter(older[0]._forward_pre_hooks))].dim
        matrix = state["0.weight_orig"].movedim(dim, 0).flatten(1)
        older[0].weight_v.copy_(nn.functional.normalize(matrix.T @ older[0].weight_u, dim=0))
        del state["0.weight_v"]
        state["0.weight"] = torch.randn_like(state["0.weight_orig"])
    model = make(nn.Sequential(layer))
    model.load_state_dict(state)
    torch.testing.assert_close(model.eval()(x), older.eval()(x))


def test_states_that_do_not_fit_are_refused(make):
    model = make(nn.Sequential(nn.Linear(5, 7)))
    state = model.state_dict()
    for name in list(state):
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            model.load_state_dict({k: v for k, v in state.items() if k != name})
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            model.load_state_dict(state | {name: torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        model.load_state_dict(state | {"extra": torch.zeros(1)})


def test_copies_and_pickles(make, layer_and_input):
    layer, x = layer_and_input
    model = make(nn.Sequential(layer))
    model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert type(other[0]).__name__ == type(layer).__name__
        before = {name: value.clone() for name, value in model.state_dict().items()}
        twin = torchs_twin(model)
        for _ in range(2):
            torch.testing.assert_close(other(x), twin(x))
        other(x).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(norms(copy.deepcopy(copy.deepcopy(model)))) == 1


def test_copies_during_a_forward(make):
    """Such a copy is not inside a forward: it normalizes by itself."""
    model = make(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).eval()
    copies = []
    model[1].register_forward_pre_hook(lambda *_: copies or copies.append(copy.deepcopy(model[1])))
    x = torch.randn(2, 4)
    model(x)
    with torch.no_grad():
        copies[0].parametrizations.weight.original.copy_(torch.randn(4, 4))
        torch.testing.assert_close(copies[0].weight, torchs_twin(nn.Sequential(copies[0]).eval())[0].weight)


@pytest.mark.parametrize("updates_under_autocast", [True, False])
def test_autocast(make, updates_under_autocast):
    torch.manual_seed(0)
    model = make(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)))
    twin, x = torchs_twin(model), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=updates_under_autocast):
        output = model(x)
    wide = twin(x)
    assert output.dtype == (torch.bfloat16 if updates_under_autocast else torch.float32)
    tolerance = 2e-2 if updates_under_autocast else 1e-5  # bfloat16 has 8 bits, and there are two layers
    torch.testing.assert_close(output.float(), wide, rtol=tolerance, atol=tolerance)
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, other)  # of the iterations in float32
    output.float().square().sum().backward(), wide.square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=5 * tolerance, atol=5 * tolerance * q.grad.abs().max().item())


def test_meta_device(make):
    with torch.device("meta"):
        model = make(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)))
        for training in (True, False):
            assert model.train(training)(torch.randn(4, 8)).shape == (4, 3)
    assert all(t.is_meta for t in model.state_dict().values())
    real = make(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)))
    x = torch.randn(4, 8)
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    torch.testing.assert_close(model.eval()(x), real.eval()(x))
    moved = copy.deepcopy(real).to("meta")
    assert moved(x.to("meta")).is_meta
    moved.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(moved(x), real(x))


def test_functional_call_with_buffers(make, layer_and_input):
    layer, x = layer_and_input
    model = make(nn.Sequential(layer))
    twin = torchs_twin(model)
    outputs = []
    for m in (model, twin):
        state = {name: value.detach().clone() for name, value in m.state_dict().items()}
        state["0.parametrizations.weight.original"].mul_(2).add_(1).requires_grad_()
        before = {name: value.clone() for name, value in m.state_dict().items()}
        output = functional_call(m, state, (x,))
        (gradient,) = torch.autograd.grad(output.square().sum(), state["0.parametrizations.weight.original"])
        outputs.append([output, gradient, state["0.parametrizations.weight.0._u"]])
        assert all(torch.equal(value, before[name]) for name, value in m.state_dict().items())
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("ensemble", [False, True])
def test_vmap_of_grad(make, layer_and_input, ensemble):
    """Gradients of single samples, and of networks whose weights are stacked."""
    layer, x = layer_and_input
    models = [make(nn.Sequential(copy.deepcopy(layer))) for _ in range(3)]
    for i, model in enumerate(models):
        model[0].parametrizations.weight.original.data.add_(i)
        model(x)
        model.eval()
    results = []
    for group in (models, [torchs_twin(model) for model in models]):
        parameters, buffers = stack_module_state(group) if ensemble else (dict(group[0].named_parameters()), {})

        def loss(parameters, buffers, sample, first=group[0]):
            return functional_call(first, (parameters, buffers), (sample[None],)).square().sum()

        dims = (0, 0, None) if ensemble else (None, None, 0)
        detached = {name: p.detach() for name, p in parameters.items()}
        results.append(vmap(grad(loss), dims)(detached, buffers, x[0] if ensemble else x))
    torch.testing.assert_close(*results)
