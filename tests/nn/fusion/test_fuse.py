"""``fuse`` on layers and blocks in the manner of code that people publish."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm

from fastgan.nn import SelfAttention2d, fuse, unfuse


class Stored:
    """A norm that keeps u as a buffer (1, rows), renews v and then u at each access, and stores only while training."""

    def keep(self, rows):
        self.num_itrs, self.num_svs, self.eps = 1, 1, 1e-12
        self.register_buffer("u0", torch.randn(1, rows))
        self.register_buffer("sv0", torch.ones(1))

    def W_(self):
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.u0 @ matrix, eps=self.eps)
            u = F.normalize(v @ matrix.T, eps=self.eps)
        sigma = (u @ matrix @ v.T).squeeze()
        if self.training:
            with torch.no_grad():
                self.u0.copy_(u)
                self.sv0.fill_(sigma)
        return self.weight / sigma


class StoredConv2d(nn.Conv2d, Stored):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.keep(self.out_channels)

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding)


class Frobenius(StoredConv2d):
    """The same names, another norm."""

    def W_(self):
        return self.weight / self.weight.norm()


class Wrapper(nn.Module):
    """A norm that holds the weight of the layer it wraps, and is renewed at every forward."""

    def __init__(self, module):
        super().__init__()
        self.module, self.name, self.power_iterations = module, "weight", 1
        weight = module.weight.data
        del module._parameters["weight"]
        module.weight_bar = nn.Parameter(weight)
        module.weight_u = nn.Parameter(F.normalize(torch.randn(len(weight)), dim=0), requires_grad=False)
        module.weight_v = nn.Parameter(F.normalize(torch.randn(weight[0].numel()), dim=0), requires_grad=False)

    def forward(self, x):
        m = self.module
        matrix = m.weight_bar.flatten(1)
        m.weight_v.data = F.normalize(matrix.data.T @ m.weight_u.data, dim=0)
        m.weight_u.data = F.normalize(matrix.data @ m.weight_v.data, dim=0)
        m.weight = m.weight_bar / m.weight_u.dot(matrix @ m.weight_v)
        return m.forward(x)


class Attention(nn.Module):
    """Self-attention whose parts are called ``names``; eager, with maps."""

    def __init__(self, channels, names, norm=lambda c: c, pool=True, scaled=False, bias=False):
        super().__init__()
        self.names, self.pool, self.scaled = names, pool, scaled
        theta, phi, g, o, gamma = names
        d, e = channels // 8, channels // 2 if o else channels
        for name, c_in, c_out in ((theta, channels, d), (phi, channels, d), (g, channels, e), (o, e, channels)):
            if name:
                setattr(self, name, norm(nn.Conv2d(c_in, c_out, 1, bias=bias)))
        setattr(self, gamma, nn.Parameter(torch.zeros(1)))

    def forward(self, x, y=None):
        theta, phi, g, o, gamma = (getattr(self, name) if name else None for name in self.names)
        shrink = (lambda t: F.max_pool2d(t, 2)) if self.pool else (lambda t: t)
        q, k, v = theta(x).flatten(2), shrink(phi(x)).flatten(2), shrink(g(x)).flatten(2)
        logits = q.transpose(1, 2) @ k
        out = v @ torch.softmax(logits * q.shape[1] ** -0.5 if self.scaled else logits, -1).transpose(1, 2)
        out = out.unflatten(2, x.shape[2:])
        return x + gamma * (out if o is None else o(out))


class UsesLabel(Attention):
    def forward(self, x, y):
        return super().forward(x) + y


CANONICAL = ("theta", "phi", "g", "o", "gamma")
SIMPLE = ("query_conv", "key_conv", "value_conv", None, "gamma")
SN_FAMILY = ("snconv1x1_theta", "snconv1x1_phi", "snconv1x1_g", "snconv1x1_attn", "sigma")
NORMS = {
    "parametrization": parametrizations.spectral_norm,
    "older": older_spectral_norm,
    "stored": lambda c: StoredConv2d(c.in_channels, c.out_channels, c.kernel_size, bias=c.bias is not None),
    "wrapper": Wrapper,
}


def critic(norm):
    return nn.Sequential(
        norm(nn.Conv2d(3, 16, 3)),
        nn.LeakyReLU(0.2),
        Attention(16, CANONICAL, norm),
        norm(nn.Conv2d(16, 4, 3, bias=False)),
    )


def images():
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()  # one forward: the wrapper's own gradients through two are not the true ones
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(model, steps=5):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return torch.stack([step(model, optimizer, images() + i) for i in range(steps)])


def assert_same_state(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("norm", NORMS)
def test_a_fused_model_trains_as_the_original_and_their_checkpoints_are_the_same(norm):
    original = critic(NORMS[norm])
    nn.init.constant_(original[2].gamma, 0.5)
    train(original, 1)  # so that there is history in plain attributes, which a plain deepcopy refuses
    fused, report = fuse(original, images(), copy=True)
    assert not report.refused, str(report)
    assert len(report.swapped) == 7
    assert isinstance(fused[2], SelfAttention2d)
    assert_same_state(fused, original)
    torch.testing.assert_close(train(fused), train(original), rtol=1e-4, atol=1e-6)
    assert_same_state(fused, original)

    checkpoint = copy.deepcopy(original.state_dict())
    train(fused, 1)
    fused.load_state_dict(checkpoint)
    torch.testing.assert_close(fused.eval()(images()), original.eval()(images()), rtol=1e-4, atol=1e-6)
    train(fused.train(), 2)
    original.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fused.eval()(images()), original.eval()(images()), rtol=1e-4, atol=1e-6)

    restored = unfuse(fused)
    assert [type(m) for m in restored.modules()] == [type(m) for m in original.modules()] or norm == "parametrization"
    assert type(restored[2]) is Attention
    assert not restored._forward_pre_hooks
    train(restored.train(), 2)
    train(original.train(), 2)
    assert_same_state(restored, original)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_penalty_through_a_fused_model(norm):
    original = critic(NORMS[norm]).double()
    nn.init.constant_(original[2].gamma, 0.5)
    fused, _ = fuse(original, copy=True)
    gradients = []
    for model in (original, fused):
        x = images().double().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (gradient.flatten(1).norm(dim=1) - 1).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["older", "stored"])
def test_compiled_whole(norm):
    fused, _ = fuse(critic(NORMS[norm]))
    other = copy.deepcopy(fused)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images()), fused(images()), rtol=1e-4, atol=1e-6)
    assert_same_state(other, fused)


@pytest.mark.parametrize("norm", NORMS)
def test_one_grouped_update_per_forward(norm, monkeypatch):
    from fastgan.nn import normed_weight

    sizes = []
    op = normed_weight.update_vectors
    monkeypatch.setattr(normed_weight, "update_vectors", lambda w, *a: sizes.append(len(w)) or op(w, *a))
    fused, _ = fuse(critic(NORMS[norm]))
    sizes.clear()
    fused(images())
    assert sizes == [6]
    if norm != "wrapper":  # which makes updates in eval mode
        fused.eval()
        sizes.clear()
        with torch.no_grad():
            fused(images()), fused(images())
        assert sizes == [6]


@pytest.mark.parametrize("names", [CANONICAL, SIMPLE, SN_FAMILY, ("f", "g", "h", "o", "gamma")], ids=lambda n: n[0])
@pytest.mark.parametrize(("pool", "scaled", "bias"), [(True, False, False), (False, True, True)])
def test_attention_blocks_by_structure(names, pool, scaled, bias):
    block = Attention(16, names, pool=pool, scaled=scaled, bias=bias)
    fused, report = fuse(block, copy=True)
    assert isinstance(fused, SelfAttention2d), str(report)
    assert f"pool={pool}" in repr(fused)
    nn.init.constant_(getattr(block, names[-1]), 0.5)
    fused.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 6, 8)
    torch.testing.assert_close(fused(x, None), block(x))
    assert type(unfuse(fused)) is Attention


def test_other_blocks_are_left_alone():
    class Scattering(Attention):
        """Softmax over the wrong axis: the parts of a known block, but not its function."""

        def forward(self, x):
            q, k, v = (getattr(self, n)(x).flatten(2) for n in self.names[:3])
            return x + self.gamma * (v @ torch.softmax(q.transpose(1, 2) @ k, -1)).unflatten(2, x.shape[2:])

    class Remembering(Attention):
        """A block that keeps its map, which a fused block would not compute."""

        def forward(self, x):
            y = super().forward(x)
            self.last = y.detach()
            return y

    class Listing(Attention):
        def forward(self, x):
            return [super().forward(x), None]

    cases = {
        "differ": Scattering(16, SIMPLE, pool=False),
        "returns a list": Listing(16, CANONICAL),
        "does not run alone": UsesLabel(16, CANONICAL),
        "writes its attribute last": Remembering(16, CANONICAL),
    }
    for reason, block in cases.items():
        fused, report = fuse(nn.Sequential(block))
        assert type(fused[0]) is type(block)
        assert len(report.refused) == 1
        assert reason in report.refused[0].reason, str(report)


def test_blocks_that_an_implementation_cannot_run_are_left_alone():
    wide = Attention(264, SIMPLE, pool=False)
    fused, report = fuse(nn.Sequential(wide), impl="triton")
    assert type(fused[0]) is Attention
    assert "fastgan's does not run in its place (ValueError" in report.refused[0].reason
    model = nn.Sequential(Attention(16, SIMPLE, pool=False), nn.Dropout()).train()
    fused, _ = fuse(model)
    fused[0].query_conv.eval()
    assert not unfuse(fused)[0].query_conv.training  # each part keeps its mode


def test_other_norms_are_left_alone():
    twice = parametrizations.spectral_norm(nn.Linear(4, 4))
    parametrizations.spectral_norm(twice)
    vector = parametrizations.spectral_norm(nn.Linear(4, 4), "bias")
    many = StoredConv2d(4, 4, 1)
    many.W_ = None  # an attribute of that name, of the user's own
    other = StoredConv2d(4, 4, 1)
    other.eps = 10.0  # so large that the norms are divided by it in one and clamped in another manner below
    type_of_other = type(
        "Other", (StoredConv2d,), {"W_": lambda self: self.weight / (self.u0.norm() + self.weight.norm())}
    )
    other.__class__ = type_of_other
    fused, report = fuse(nn.ModuleList([twice, vector, many, other]))
    reasons = {part.path: part.reason for part in report.refused}
    assert not report.swapped
    assert "further parametrizations" in reasons["0"]
    assert "1 dimension" in reasons["1"]
    assert "2" not in reasons
    assert "differ" in reasons["3"]
    assert not fused._forward_pre_hooks


def test_a_copy_leaves_the_model_as_it_was_and_the_default_fuses_it_in_place():
    model = critic(older_spectral_norm)
    before, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    rng = torch.random.get_rng_state()
    fuse(model, images(), copy=True)
    assert [type(m) for m in model.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.random.get_rng_state())
    parameters = list(model.parameters())
    same, _ = fuse(model, images())
    assert same is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # an optimizer's still
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(m.training for m in model.modules())


def test_with_an_example_the_whole_model_decides():
    class Ends(nn.Module):
        """Two heads, of which a forward reaches one."""

        def __init__(self):
            super().__init__()
            self.body, self.used, self.idle = (older_spectral_norm(nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x):
            return self.used(self.body(self.body(x)))

    model = Ends()
    fused, report = fuse(model, torch.randn(2, 4), copy=True)
    assert [part.path for part in report.refused] == ["idle"]
    assert "whole model" in report.refused[0].reason
    for _ in range(2):  # body is used twice and has two updates, as before
        x = torch.randn(2, 4)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-6)
    assert_same_state(fused, model)


@pytest.mark.parametrize("norm", NORMS)
def test_copies_and_pickles_of_fused_models(norm):
    fused, _ = fuse(critic(NORMS[norm]))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        before = copy.deepcopy(fused.state_dict())
        first = train(other, 2)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), fused.state_dict().values(), strict=True))
        fused_again = copy.deepcopy(unfuse(copy.deepcopy(fused)))
        torch.testing.assert_close(train(fused_again, 2), first, rtol=1e-4, atol=1e-6)


def test_older_norm_of_a_fused_model_can_be_removed():
    fused, _ = fuse(critic(older_spectral_norm))
    fused(images())
    expected = fused.eval()(images())
    torch.nn.utils.remove_spectral_norm(fused[0])
    torch.testing.assert_close(fused(images()), expected)
    assert "0.weight" in fused.state_dict()
    parametrized, _ = fuse(critic(parametrizations.spectral_norm))
    parametrize.remove_parametrizations(parametrized[0], "weight")
    parametrized(images())


def test_fusing_twice_adds_what_is_new():
    fused, _ = fuse(critic(older_spectral_norm))
    fused.append(older_spectral_norm(nn.Conv2d(4, 2, 1)))
    again, second = fuse(fused)
    assert again is fused
    assert [part.path for part in second.parts] == ["4"]
    assert len(again._forward_pre_hooks) == 1
    again(images())
    assert not unfuse(again)._forward_pre_hooks


def test_bad_input():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        fuse(lambda x: x)
    with pytest.raises(ValueError, match="impl must be one of"):
        fuse(nn.Linear(2, 2), impl="fast")
    with pytest.raises(ValueError, match="example_input must be an input that model accepts"):
        fuse(critic(older_spectral_norm), torch.randn(2, 4))


def replicated(model):
    """Return a replica as ``nn.DataParallel`` makes it for one of its devices."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        for name, child in module._modules.items():
            setattr(replicas[module], name, None if child is None else replicas[child])
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            setattr(replicas[module], name, None if value is None else value * 1)
    return replicas[model]


@pytest.mark.parametrize("norm", ["older", "stored", "wrapper"])
def test_data_parallel_replicas_take_their_own_tensors(norm):
    model, _ = fuse(critic(NORMS[norm]))
    nn.init.constant_(model[2].gamma, 0.5)
    expected, replica = copy.deepcopy(model)(images()), replicated(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p))  # a replica that read the original's weights would show it
    torch.testing.assert_close(replica(images()), expected)
