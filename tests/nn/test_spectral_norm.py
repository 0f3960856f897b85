import copy
import importlib
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm

from fastgan.nn import group_spectral_norm, normed_weight, spectral_norm

SpectralNorm = importlib.import_module("fastgan.nn.spectral_norm").SpectralNorm  # the function of its name hides it


def network(norm=lambda layer: layer, dtype=torch.float64):
    torch.manual_seed(1)
    layers = nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)),
        nn.LeakyReLU(0.2),
        nn.Sequential(norm(nn.ConvTranspose2d(8, 5, 3, stride=2)), nn.Tanh()),
        nn.Flatten(),
        norm(nn.Linear(5 * 13 * 13, 7, bias=False)),
    )
    return layers.to(dtype)


def grouped(dtype=torch.float64, **arguments):
    return group_spectral_norm(network(parametrizations.spectral_norm, dtype), **arguments)


def images():
    torch.manual_seed(2)
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def assert_same_state(a, b, **tolerance):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def norms(root):
    return [m for m in root.modules() if isinstance(m, SpectralNorm)]


def vectors(root):
    return [t.clone() for norm in norms(root) for t in (norm._u, norm._v)]


def train(model, steps, seed=3):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(2, 3, 8, 8, generator=generator).to(model[0].bias.dtype)) ** 2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [lambda dtype: network(spectral_norm, dtype), grouped], ids=["layer", "group"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_a_hundred_training_steps_equal_torch(make, dtype, tolerance):
    ours, torchs = make(dtype), network(parametrizations.spectral_norm, dtype)
    assert_same_state(ours, torchs, rtol=0, atol=0)
    train(ours, 100)
    train(torchs, 100)
    assert_same_state(ours, torchs, rtol=tolerance, atol=tolerance)
    outputs = ours.eval()(images().to(dtype)), torchs.eval()(images().to(dtype))
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


def test_grouping_plain_layers_draws_the_vectors_torch_draws():
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(4, 3), nn.ConvTranspose1d(3, 2, 3))
    other = copy.deepcopy(plain)
    torch.manual_seed(6)
    group_spectral_norm(plain)
    torch.manual_seed(6)
    for layer in other:
        parametrizations.spectral_norm(layer)
    assert_same_state(plain, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(5, 3), torch.randn(2, 5)),
        (nn.Conv1d(4, 3, 3), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 3, 3), torch.randn(2, 4, 9, 9)),
        (nn.Conv3d(2, 3, 3), torch.randn(2, 2, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 3, 3), torch.randn(2, 4, 9)),
        (nn.ConvTranspose2d(4, 3, 3), torch.randn(2, 4, 9, 9)),
        (nn.ConvTranspose3d(2, 3, 3), torch.randn(2, 2, 5, 5, 5)),
        (nn.Embedding(6, 4), torch.tensor([1, 5, 1])),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_of_layer(layer, x):
    torch.manual_seed(0)
    torchs = parametrizations.spectral_norm(copy.deepcopy(layer)).double()
    root = group_spectral_norm(nn.Sequential(copy.deepcopy(layer))).double()
    x = x.double() if x.is_floating_point() else x
    root[0].load_state_dict(torchs.state_dict())
    outputs = root(x), torchs(x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for a, b in zip(root.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_vectors_dims_and_names_as_torch():
    for name, dim in (("weight", 1), ("weight", -1), ("bias", None)):
        torch.manual_seed(0)
        ours = spectral_norm(nn.Conv2d(4, 3, 3), name, n_power_iterations=3, dim=dim)
        torch.manual_seed(0)
        torchs = parametrizations.spectral_norm(nn.Conv2d(4, 3, 3), name, n_power_iterations=3, dim=dim)
        torch.testing.assert_close(getattr(ours, name), getattr(torchs, name))
        assert_same_state(ours, torchs)


def test_state_dicts_load_both_ways():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    train(torchs, 3)
    ours.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(ours.eval()(images()), torchs.eval()(images()))
    train(ours.train(), 3)
    torchs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(images()), torchs.eval()(images()))


@pytest.mark.parametrize("with_v", [True, False])
def test_older_state_dict_loads(with_v):
    older = network(older_spectral_norm)
    train(older, 3)
    if not with_v:
        for layer, dim in ((older[0], 0), (older[2][0], 1), (older[4], 0)):
            matrix = layer.weight_orig.detach().movedim(dim, 0).flatten(1)
            layer.weight_v.copy_(nn.functional.normalize(matrix.T @ layer.weight_u, dim=0))
    state = {name: value for name, value in older.state_dict().items() if with_v or not name.endswith("weight_v")}
    ours = grouped()
    ours.load_state_dict(state)
    assert "0.weight_orig" in state  # the caller's dict is left as it was
    torch.testing.assert_close(ours.eval()(images()), older.eval()(images()))


def test_one_update_for_a_layer_used_twice_and_one_op_for_all(monkeypatch):
    calls = []
    update = normed_weight.spectral_norm_update
    monkeypatch.setattr(
        normed_weight, "spectral_norm_update", lambda weights, *a: calls.append(len(weights)) or update(weights, *a)
    )
    layer = nn.Linear(4, 4)
    root = group_spectral_norm(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 2)))
    calls.clear()
    root(torch.randn(2, 4))
    assert calls == [2]


def test_two_forwards_in_one_step_and_no_graph_is_left():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    for _ in range(2):
        gradients = []
        for model in (ours, torchs):
            model.zero_grad()
            (model(images()).sum() - model(images() + 1).square().sum()).backward()
            gradients.append([p.grad for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
    assert all(norm._supplied is None for norm in norms(ours))


def test_gradient_penalty_equals_torch():
    gradients = []
    for model in (grouped(), network(parametrizations.spectral_norm)):
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_called_alone_normalises_itself():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    ours(images()), torchs(images())
    torch.testing.assert_close(ours[0](images()), torchs[0](images()))
    torch.testing.assert_close(ours[0].weight, torchs[0].weight)


def test_a_forward_that_fails_leaves_nothing_behind():
    ours = grouped()
    with pytest.raises(RuntimeError):
        ours(images()[:, :2])
    assert all(norm._supplied is None for norm in norms(ours))
    ours(images()).sum().backward()


def test_nested_roots_update_once():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    group_spectral_norm(ours[2])
    for _ in range(2):
        torch.testing.assert_close(ours(images()), torchs(images()))
    assert_same_state(ours, torchs)


def test_parts_in_eval_mode_keep_their_vectors():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    for model in (ours, torchs):
        model[0].eval()
        model(images())
    assert_same_state(ours, torchs)


def test_eval_computes_once_until_weights_change(monkeypatch):
    ours = grouped().eval()
    calls = []
    scale = normed_weight.spectral_norm_scale
    monkeypatch.setattr(normed_weight, "spectral_norm_scale", lambda *a: calls.append(1) or scale(*a))
    before = vectors(ours)
    with torch.no_grad():
        outputs = [ours(images()) for _ in range(3)]
        assert len(calls) == 1
        assert torch.equal(outputs[0], outputs[2])
        for change in (
            lambda w: w.mul_(-1),
            lambda w: w.data.add_(1),  # leaves no version behind
            lambda w: ours.load_state_dict(network(parametrizations.spectral_norm).state_dict()),
        ):
            change(ours[0].parametrizations.weight.original)
            calls.clear()
            changed = ours(images())
            assert len(calls) == 1
            fresh = network(parametrizations.spectral_norm).eval()
            fresh.load_state_dict(ours.state_dict())
            torch.testing.assert_close(changed, fresh(images()))
    assert all(torch.equal(a, b) for a, b in zip(before, vectors(ours), strict=True))


def test_eval_with_gradients():
    gradients = []
    for model in (grouped().eval(), network(parametrizations.spectral_norm).eval()):
        with torch.no_grad():
            model(images())
        for _ in range(2):
            model(images()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_eval_after_inference_mode():
    ours = grouped().eval().requires_grad_(False)
    with torch.inference_mode():
        ours(images())
    x = images().requires_grad_()
    ours(x).sum().backward()
    assert x.grad is not None


def test_updates_once_a_step():
    ours = grouped(updates="step")
    ours(images())
    first = vectors(ours)
    (ours(images()).sum() - ours(images() + 1).sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(first, vectors(ours), strict=True))
    torch.optim.SGD(ours.parameters(), 0.1).step()
    ours(images())
    assert not any(torch.equal(a, b) for a, b in zip(first, vectors(ours), strict=True))
    assert_same_as_recomputed(ours)


def assert_same_as_recomputed(model):
    fresh = network(parametrizations.spectral_norm).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()), fresh(images()))


def test_deepcopy_shares_nothing():
    ours = grouped()
    ours(images())
    before = copy.deepcopy(ours.state_dict())
    average = copy.deepcopy(ours)
    train(average, 2)
    parametrize.remove_parametrizations(average[0], "weight")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name])
    assert ours[0].weight.requires_grad
    train(ours, 2)
    copied = copy.deepcopy(ours).eval()
    torch.testing.assert_close(copied(images()), ours.eval()(images()), rtol=0, atol=0)
    assert len(norms(average)) == 2


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickle(protocol):
    ours = grouped()
    ours(images())
    loaded = pickle.loads(pickle.dumps(ours, protocol))
    assert_same_state(loaded, ours, rtol=0, atol=0)
    torch.testing.assert_close(loaded(images()), ours(images()), rtol=0, atol=0)
    assert_same_state(loaded, ours, rtol=0, atol=0)
    stream = io.BytesIO()
    torch.save(spectral_norm(nn.Linear(3, 2)), stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).weight.shape == (2, 3)


def test_remove_parametrizations():
    ours = grouped().eval()
    expected = ours(images())
    for layer in (ours[0], ours[2][0]):
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(ours(images()), expected)
    assert type(ours[0]) is nn.Conv2d
    assert isinstance(ours[0].weight, nn.Parameter)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training):
    eager = grouped().train(training)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        outputs = eager(images()), compiled(images())
        torch.testing.assert_close(*outputs)
        gradients = [
            torch.autograd.grad(output.square().sum(), list(model.parameters()))
            for output, model in zip(outputs, (eager, other), strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
    assert_same_state(eager, other)


def test_functional_call():
    ours = grouped().eval()
    replaced = grouped().eval()
    train(replaced.train(), 2)
    replaced.eval()
    with torch.no_grad():
        ours(images())
        output = functional_call(ours, replaced.state_dict(), (images(),))
        torch.testing.assert_close(output, replaced(images()))
        assert not torch.allclose(ours(images()), output)


def test_autocast():
    root = group_spectral_norm(nn.ModuleDict({"linear": nn.Linear(4, 3), "embedding": nn.Embedding(5, 4)}))
    seen = {}
    root.forward = lambda: seen.update({name: layer.weight for name, layer in root.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        root()
    assert seen["linear"].dtype == torch.bfloat16
    assert seen["embedding"].dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in vectors(root))
    wide = copy.deepcopy(root).eval()
    for name in seen:
        torch.testing.assert_close(seen[name], wide[name].weight.to(seen[name].dtype))
    sum(weight.float().square().sum() for weight in seen.values()).backward()
    assert all(p.grad.dtype == torch.float32 for name, p in root.named_parameters() if "weight" in name)


def test_zero_weights_stay_zero_and_recover():
    root = nn.Sequential(nn.Linear(4, 3, bias=False))
    nn.init.zeros_(root[0].weight)
    group_spectral_norm(root)
    assert not root(torch.randn(2, 4)).any()
    root(torch.randn(2, 4)).sum().backward()
    assert root[0].parametrizations.weight.original.grad.isfinite().all()
    nn.init.normal_(root[0].parametrizations.weight.original)
    for _ in range(50):
        root(torch.randn(2, 4))
    torch.testing.assert_close(torch.linalg.matrix_norm(root.eval()[0].weight, 2).item(), 1.0, rtol=1e-4, atol=0)


def test_shared_and_frozen_weights():
    first, second, frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    frozen.weight.requires_grad_(False)
    root = nn.Sequential(first, second, frozen)
    torchs = copy.deepcopy(root)
    for layer in torchs:
        parametrizations.spectral_norm(layer)
    group_spectral_norm(root).load_state_dict(torchs.state_dict())
    x = torch.randn(2, 4)
    for model in (root, torchs):
        model(x).square().sum().backward()
    for a, b in zip(root.parameters(), torchs.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad)


def test_grouping_twice_takes_in_new_layers():
    root = grouped()
    root.append(nn.Linear(7, 2))
    group_spectral_norm(root, updates="step")
    assert len(norms(root)) == 4
    assert len(root._forward_pre_hooks) == 1
    assert root.double()(images()).shape == (2, 2)


def test_bad_input():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="name must be that of a parameter"):
        spectral_norm(layer, "weights")
    with pytest.raises(ValueError, match=r"dim must lie in \[-2, 1\]"):
        spectral_norm(layer, dim=2)
    with pytest.raises(ValueError, match="n_power_iterations must be 1 or more"):
        spectral_norm(layer, n_power_iterations=0)
    with pytest.raises(ValueError, match="eps must be greater than 0"):
        spectral_norm(layer, eps=0.0)
    with pytest.raises(ValueError, match="impl must be one of"):
        group_spectral_norm(nn.Sequential(layer), impl="fast")
    with pytest.raises(ValueError, match="updates must be one of"):
        group_spectral_norm(nn.Sequential(layer), updates="epoch")
    with pytest.raises(ValueError, match="root must contain"):
        group_spectral_norm(nn.ReLU())
    assert not parametrize.is_parametrized(layer)
    with pytest.raises(ValueError, match="has a spectral norm already"):
        spectral_norm(spectral_norm(layer))
