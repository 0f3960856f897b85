import hashlib
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastgan
from fastgan import backend
from fastgan.backend import BackendWarning, interpreting, resolve, warn_once
from fastgan.nn import SelfAttention2d, group_spectral_norm, spectral_norm
from fastgan.ops import attention, pooled_projection, projection_residual, spectral_norm_scale, spectral_norm_update


def test_status_is_a_readable_table_with_a_reason_for_each_no():
    status = fastgan.backend_status()
    names = [b.name for b in status]
    assert names == ["torch", "triton", "interpreter", "gpu", "extension cpu", "extension cuda"]
    assert len(str(status).splitlines()) == len(names)
    assert all(b.detail for b in status)
    assert torch.__version__ in status["torch"].detail
    with pytest.raises(KeyError, match="no backend 'tpu'"):
        status["tpu"]


def test_auto_uses_the_extension_on_a_cpu_and_warns_once_if_it_is_not_built(monkeypatch):
    if not backend.extension_missing():
        assert resolve("auto", torch.ones(1)) == resolve("extension", torch.ones(1)) == "extension"
    assert resolve("reference", torch.ones(1)) == "reference"
    assert resolve("auto", torch.ones(1, device="meta")) == "reference"
    monkeypatch.setattr(backend, "load_extension", lambda: "not built (test)")
    with pytest.warns(BackendWarning, match="not built") as caught:
        assert [resolve("auto", torch.ones(1)) for _ in range(2)] == ["reference"] * 2
    assert len(caught) == 1
    with pytest.raises(ValueError, match="impl='extension' cannot be used: not built"):
        resolve("extension", torch.ones(1))


@pytest.mark.parametrize("built", ["unknown", backend.EXTENSION_INTERFACE + 1])
def test_an_extension_of_other_sources_falls_back_with_one_warning(built, monkeypatch):
    operators = {} if built == "unknown" else {"interface_version": lambda: built}
    ops = SimpleNamespace(load_library=lambda path: None, fastgan_C=SimpleNamespace(**operators))
    with monkeypatch.context() as context:
        context.setattr(backend, "torch", SimpleNamespace(ops=ops))
        context.setattr(Path, "glob", lambda folder, pattern: [folder / "_C.so"])
        reason = backend.load_extension.__wrapped__()
    assert re.search(rf"_C.so was built from other sources .*\(interface {built}, .*rebuild it", reason)
    monkeypatch.setattr(backend, "load_extension", lambda: reason)
    with pytest.warns(BackendWarning, match="rebuild it: pip install -e") as caught:
        assert [attention(*torch.ones(3, 1, 2, 4)).shape for _ in range(2)] == [(1, 2, 4)] * 2
    assert len(caught) == 1
    for half in ("extension cpu", "extension cuda"):
        assert not fastgan.backend_status()[half].available
        assert fastgan.backend_status()[half].detail == reason


def test_the_interface_number_belongs_to_these_operators():
    """Raise both numbers if an operator's signature changed, then write down the new digest."""
    source = (Path(__file__).parents[1] / "csrc" / "cpu.cpp").read_text()
    (number,) = re.findall(r"int64_t interface_version\(\) \{\s*return (\d+);", source)
    signatures = ["".join(re.findall(r'"(.*?)"', call)) for call in re.findall(r"m\.def\((.*?)\);", source, re.DOTALL)]
    digest = hashlib.sha256("\n".join(sorted(signatures)).encode()).hexdigest()[:16]
    assert (int(number), digest) == (backend.EXTENSION_INTERFACE, "b7ccc08542d20977")


def test_the_extension_takes_only_cpu_tensors():
    with pytest.raises(ValueError, match="impl='extension' needs CPU tensors, got meta"):
        resolve("extension", torch.ones(1, device="meta"))


def test_impossible_requests_say_why(monkeypatch):
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'extension', 'reference', got 'fast'"):
        resolve("fast", torch.ones(1))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        resolve("triton", torch.ones(1))
    monkeypatch.setattr(backend, "_triton", lambda: backend.Backend("triton", False, "import triton failed: broken"))
    with pytest.raises(ValueError, match="import triton failed: broken"):
        resolve("triton", torch.ones(1))


def test_a_warning_is_given_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_once("a backend is missing (test)")
        warn_once("a backend is missing (test)")
    assert [w.category for w in caught] == [BackendWarning]


def test_status_names_kernels_that_spill(monkeypatch):
    monkeypatch.setattr(backend, "SPILLED", ["some_kernel spills in a loop at 64x64 and runs at 64x32"])
    triton = fastgan.backend_status()["triton"]
    assert triton.detail.endswith("; some_kernel spills in a loop at 64x64 and runs at 64x32")


class Calls:
    """Counts the calls of :func:`resolve`, under whatever name it was imported."""

    def __enter__(self):
        self.count = 0
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _seen(self, frame, event, _):
        self.count += event == "call" and frame.f_code is resolve.__code__


def public_calls():
    """Return functions of impl, each of which makes one public call and returns a differentiable result."""
    x = torch.randn(2, 16, 4, 6, requires_grad=True)
    q, k, v = (torch.randn(2, 5, n, requires_grad=True) for n in (3, 3, 4))
    weight, u, w = torch.randn(6, 16, requires_grad=True), torch.randn(6), torch.randn(16)
    vectors = spectral_norm_update([weight], [u], [w])
    rows = torch.randn(2, 24, 6, requires_grad=True)

    def block(impl, **options):
        module = SelfAttention2d(16, impl=impl, **options)
        nn.init.ones_(module.gamma)
        return lambda: module(x)

    def normed(impl):
        module = spectral_norm(nn.Conv2d(16, 3, 1), impl=impl)
        return lambda: module(x)

    def grouped(impl):
        module = group_spectral_norm(nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)), impl=impl)
        return lambda: module(x)

    return {
        "attention": lambda impl: lambda: attention(q, k, v, impl=impl),
        "pooled_projection": lambda impl: lambda: pooled_projection(x, weight, None, 2, impl=impl)[1],
        "projection_residual": lambda impl: lambda: projection_residual(rows, weight.mT, None, x, impl=impl),
        "spectral_norm_update": lambda impl: lambda: spectral_norm_update([weight], [u], [w], impl=impl)[2],
        "spectral_norm_scale": lambda impl: lambda: spectral_norm_scale([weight], *vectors, impl=impl)[0],
        "SelfAttention2d": block,
        "SelfAttention2d without pooling": lambda impl: block(impl, pool=False, value_channels=16),
        "spectral_norm": normed,
        "group_spectral_norm": grouped,
    }


@pytest.mark.parametrize("impl", ["auto", "reference", "triton", "extension"])
@pytest.mark.parametrize("name", public_calls())
def test_the_choice_is_made_once_per_public_call(name, impl):
    if impl == "extension" and backend.extension_missing():
        pytest.skip("the extension is not built")
    if impl == "triton" and not interpreting():
        pytest.skip("the operands are on the CPU")
    call = public_calls()[name](impl)
    with Calls() as calls:
        result = call()
    assert calls.count == 1
    if not result.requires_grad:
        return
    leaves = [leaf for leaf in graph_leaves(result) if leaf.requires_grad]
    with Calls() as calls:
        first = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
    assert calls.count == 0


def graph_leaves(result):
    """The leaves that a result was computed from."""
    nodes, seen, leaves = [result.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves += [node.variable] if hasattr(node, "variable") else []
        nodes += [parent for parent, _ in node.next_functions]
    return leaves


@pytest.mark.parametrize("name", ["attention", "SelfAttention2d", "group_spectral_norm"])
def test_a_compiled_graph_holds_the_choice(name):
    found = []

    def read(graph, _):
        found.extend(node.args for node in graph.graph.nodes if "fastgan" in str(node.target))
        return graph

    torch._dynamo.reset()
    torch.compile(public_calls()[name]("auto"), backend=read, fullgraph=True)()
    assert found
    choice = resolve("auto", torch.ones(1))
    assert all(choice in arguments and "auto" not in arguments for arguments in found)


@pytest.mark.parametrize("name", ["backend_status()", "backend.release_memory()"])
def test_the_package_alone_gives_its_backends(name):
    code = f"import fastgan, sys; assert 'torch' not in sys.modules; fastgan.{name}; from fastgan import backend, nn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not hasattr(fastgan, "nothing")
