"""Attention of several heads, under masks and with sinks, against the textbook formula in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastgan.ops import attention, scaled_dot_product_attention, squared_distance_attention
from fastgan.reference.attention import attention_eager
from tests.accuracy import assert_as_accurate
from tests.ops.operands import (
    MASKS,
    gradcheck_multihead,
    head_operands,
    masks,
    opcheck_multihead,
    sizes_of_three_orders,
    three_orders,
)

blockwise = functools.partial(attention, impl="reference")


def plain(q, k, v, sinks=None, *, scale=1.0, mask=None, is_causal=False):
    return attention_eager(q, k, v, scale, mask, sinks, is_causal)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("case", MASKS)
def test_gradients_of_both_orders_match_finite_differences(case, has_sinks):
    gradcheck_multihead("reference", case, has_sinks)


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("shape", [(2, 4, 2, 37, 19, 5, 6), (1, 3, 3, 8, 13, 4, 4), (2, 2, 1, 1, 1, 1, 1)])
def test_equals_eager_in_float64(shape, case, has_sinks, blocks, monkeypatch):
    if blocks == "many":
        monkeypatch.setattr("fastgan.reference.attention.BLOCK_BYTES", 3 * 8 * shape[4])
    b, h, _, n, m, _, _ = shape
    options, full = masks(case, b, h, n, m)
    inputs = head_operands(*shape)[: 4 if has_sinks else 3]
    fast = three_orders(lambda q, k, v, sinks=None: blockwise(q, k, v, 1.3, sinks=sinks, **options), *inputs)
    slow = three_orders(functools.partial(plain, scale=1.3, **full), *inputs)
    for a, e in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", MASKS)
def test_is_as_accurate_as_eager(case, dtype):
    options, full = masks(case, 2, 4, 33, 20)
    inputs = head_operands(2, 4, 2, 33, 20, 16, 8, dtype)
    truth = three_orders(functools.partial(plain, **full), *(x.double() for x in inputs))
    naive = three_orders(functools.partial(plain, **full), *inputs)
    fast = three_orders(lambda q, k, v, sinks: blockwise(q, k, v, sinks=sinks, **options), *inputs)
    for a, p, t, size in zip(fast, naive, truth, sizes_of_three_orders(plain, *inputs, **full), strict=True):
        assert_as_accurate(a, p, t, size=size)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_row_that_sees_no_key_is_zero_and_has_no_gradient(kind, impl):
    q, k, v, _ = head_operands(1, 2, 2, 4, 3, 2, 2)
    mask = torch.ones(1, 1, 4, 3, dtype=torch.bool)
    mask[:, :, 2] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    o, dq, dk, dv, *second = three_orders(lambda *x: attention(*x, impl=impl, mask=mask), q, k, v)
    assert all(x.isfinite().all() for x in (o, dq, dk, dv, *second))
    for x in (o, dq, second[0], second[3]):  # the last is with respect to the output's cotangent
        assert x[:, :, 2].count_nonzero() == 0
        assert x[:, :, [0, 1, 3]].count_nonzero() > 0
    with_sinks = attention(q, k, v, impl=impl, mask=mask, sinks=q.new_zeros(2))
    assert with_sinks[:, :, 2].count_nonzero() == 0


def test_masked_keys_are_not_seen():
    q, k, v, sinks = head_operands(1, 2, 2, 6, 6, 3, 2, requires_grad=False)
    keep = torch.tensor([[True, True, False, True, False, True]])
    for extra in ({}, {"sinks": sinks}):
        fewer = blockwise(q, k[:, :, keep[0]], v[:, :, keep[0]], **extra)
        torch.testing.assert_close(blockwise(q, k, v, mask=keep, **extra), fewer)
    last = blockwise(q[:, :, 3:4], k[:, :, :4], v[:, :, :4])
    torch.testing.assert_close(blockwise(q, k, v, is_causal=True)[:, :, 3:4], last)


def test_a_sink_is_a_key_of_no_value():
    q, k, v, sinks = head_operands(1, 1, 1, 3, 4, 2, 2, requires_grad=False)
    weights = torch.softmax(torch.cat([q @ k.mT, sinks.expand(1, 1, 3, 1)], dim=-1), dim=-1)
    torch.testing.assert_close(blockwise(q, k, v, sinks=sinks), weights[..., :4] @ v)
    alone = attention(q[:, 0], k[:, 0], v[:, 0], impl="reference", sinks=sinks)
    torch.testing.assert_close(alone, weights[:, 0, :, :4] @ v[:, 0])


@pytest.mark.parametrize("mask", ["keys", "rows"])
def test_one_head_under_a_mask_has_three_dimensions(mask):
    q, k, v = (torch.randn(2, rows, 3, dtype=torch.float64) for rows in (5, 4, 4))
    full = torch.rand(2, 5, 4) < 0.7
    given = full[:, 0] if mask == "keys" else full
    full = full[:, :1] if mask == "keys" else full
    expected = attention_eager(*(x[:, None] for x in (q, k, v)), 1.0, full[:, None])[:, 0]
    torch.testing.assert_close(blockwise(q, k, v, mask=given), expected)


def test_the_layout_of_transformers_is_kept():
    q, k, v = (torch.randn(2, 7, 3, 4, requires_grad=True).transpose(1, 2) for _ in range(3))
    o = blockwise(q, k, v)
    assert o.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(o, attention_eager(q, k, v))
    (gradient,) = torch.autograd.grad(o.sum(), q)
    assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("case", ["none", "boolean", "additive"])
def test_opcheck(case, has_sinks):
    opcheck_multihead("reference", case, has_sinks)


def test_compiled_gradients_equal_eager():
    inputs = head_operands(2, 4, 2, 6, 5, 4, 3)
    mask = torch.rand(2, 5) < 0.7

    def penalty(q, k, v, sinks):
        return blockwise(q, k, v, mask=mask, sinks=sinks, is_causal=True).square().sum()

    expected = torch.autograd.grad(penalty(*inputs), inputs)
    actual = torch.autograd.grad(torch.compile(penalty, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(actual, expected)


def test_a_learned_mask_keeps_the_maps():
    q, k, v, _ = head_operands(1, 2, 2, 4, 3, 2, 2)
    bias = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x[:3], mask=x[3]), (q, k, v, bias))
    with pytest.raises(ValueError, match="mask must not require a gradient for impl='reference'"):
        blockwise(q, k, v, mask=bias)
    with torch.no_grad():
        torch.testing.assert_close(blockwise(q, k, v, mask=bias), attention_eager(q, k, v, 1.0, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, 3, 4, 3)}, "k must have a number of heads that divides q's, 4, got 3"),
        ({"v": torch.ones(2, 4, 4, 2)}, "v must have as many heads as k, 2, got 4"),
        ({"v": torch.ones(2, 4, 2)}, "v must have 4 dimensions"),
        ({"mask": torch.ones(5, 4)}, "mask must be boolean .2, 4., over keys, or broadcastable to .2, 4, 5, 4."),
        ({"mask": torch.ones(2, 4, 5, 3) > 0}, "got torch.bool of shape .2, 4, 5, 3."),
        ({"mask": torch.ones(2, 4, dtype=torch.long)}, "mask must have dtype bool, float32"),
        ({"mask": torch.ones(2, 4, device="meta") > 0}, "mask must be on the device of q"),
        ({"sinks": torch.ones(2)}, "sinks must have shape .4,., one logit per head"),
        ({"sinks": torch.ones(4, device="meta")}, "sinks must be on the device of q"),
        ({"q": torch.ones(2, 4, 5, 3, 1)}, "q must have 3 dimensions, or 4 with heads"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    given = {"q": torch.ones(2, 4, 5, 3), "k": torch.ones(2, 2, 4, 3), "v": torch.ones(2, 2, 4, 2)} | change
    with pytest.raises(ValueError, match=message):
        attention(**given)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6), (2, 3, 4, 6), (2, 2, 3, 4, 6)])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_matches_torchs_function(shape, impl):
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(4, 4) < 0.7
    mask[1] = False
    bias = torch.randn(*shape[:-2], 4, 4, dtype=torch.float64)
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": mask}, {"attn_mask": bias}):
        expected = F.scaled_dot_product_attention(q, k, v, **options)
        actual = scaled_dot_product_attention(q, k, v, **options, impl=impl)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_matches_torchs_grouped_queries(impl):
    q, k, v = (torch.randn(2, h, 5, 3, dtype=torch.float64) for h in (6, 2, 2))
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, enable_gqa=True, impl=impl), expected)


def test_unsupported_options_of_torchs_function_are_refused():
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="dropout_p must be 0"):
        scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="attn_mask must be None if is_causal"):
        scaled_dot_product_attention(q, q, q, torch.ones(3, 3) > 0, is_causal=True)
    with pytest.raises(ValueError, match="query, key and value must have leading dimensions that broadcast"):
        scaled_dot_product_attention(q, torch.ones(1, 3, 3, 4), q)
    with pytest.raises(ValueError, match=r"attn_mask must be broadcastable to \(1, 2, 3, 3\), got \(2, 3\)"):
        scaled_dot_product_attention(q, q, q, torch.ones(2, 3) > 0)
    with pytest.raises(ValueError, match="attn_mask must have dtype bool, float32"):
        scaled_dot_product_attention(q, q, q, torch.ones(3, 3, dtype=torch.int64))


def test_torchs_function_under_autocast_takes_several_dtypes():
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_attention_by_squared_distances(impl):
    q, k, v, _ = head_operands(2, 4, 2, 7, 6, 3, 2)
    keep = torch.rand(2, 6) < 0.7

    def plain(q, k, v):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        logits = -1.3 * (q[:, :, :, None] - k[:, :, None]).square().sum(-1)
        return torch.softmax(logits.masked_fill(~keep[:, None, None], float("-inf")), dim=-1) @ v

    fast = three_orders(lambda *x: squared_distance_attention(*x, 1.3, impl, mask=keep), q, k, v)
    for a, e in zip(fast, three_orders(plain, q, k, v), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)
