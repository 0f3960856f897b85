import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from fastgan.nn import group_spectral_norm, normed_weight
from tests.nn.normed_networks import assert_same_state, grouped, images, network, norms, train, vectors


def test_grouping_plain_layers_draws_the_vectors_torch_draws():
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(4, 3), nn.ConvTranspose1d(3, 2, 3))
    other = copy.deepcopy(plain)
    torch.manual_seed(6)
    group_spectral_norm(plain)
    torch.manual_seed(6)
    for layer in other:
        parametrizations.spectral_norm(layer)
    assert_same_state(plain, other)  # torch's vectors went through products of other instructions


def test_one_update_for_a_layer_used_twice_and_one_op_for_all(monkeypatch):
    calls = []
    update = normed_weight.update_vectors
    monkeypatch.setattr(
        normed_weight, "update_vectors", lambda weights, *a: calls.append(len(weights)) or update(weights, *a)
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
    assert all(not norm._supplied for norm in norms(ours))


def test_gradient_penalty_equals_torch():
    gradients = []
    for model in (grouped(), network(parametrizations.spectral_norm)):
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_called_alone_normalizes_itself():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    ours(images()), torchs(images())
    torch.testing.assert_close(ours[0](images()), torchs[0](images()))
    torch.testing.assert_close(ours[0].weight, torchs[0].weight)


def test_a_forward_that_fails_leaves_nothing_behind():
    ours = grouped()
    with pytest.raises(RuntimeError):
        ours(images()[:, :2])
    assert all(not norm._supplied for norm in norms(ours))
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
    scale = normed_weight.scaled
    monkeypatch.setattr(normed_weight, "scaled", lambda *a: calls.append(1) or scale(*a))
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


def test_updates_once_per_step():
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


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole_and_once(training):
    eager = grouped().train(training)
    other = copy.deepcopy(eager)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, backend=graphs)
    for _ in range(2):
        outputs = eager(images()), compiled(images())
        torch.testing.assert_close(*outputs)
        gradients = [
            torch.autograd.grad(output.square().sum(), list(model.parameters()))
            for output, model in zip(outputs, (eager, other), strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
    assert graphs.frame_count == 1
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


@pytest.mark.parametrize("training", [True, False])
def test_transforms_of_torch_func_and_forward_mode(training):
    results = []
    for model in (grouped().train(training), network(parametrizations.spectral_norm).train(training)):
        weights = {name: p.detach() for name, p in model.named_parameters()}
        directions = {name: torch.ones_like(p) for name, p in weights.items()}

        def loss(weights, x, model=model):
            return functional_call(model, weights, (x,)).square().sum()

        results.append([torch.func.grad(loss)(weights, images())])
        if training:  # torch's own refuses the rest
            continue
        results[-1].append(torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images()[:, None]))
        results[-1].append(torch.func.jvp(lambda w, loss=loss: loss(w, images()), (weights,), (directions,))[1])
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(p, directions[name]) for name, p in weights.items()}
            results[-1].append(forward_ad.unpack_dual(loss(dual, images())).tangent)
    torch.testing.assert_close(*results)


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


def test_functional_call_in_training_differentiates_the_given_parameters():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    gradients = []
    for model in (ours, torchs):
        given = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
        functional_call(model, given, (images(),)).square().sum().backward()
        gradients.append([p.grad for p in given.values()])
        assert all(p.grad is None for p in model.parameters())
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    ours = grouped().train(training)
    ours(images())
    exported = torch.export.export(copy.deepcopy(ours), (images(),)).module()
    for i in range(2):
        torch.testing.assert_close(exported(images() + i), ours(images() + i))
    state = exported.state_dict()
    for name, value in ours.state_dict().items():  # u and v moved along
        torch.testing.assert_close(value, state[name])
    changed = network(parametrizations.spectral_norm).train(training)
    changed[0].parametrizations.weight.original.data.mul_(-3)
    exported.load_state_dict(changed.state_dict())  # the exported graph holds no weight that was normalized before
    torch.testing.assert_close(exported(images()), changed(images()))


def test_change_of_dtype_and_memory_format():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    for change in (
        lambda m: m.float(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.eval(),
        lambda m: m.double(),
    ):
        outputs = []
        for model in (ours, torchs):
            change(model)
            x = images().to(model[0].bias.dtype)
            with torch.no_grad():
                outputs.append([model(x), model(x)])
        torch.testing.assert_close(*outputs)
    assert_same_state(ours, torchs, rtol=1e-6, atol=1e-6)


def test_non_finite_weights_leave_vectors_that_recover():
    ours, torchs = grouped(), network(parametrizations.spectral_norm)
    good = copy.deepcopy(ours.state_dict())
    for model in (ours, torchs):
        model[0].parametrizations.weight.original.data[0, 0, 0, 0] = float("nan")
        assert model(images()).isnan().all()
    assert all(v.isfinite().all() for v in vectors(ours))  # torch's are NaN from now on
    weights = {name: value for name, value in good.items() if "0._" not in name}
    ours.load_state_dict(weights, strict=False)
    assert ours(images()).isfinite().all()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class StoredU(nn.Conv2d):
    """A layer that normalizes its weight by a vector of its own, as BigGAN's."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("u0", torch.randn(1, self.out_channels))
        self.register_buffer("sv0", torch.ones(1))


def doubled_and_normed():
    layer = parametrizations.spectral_norm(nn.Linear(4, 4))
    return parametrize.register_parametrization(layer, "weight", Doubled()) or layer


LEFT_OUT = {
    "parametrized by WeightNorm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "parametrized by Orthogonal": lambda: parametrizations.orthogonal(nn.Conv1d(4, 4, 1)),
    "parametrized by SpectralNorm, Doubled": doubled_and_normed,
    "pruned": lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.5),
    "no parameter": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "not initialized": lambda: nn.LazyLinear(4),
    "normalizes its weight by u0": lambda: StoredU(4, 4, 1),
    "complex": lambda: parametrizations.spectral_norm(nn.Linear(4, 4, dtype=torch.complex64)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reason", LEFT_OUT)
def test_one_warning_names_the_layers_that_are_left_out_and_why(reason):
    left_out, other = LEFT_OUT[reason](), LEFT_OUT[reason]()
    names = list(left_out.state_dict())
    root = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), left_out), other)
    with pytest.warns(UserWarning, match="leaves out 2 of root's layers") as caught:
        group_spectral_norm(root)
    (message,) = [str(w.message) for w in caught if "leaves out" in str(w.message)]
    assert f"1.1 ({type(left_out).__name__}: " in message
    assert f", 2 ({type(left_out).__name__}: " in message
    assert message.count(reason) == 2
    assert list(left_out.state_dict()) == names
    assert len(norms(root)) == 1
    with pytest.raises(ValueError, match=f"root must contain .*, got only root itself .*{reason}"):
        group_spectral_norm(left_out)


def test_no_warning_without_such_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_spectral_norm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Bilinear(4, 4, 4), nn.PReLU()))
        group_spectral_norm(grouped())


def test_weights_that_cannot_be_normalized_are_refused_before_anything_changes():
    for layer in (nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4).to(torch.float8_e4m3fn)):
        root = nn.Sequential(nn.Linear(4, 4), layer)
        with pytest.raises(ValueError, match=r"1\.weight must have dtype float32"):
            group_spectral_norm(root)
        assert not norms(root)
        assert not root._forward_pre_hooks
