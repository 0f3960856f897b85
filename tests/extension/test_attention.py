"""The C++ attention on a CPU against the textbook formula: three passes, every dtype, layout and instruction set."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fastgan import backend
from fastgan.ops import attention
from fastgan.ops._attention import attention_bwd_bwd_op, attention_bwd_op, attention_op
from fastgan.reference.attention import attention_eager
from tests.extension.checks import (
    NAMES,
    assert_same_for_any_number_of_threads,
    assert_three_passes_are_as_accurate,
    extension,
)
from tests.ops.operands import block_operands, operands, three_passes

pytestmark = pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")

# Tiles of 64 keys, strips of 8 rows and blocks of 32: sizes below, at and above their edges.
SHAPES = [
    (2, 5, 4, 3, 6),
    (1, 1, 1, 1, 1),
    (3, 7, 1, 2, 2),
    (1, 8, 64, 16, 32),
    (2, 70, 129, 12, 20),
    (1, 33, 65, 5, 17),
]


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gradients_of_both_orders_match_finite_differences(shape):
    b, n, m, d, e = shape
    inputs = operands((b, n, min(m, 9), d, min(e, 6)))
    assert torch.autograd.gradcheck(functools.partial(extension, scale=0.7), inputs)
    assert torch.autograd.gradgradcheck(functools.partial(extension, scale=0.7), inputs)


@pytest.mark.parametrize("scale", [1.3, 0.0, -0.6])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_eager_in_float64(shape, scale):
    inputs = operands(shape)
    fast = three_passes(functools.partial(extension, scale=scale), *inputs)
    slow = three_passes(functools.partial(attention_eager, scale=scale), *inputs)
    for a, b, name in zip(fast, slow, NAMES, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("height", "channels"), [(12, 64), (16, 96), (24, 256)])
def test_is_as_accurate_as_eager(height, channels, dtype, layout):
    assert_three_passes_are_as_accurate(block_operands(2, height, channels, dtype, layout, "cpu"))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*(st.integers(1, top) for top in (3, 80, 150, 40, 70))),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.permutations(range(3)),
    st.floats(0.05, 1.5),
    st.integers(0, 2**31),
)
def test_random_shapes_dtypes_and_strides(shape, dtype, order, scale, seed):
    torch.manual_seed(seed)
    if dtype != torch.float64:  # the rounding errors of a few numbers say nothing of each other
        shape = tuple(map(max, shape, (1, 20, 20, 4, 4)))
    b, n, m, d, e = shape
    inputs = []
    for size in ((b, n, d), (b, m, d), (b, m, e)):
        memory = torch.randn([2 * size[i] for i in order], dtype=torch.float64).to(dtype)[::2, ::2, ::2]
        inputs.append(memory.permute([order.index(i) for i in range(3)]))
        assert inputs[-1].shape == size
    inputs[0] = inputs[0] / d**0.5
    if dtype != torch.float64:
        return assert_three_passes_are_as_accurate(inputs, scale)
    fast, slow = (three_passes(functools.partial(f, scale=scale), *inputs) for f in (extension, attention_eager))
    for a, b, name in zip(fast, slow, NAMES, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_opcheck():
    q, k, v = operands((2, 5, 4, 3, 6))
    opcheck(attention_op, (q, k, v, 0.7, "extension"))
    o, stats = (x.detach() for x in attention_op(q, k, v, 0.7, "extension"))
    grad_o = torch.randn_like(o).requires_grad_()
    opcheck(attention_bwd_op, (grad_o, q, k, v, o, stats, 0.7, "extension"))
    plain = [x.detach() for x in (q, k, v, grad_o, q, k, v)]
    opcheck(attention_bwd_bwd_op, (*plain, o, stats, 0.7, "extension"))


def test_compiled_gradients_equal_eager():
    inputs = operands((2, 6, 5, 4, 3))

    def loss(*inputs):
        return attention(*inputs).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize("impl", ["extension", "reference"])
def test_second_gradients_of_some_of_the_gradients(impl, wanted):
    """Gradients that no later result depends on have no cotangent, which the extension takes for zero."""
    inputs = operands((2, 20, 70, 5, 6))
    results = []
    for function in (functools.partial(attention, impl=impl, scale=0.7), functools.partial(attention_eager, scale=0.7)):
        o = function(*inputs)
        grad_o = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape).requires_grad_()
        chosen = [x for x, name in zip(inputs, "qkv", strict=True) if name in wanted]
        gradients = torch.autograd.grad(o, chosen, grad_o, create_graph=True)
        total = sum((g * g.detach().cos()).sum() for g in gradients)
        results.append(torch.autograd.grad(total, [grad_o, *inputs], materialize_grads=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("operand", range(4))
def test_nan_and_infinity_match_eager(operand, value):
    """In q, k, v and the output's cotangent; 1e30 overflows where it meets itself."""
    inputs = operands((1, 9, 70, 3, 2), torch.float32, requires_grad=False)
    inputs.append(torch.randn(1, 9, 2))
    inputs[operand][0, 3, 1] = value
    if value == 1e30 and operand == 0:
        inputs[1][0, 5, 1] = value

    def passes(function):
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        o = function(q, k, v)
        first = torch.autograd.grad(o, (q, k, v), inputs[3], create_graph=True)
        return [o, *first]

    for a, b, name in zip(passes(extension), passes(attention_eager), NAMES, strict=False):
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a.isposinf(), b.isposinf()), name
        assert torch.equal(a.isneginf(), b.isneginf()), name
        finite = b.isfinite()
        torch.testing.assert_close(a[finite], b[finite], rtol=1e-4, atol=1e-5)


def test_logits_beyond_the_exponential_range():
    q, k, v = operands((1, 20, 90, 4, 3), torch.float32, requires_grad=False)
    for factor in (10.0, 1e4, 1e12):
        passes = three_passes(extension, factor * q, factor * k, v)
        assert all(x.isfinite().all() for x in passes)
        torch.testing.assert_close(
            passes[0].double(),
            attention_eager((factor * q).double(), (factor * k).double(), v.double()),
            rtol=1e-2,
            atol=1e-2,
        )


def test_weights_may_be_subnormal():
    """Weights of e^-95: an infinite value with a weight of 0 would give NaN, as it does in eager torch below e^-104."""
    q, k = torch.ones(1, 1, 1), torch.tensor([0.0, -95.0, -200.0]).view(1, 3, 1)
    for v in (torch.tensor([1.0, float("inf"), 2.0]), torch.tensor([1.0, 2.0, float("inf")])):
        torch.testing.assert_close(
            extension(q, k, v.view(1, 3, 1)), attention_eager(q, k, v.view(1, 3, 1)), equal_nan=True
        )


@pytest.mark.parametrize("shape", [(1, 300, 200, 8, 32), (5, 90, 70, 4, 8)])
def test_results_do_not_depend_on_the_number_of_threads(shape):
    inputs = operands(shape, torch.float32)
    assert_same_for_any_number_of_threads(lambda: three_passes(extension, *inputs))


def test_outputs_have_the_layout_of_q(poisoned_empty):
    q, k, v = block_operands(2, 6, 16, torch.float32, "channels-first", "cpu")
    assert extension(q, k, v).mT.is_contiguous()
    assert extension(q.contiguous(), k, v).is_contiguous()


def test_no_map_is_in_memory():
    """The most bytes that all operators together hold, against the 268 MB of one map of 4 x 4096 x 4096."""
    inputs = operands((4, 4096, 4096, 8, 32), torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        three_passes(extension, *inputs)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert 0 < allocated < 4 * 4 * 4096 * 4096 / 2
