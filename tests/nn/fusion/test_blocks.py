"""Self-attention blocks that ``fuse`` recognizes, features that a fused block keeps, and blocks that are left alone."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgan.nn import SelfAttention2d, fuse, unfuse


def over_queries(f, g, h):
    """h softmax(f^T g) with the softmax over the first axis."""
    return h.flatten(2) @ torch.softmax(f.flatten(2).mT @ g.flatten(2), dim=1)


def over_keys(q, k, v, scale=1.0):
    return v.flatten(2) @ torch.softmax(scale * (q.flatten(2).mT @ k.flatten(2)), dim=-1).mT


class Block(nn.Module):
    """Four layers called ``names``, the fourth None if there is none, and a scalar."""

    def __init__(self, names, layer=nn.Conv2d, channels=16, qk=4, value=None):
        super().__init__()
        self.names, value = names, channels if value is None else value
        sizes = ((channels, qk), (channels, qk), (channels, value), (value, channels))
        for name, (c_in, c_out) in zip(names, sizes, strict=False):
            self.add_module(name, layer(c_in, c_out) if layer is nn.Linear else layer(c_in, c_out, 1))
        self.gamma = nn.Parameter(torch.zeros(1))

    def parts(self, x):
        return [getattr(self, name)(x) for name in self.names[:3]]

    def forward(self, x):
        return x + self.gamma * over_keys(*self.parts(x)).view_as(x)


class Exchanged(Block):
    def forward(self, x):
        flat = x if isinstance(getattr(self, self.names[0]), nn.Conv2d) else x.flatten(2)
        return x + self.gamma * over_queries(*self.parts(flat)).view_as(x)


class Rows(Block):
    def forward(self, x):
        q, k, v = (part.mT for part in self.parts(x.flatten(2).mT))
        return x + self.gamma * over_keys(q, k, v).view_as(x)


class Pooled(Block):
    """Pools with views that odd sizes do not fit."""

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = self.parts(x)
        k, v = (F.max_pool2d(t, 2).view(b, -1, h * w // 4) for t in (k, v))
        return x + self.gamma * getattr(self, self.names[3])(over_keys(q, k, v).view(b, -1, h, w))


class Normalized(nn.Module):
    """The block of taming-transformers: a norm before it, a projection of zeros at its end, no scalar."""

    def __init__(self, channels=32):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x):
        h = self.norm(x)
        o = over_keys(self.q(h), self.k(h), self.v(h), self.q.out_channels**-0.5)
        return x + self.proj_out(o.view_as(x))


class WithMap(Block):
    """Returns its map: as (B, N, M), transposed, or as maps of (height, width)."""

    form = "flat"

    def forward(self, x):
        q, k, v = (t.flatten(2) for t in self.parts(x))
        weights = torch.softmax(q.mT @ k, dim=-1)
        y = x + self.gamma * (v @ weights.mT).view_as(x)
        returned = {"flat": weights, "transposed": weights.mT, "2d": weights.unflatten(2, x.shape[2:])}
        return y, returned[self.form]


def with_map(form):
    block = WithMap(("query_conv", "key_conv", "value_conv"))
    block.form = form
    return block


PUBLIC = {
    "fastai": lambda: Exchanged(("query", "key", "value"), nn.Conv1d),
    "query of 2d, over queries": lambda: Exchanged(("query", "key", "value")),
    "f g h of the paper": lambda: Exchanged(("f", "g", "h")),
    "conv_f": lambda: Exchanged(("conv_f", "conv_g", "conv_h")),
    "W_f": lambda: Block(("W_f", "W_g", "W_h")),
    "q k v": lambda: Block(("q", "k", "v")),
    "to_q": lambda: Rows(("to_q", "to_k", "to_v"), nn.Linear),
    "q_proj": lambda: Block(("q_proj", "k_proj", "v_proj")),
    "names that say nothing": lambda: Block(("first", "second", "third")),
    "even sizes": lambda: Pooled(("theta", "phi", "g", "o"), value=8),
    "taming-transformers": Normalized,
    "map": lambda: with_map("flat"),
    "transposed map": lambda: with_map("transposed"),
    "map of maps": lambda: with_map("2d"),
}


def parts_of(y):
    return y if isinstance(y, tuple) else (y,)


def assert_equal_functions(a, b, x):
    for first, second in zip(parts_of(a(x)), parts_of(b(x)), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def in_random_state(block):
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.rand_like(p))
    return block


@pytest.mark.parametrize("name", PUBLIC)
def test_blocks_of_public_code(name):
    torch.manual_seed(0)
    original = in_random_state(PUBLIC[name]())
    fused, report = fuse(original, copy=True)
    assert isinstance(fused, SelfAttention2d), str(report)
    assert isinstance(fused, type(original))
    channels = next(p for p in original.parameters() if p.ndim > 1).shape[1]
    x = torch.randn(2, channels, 6, 4)
    assert_equal_functions(fused, original, x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(other, SelfAttention2d)
        assert_equal_functions(other, original, x)
        assert type(unfuse(other)) is type(original)
        assert_equal_functions(other, original, x)
    original.load_state_dict(fused.state_dict())
    fused.load_state_dict(original.state_dict())

    penalties = []
    for model in (original.double(), fused.double()):  # float32 leaves noise in the gradient of a bias of the keys
        y = x.double().requires_grad_()
        (gradient,) = torch.autograd.grad(parts_of(model(y))[0].square().sum(), y, create_graph=True)
        loss = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        penalties.append([torch.zeros(()).double() if g is None else g for g in found])
    largest = max(float(g.abs().max()) for g in penalties[0])
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(b.expand_as(a), a.expand_as(b), rtol=1e-9, atol=1e-11 * largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fastai", "taming-transformers", "f g h of the paper"])
def test_half_precision_takes_no_role_or_scale_for_another(name, dtype):
    torch.manual_seed(0)
    original = in_random_state(PUBLIC[name]())
    fused, report = fuse(copy.deepcopy(original).to(dtype))
    assert isinstance(fused, SelfAttention2d), str(report)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    channels = next(p for p in original.parameters() if p.ndim > 1).shape[1]
    x = torch.randn(2, channels, 6, 4, dtype=torch.float64)
    assert_equal_functions(fused.double(), original.to(dtype).double(), x)


def test_sizes_that_a_block_refuses_are_still_refused():
    fused, _ = fuse(PUBLIC["even sizes"](), copy=True)
    with pytest.raises(RuntimeError, match="Expected size"):
        fused(torch.randn(2, 16, 7, 5))


def test_names_describe_other_blocks():
    class Other(nn.Module):
        """Four 1x1 layers that could be anything, deeper than a child, and a convolution that is not of the block."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.ModuleDict({"layer": nn.Conv2d(16, 16, 1)}) for _ in range(3))
            self.idle = nn.Conv2d(16, 16, 3)

        def forward(self, x):
            q, k, v = (part["layer"](x) for part in (self.c, self.a, self.b))
            return x + over_keys(q, k, v).view_as(x)

    names = {"theta": "c.layer", "phi": "a.layer", "g": "b.layer"}
    fused, report = fuse(nn.Sequential(Other()), copy=True)
    assert not report.parts
    fused, report = fuse(nn.Sequential(Other()), names=names)
    assert isinstance(fused[0], SelfAttention2d), str(report)
    fused, report = fuse(nn.Sequential(Other()), names=[names, {"theta": "a", "phi": "b", "g": "c"}])
    assert isinstance(fused[0], SelfAttention2d), str(report)
    with pytest.raises(ValueError, match="names must fit a module of the model"):
        fuse(nn.Sequential(Other()), names={"theta": "q", "phi": "k", "g": "v"})
    with pytest.raises(ValueError, match="names must map theta, phi and g"):
        fuse(nn.Sequential(Other()), names={"theta": "c"})
    with pytest.raises(ValueError, match="names must map theta, phi and g"):
        fuse(nn.Sequential(Other()), names={**names, "beta": "c"})


class Owner(Exchanged):
    """Its own attributes bear the names of SelfAttention2d's, and its own methods use them."""

    def __init__(self):
        super().__init__(("f", "g", "h"))
        self.pool, self.scale, self.impl = nn.Identity(), 3, "mine"
        self.in_channels = "sixteen"

    def amap(self, x):
        return torch.softmax(self.pool(self.f(x)).flatten(2).mT @ self.g(x).flatten(2), dim=1) * self.scale

    def extra_repr(self):
        return f"mine, {super().extra_repr()}"


def test_a_fused_block_keeps_its_own_attributes_and_methods():
    original = in_random_state(Owner())
    fused, report = fuse(original, copy=True)
    assert report.swapped
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(fused.amap(x), original.amap(x))
    assert (fused.scale, fused.impl, fused.in_channels) == (3, "mine", "sixteen")
    assert "mine" in repr(fused)
    assert type(fused).__name__ == "Owner"
    assert type(type(fused)()) is Owner
    assert set(fused.state_dict()) == set(original.state_dict())


def test_a_class_that_is_called_gives_an_unfused_block():
    fused, _ = fuse(Block(("q", "k", "v")))
    other = type(fused)(("q", "k", "v"))
    assert type(other) is Block
    other(torch.randn(1, 16, 4, 4))


def test_blocks_changed_after_fuse_run_their_own_forward():
    class Flagged(Block):
        flag = None

        def __init__(self):
            super().__init__(("q", "k", "v"))
            self.flag = False

        def forward(self, x, mask=None):
            return super().forward(x) * (2 if self.flag else 1) * (1 if mask is None else mask)

    x = torch.randn(2, 16, 4, 4)
    fused, report = fuse(in_random_state(Flagged()))
    assert report.swapped, str(report)
    plain = fused(x)
    torch.testing.assert_close(fused(x, 3.0), 3 * plain)
    torch.testing.assert_close(fused(x, mask=torch.zeros(())), 0 * plain)
    fused.flag = True
    with pytest.warns(UserWarning, match="its attribute flag was changed after fuse"):
        torch.testing.assert_close(fused(x), 2 * plain)
    fused.flag = False
    fused.q = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 4, 1))
    with pytest.warns(UserWarning, match="q was replaced after fuse"):
        fused(x)


def test_dispatch_by_class_of_a_whole_model():
    class Dispatching(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv2d(16, 16, 1), Block(("q", "k", "v")), nn.Conv2d(16, 16, 1)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x) if isinstance(block, Block) else block(x) + 1
            return x + sum(type(block).__name__ == "Block" for block in self.blocks)

    model, x = Dispatching(), torch.randn(2, 16, 6, 6)
    fused, report = fuse(model, x, copy=True)
    assert [part.path for part in report.swapped] == ["blocks.1"], str(report)
    torch.testing.assert_close(fused(x), model(x))


class Drawing(nn.Module):
    """Changes everything that a forward can change."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("absent", None)
        self.count, self.losses, self.rng = 0, [], np.random.default_rng(0)
        self.helper = Helper()
        self.torch_rng = torch.Generator().manual_seed(0)

    def forward(self, x):
        y = self.conv(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
        self.absent = self.mean
        self.count += 1
        self.losses.append(y.detach().mean())
        self.helper.calls += 1
        self.helper.last["y"] = y
        self.fresh = random.random() + np.random.rand()  # noqa: NPY002
        self.conv.register_forward_hook(lambda *_: None)
        noise = self.rng.normal() + torch.rand((), generator=self.torch_rng) + torch.rand(())
        return y - self.mean + noise * 0


class Helper:
    def __init__(self):
        self.calls, self.last = 0, {}


def test_trials_leave_a_model_as_it_was():
    model, x = Drawing(), torch.randn(2, 3, 8, 8)
    model.conv.eval()
    rng = model.rng.bit_generator.state, model.torch_rng.get_state()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    mean = model.mean
    _, report = fuse(model, x)
    assert str(report).startswith("1 swapped, 0 left"), str(report)
    assert model.mean is mean
    assert mean == 0
    assert model.absent is None
    assert (model.count, model.losses, model.helper.calls, model.helper.last) == (0, [], 0, {})
    assert not hasattr(model, "fresh")
    assert not model.conv._forward_hooks
    assert model.training
    assert not model.conv.training
    assert model.rng.bit_generator.state == rng[0]
    assert torch.equal(model.torch_rng.get_state(), rng[1])
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1][1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_fuse_in_any_context(context):
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 16, 1)), Block(("q", "k", "v")))
    with context():
        _, report = fuse(model, torch.randn(2, 3, 4, 4))
    assert len(report.swapped) == 2, str(report)


def test_an_interrupted_fuse_leaves_the_model_as_it_was():
    class Interrupting(nn.Module):
        def forward(self, x):
            if isinstance(model[0], SelfAttention2d):
                raise KeyboardInterrupt
            return x

    model = nn.Sequential(Block(("q", "k", "v")), Interrupting(), nn.utils.spectral_norm(nn.Conv2d(16, 3, 1)))
    with pytest.raises(KeyboardInterrupt):
        fuse(model, torch.randn(2, 16, 4, 4))
    assert type(model[0]) is Block
    assert not model._forward_pre_hooks
    assert [type(hook).__name__ for hook in model[2]._forward_pre_hooks.values()] == ["SpectralNorm"]


def test_an_optimizer_an_average_and_a_wrapper_made_before_go_on():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 16, 1)), in_random_state(Block(("q", "k", "v"))))
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, twin)]
    average = torch.optim.swa_utils.AveragedModel(model)
    outer = nn.Sequential(model)
    fused, _ = fuse(model)
    assert fused is model
    x = torch.randn(2, 3, 4, 4)
    for _ in range(3):
        for m, optimizer in zip((outer, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    average.update_parameters(model)
    for a, b, c in zip(model.parameters(), twin.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a, c)


def replicated(model):
    """Return a replica as ``nn.DataParallel`` makes it for one of its devices."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica = replicas[module]
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[child])
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            setattr(replica, name, None if value is None else value * 1)
    return replicas[model]


def test_data_parallel_replicas_of_fused_blocks():
    model = nn.Sequential(in_random_state(Block(("q", "k", "v"))), in_random_state(Exchanged(("f", "g", "h"))))
    fuse(model)
    replica = replicated(model)
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(replica(x), model(x))
    replica(x).sum().backward()
    assert model[0].gamma.grad is not None
    replica[0].gamma = replica[0].gamma * 0
    assert not torch.equal(replica(x), model(x))


def test_parts_left_alone_are_in_the_report():
    class CustomHook:
        """The spectral norm of rosinality's code."""

        name = "weight"

        def __call__(self, module, _inputs):
            module.weight = module.weight_orig / module.weight_orig.norm()

    class PropertyWeight(nn.Linear):
        @property
        def W_(self):
            return self.weight / self.weight.norm()

    class SNLinear(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.weight_orig = nn.Parameter(hooked.weight.detach())
    del hooked.weight
    hooked.register_forward_pre_hook(CustomHook())
    model = nn.ModuleDict(
        {
            "hooked": hooked,
            "property": PropertyWeight(4, 4),
            "class": SNLinear(4, 4),
            "normed": nn.utils.spectral_norm(nn.Linear(4, 4)),
            "transformer": nn.TransformerEncoderLayer(4, 2, 8),
            "attention": nn.ModuleDict({"inner": Block(("q", "k", "v"), qk=3, value=5)}),
        }
    )
    _, report = fuse(model)
    reasons = {part.path: part.reason for part in report.refused}
    assert "hook of the class CustomHook sets weight" in reasons["hooked"]
    assert "W_ of PropertyWeight is a property" in reasons["property"]
    assert "SNLinear is not a known kind of spectral norm" in reasons["class"]
    assert "several heads" in reasons["transformer.self_attn"]
    assert "do not fit together" in reasons["attention.inner"]
    assert [part.path for part in report.swapped] == ["normed"]
    assert "transformer.self_attn.in_proj_weight" in report.unnormed
    assert "normed.weight_orig" not in report.unnormed
    assert "transformer.self_attn.in_proj_weight" in str(report)


def test_layers_with_several_singular_vectors_are_refused_by_name():
    class Several(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.num_itrs, self.num_svs, self.eps = 1, 2, 1e-12
            for i in range(2):
                self.register_buffer(f"u{i}", torch.randn(1, 4))
                self.register_buffer(f"sv{i}", torch.ones(1))

        def W_(self):
            return self.weight

    _, report = fuse(nn.Sequential(Several()))
    assert "2 singular vectors (num_SVs)" in report.refused[0].reason
    assert not report.swapped


def test_parameters_without_a_shape_are_refused():
    with pytest.raises(ValueError, match="model must be run once before"):
        fuse(nn.Sequential(nn.LazyLinear(4)))


def test_eager_attention_in_a_fused_model_has_a_third_derivative():
    model = nn.Sequential(in_random_state(Block(("q", "k", "v")))).double()
    fuse(model, impl="eager")
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    value = model(x).pow(2).sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.pow(2).sum()
    assert gradient.isfinite().all()


@pytest.mark.slow
def test_compiled_and_exported_blocks():
    x = torch.randn(2, 32, 6, 4)
    model = nn.Sequential(
        nn.Conv2d(32, 16, 1), in_random_state(PUBLIC["fastai"]()), nn.Conv2d(16, 32, 1), in_random_state(Normalized())
    ).eval()
    fuse(model, x)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", ["fastai", "to_q", "even sizes", "taming-transformers", "transposed map"])
def test_onnx_export_of_fused_blocks(name, dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32 if name.startswith("taming") else 16, 1), in_random_state(PUBLIC[name]()))
    _, report = fuse(model.eval())
    assert report.swapped
    x = torch.randn(1, 3, 4, 6)
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=dynamo, verbose=False)
    graph = onnx.load(str(tmp_path / "model.onnx"))
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    found = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    for actual, expected in zip(found, parts_of(model(x)), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_exported_program_of_fused_blocks_is_read_again(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), in_random_state(PUBLIC["fastai"]())).eval()
    fuse(model)
    x = torch.randn(2, 3, 6, 4)
    torch.export.save(torch.export.export(model, (x,)), str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch.export.load(str(tmp_path / "model.pt2")).module()(x), model(x))
    torch.jit.trace(model, x).save(str(tmp_path / "model.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(x), model(x))
