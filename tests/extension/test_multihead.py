"""The C++ attention of several heads, under masks, causal and with sinks, against the textbook formula in float64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan import backend
from fastgan.ops import attention
from fastgan.reference.attention import attention_eager
from tests.extension.checks import (
    assert_same_for_any_number_of_threads,
    assert_three_orders_are_right,
    extension,
    plain_heads,
)
from tests.ops.operands import MASKS, gradcheck_multihead, head_operands, masks, opcheck_multihead, three_orders

pytestmark = pytest.mark.skipif(bool(backend.extension_missing()), reason="the extension is not built")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("case", MASKS)
def test_gradients_of_both_orders_match_finite_differences(case, has_sinks):
    gradcheck_multihead("extension", case, has_sinks)


# Tiles of 64 keys, strips of 8 rows and blocks of 32: sizes below, at and above their edges, more keys than queries.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("shape", [(1, 8, 8, 40, 200, 8, 8), (2, 8, 4, 130, 64, 16, 33)])
def test_is_right_in_every_dtype(shape, case, dtype):
    b, h, _, n, m, d, _ = shape
    options, full = masks(case, b, h, n, m)
    assert_three_orders_are_right(head_operands(*shape, dtype=dtype), options, full, d**-0.5)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*(st.integers(1, top) for top in (80, 150, 40, 70))),
    st.sampled_from(MASKS),
    st.booleans(),
    st.permutations(range(4)),
    st.floats(0.05, 1.5),
    st.integers(0, 2**31),
)
def test_random_shapes_strides_and_groups(heads, sizes, case, has_sinks, order, scale, seed):
    torch.manual_seed(seed)
    (b, key_heads, sharing), (n, m, d, e) = heads, sizes
    h = key_heads * sharing
    inputs = []
    for size in ((b, h, n, d), (b, key_heads, m, d), (b, key_heads, m, e)):
        memory = torch.randn([2 * size[i] for i in order], dtype=torch.float64)[::2, ::2, ::2, ::2]
        inputs.append(memory.permute([order.index(i) for i in range(4)]))
        assert inputs[-1].shape == size
    if has_sinks:
        inputs.append(torch.randn(2 * h, dtype=torch.float64)[::2])
    options, full = masks(case, b, h, n, m)
    assert_three_orders_are_right(inputs, options, full, scale)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("expanded", [(), (0, 1), (0, 2), (3,)])
def test_masks_are_read_with_the_strides_that_they_have(expanded, dtype):
    """The last dimension is transposed in memory; dimensions that a mask repeats are of stride 0."""
    shape = (2, 3, 40, 70)
    numbers = torch.randn([1 if i in expanded else size for i, size in enumerate(shape)], dtype=torch.float64)
    mask = (numbers > -0.5 if dtype == torch.bool else numbers.to(dtype)).mT.contiguous().mT
    inputs = head_operands(2, 3, 3, 40, 70, 8, 5)
    assert_three_orders_are_right(inputs, {"mask": mask}, {"mask": mask.expand(shape)}, 0.3)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_row_that_sees_no_key_is_zero_and_has_no_gradient(kind, has_sinks, poisoned_empty):
    q, k, v, sinks = head_operands(1, 2, 2, 70, 130, 2, 2)
    mask = torch.ones(1, 1, 70, 130, dtype=torch.bool)
    mask[:, :, [2, 65]] = False
    seen = mask[0, 0].any(-1)
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    inputs = [q, k, v, sinks] if has_sinks else [q, k, v]
    o, *gradients = three_orders(lambda q, k, v, sinks=None: extension(q, k, v, mask=mask, sinks=sinks), *inputs)
    first, second = gradients[: len(inputs)], gradients[len(inputs) :]
    assert all(x.isfinite().all() for x in (o, *gradients))
    for x in (o, first[0], second[0], second[-1]):  # the last is with respect to the output's cotangent
        assert x[:, :, ~seen].count_nonzero() == 0
        assert (x[:, :, seen] != 0).any(-1).all()


def test_keys_that_no_query_sees_have_no_gradient():
    inputs = head_operands(1, 2, 1, 33, 200, 3, 2)[:3]
    _, _, dk, dv, _, d2k, d2v, _ = three_orders(functools.partial(extension, is_causal=True), *inputs)
    assert all(x[:, :, 33:].count_nonzero() == 0 for x in (dk, dv, d2k, d2v))
    assert all(x[:, :, :33].count_nonzero() for x in (dk, dv, d2k, d2v))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("operand", range(5))
@pytest.mark.parametrize("case", MASKS[1:5])
def test_nan_and_infinity_match_eager(case, operand, value):
    """In q, k, v, the sinks and the output's cotangent; 1e30 overflows where it meets itself."""
    b, h, n, m = 1, 2, 9, 70
    options, full = masks(case, b, h, n, m)
    inputs = head_operands(b, h, 2, n, m, 3, 2, torch.float32, requires_grad=False)
    inputs.append(torch.randn(b, h, n, 2))
    inputs[operand][(1,) if operand == 3 else (0, 1, 3, 1)] = value
    if value == 1e30 and operand == 0:
        inputs[1][0, 1, 5, 1] = value

    def passes(function):
        given = [x.clone().requires_grad_() for x in inputs[:4]]
        o = function(*given)
        return [o, *torch.autograd.grad(o, given, inputs[4])]

    fast = passes(lambda q, k, v, sinks: extension(q, k, v, sinks=sinks, **options))
    slow = passes(functools.partial(plain_heads, **full))
    for name, a, e in zip(("o", "dq", "dk", "dv", "dsinks"), fast, slow, strict=True):
        if "causal" in case:  # tiles that no row of a block may see are not read
            a, e = (x[..., :n, :] if name in ("dk", "dv") else x for x in (a, e))
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", ["causal", "keys", "additive"])
def test_logits_beyond_the_exponential_range(case):
    options, full = masks(case, 1, 2, 20, 90)
    q, k, v, sinks = head_operands(1, 2, 1, 20, 90, 4, 3, torch.float32, requires_grad=False)
    for factor in (10.0, 1e4, 1e12):
        inputs = (factor * q, factor * k, v, factor * sinks)
        passes = three_orders(lambda q, k, v, sinks: extension(q, k, v, sinks=sinks, **options), *inputs)
        assert all(x.isfinite().all() for x in passes)
        truth = plain_heads(*(x.double() for x in inputs), **full)
        torch.testing.assert_close(passes[0].double(), truth, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 300, 300, 8, 32), (3, 4, 2, 90, 170, 4, 8)])
def test_results_do_not_depend_on_the_number_of_threads(shape, case):
    b, h, _, n, m, _, _ = shape
    options, _ = masks(case, b, h, n, m)
    inputs = head_operands(*shape, dtype=torch.float32)
    assert_same_for_any_number_of_threads(
        lambda: three_orders(lambda q, k, v, sinks: extension(q, k, v, sinks=sinks, **options), *inputs)
    )


@pytest.mark.parametrize("case", ["causal", "keys", "additive"])
def test_no_map_is_in_memory(case):
    """The most bytes that all operators together hold, against the 268 MB of one map of 4 x 4096 x 4096."""
    q, k, v, sinks = head_operands(1, 4, 2, 4096, 4096, 8, 32, torch.float32)
    options = {"is_causal": True} if case == "causal" else {"mask": torch.rand(1, 4096) < 0.7}
    if case == "additive":
        options = {"mask": torch.randn(4096).expand(1, 4, 4096, 4096)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        three_orders(lambda q, k, v, sinks: extension(q, k, v, sinks=sinks, **options), q, k, v, sinks)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert 0 < allocated < 4 * 4 * 4096 * 4096 / 2


@pytest.mark.parametrize(("case", "has_sinks"), [("none", False), ("boolean", True)])
def test_opcheck(case, has_sinks):
    opcheck_multihead("extension", case, has_sinks)


@pytest.mark.parametrize("sinks_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinks_may_have_any_dtype(sinks_dtype):
    q, k, v, sinks = head_operands(2, 4, 2, 20, 30, 8, 4, torch.float32)
    given = sinks.detach().to(sinks_dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(extension(q, k, v, sinks=given).square().sum(), given)
    wide = given.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(plain_heads(q.double(), k.double(), v.double(), wide).square().sum(), wide)
    assert gradient.dtype == sinks_dtype
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-2, atol=1e-4)


def test_auto_is_the_extension_and_a_learned_mask_keeps_the_maps():
    q, k, v, sinks = head_operands(1, 4, 2, 6, 5, 3, 2)
    options = {"mask": torch.rand(1, 5) < 0.7, "sinks": sinks, "is_causal": True}
    assert attention(q, k, v, **options).grad_fn.name().startswith("fastgan_multihead")
    bias = torch.randn(1, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], mask=x[3]), (q, k, v, bias))
    with pytest.raises(ValueError, match="mask must not require a gradient for impl='extension'"):
        extension(q, k, v, mask=bias)
    with torch.no_grad():
        torch.testing.assert_close(extension(q, k, v, mask=bias), attention_eager(q, k, v, 1.0, bias))


@pytest.mark.parametrize("case", ["causal and keys", "additive"])
def test_compiled_gradients_equal_eager(case):
    inputs = head_operands(2, 4, 2, 6, 5, 4, 3)
    options, _ = masks(case, 2, 4, 6, 5)

    def loss(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, **options).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


def test_outputs_have_the_layout_of_transformers(poisoned_empty):
    q, k, v = (torch.randn(2, 20, 3, 4, requires_grad=True).transpose(1, 2) for _ in range(3))
    o = extension(q, k, v)
    assert o.transpose(1, 2).is_contiguous()
    (gradient,) = torch.autograd.grad(o.sum(), k)
    assert gradient.transpose(1, 2).is_contiguous()
