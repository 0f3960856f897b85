"""The Triton kernels of several heads, masks and sinks against eager attention in float64: on a GPU or interpreted."""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fastgan.kernels.attention import config, launch
from fastgan.kernels.launch import recorded
from fastgan.ops import attention
from fastgan.reference.attention import attention_eager
from tests.accuracy import FLOOR, assert_as_accurate
from tests.ops.operands import head_operands, masks, sizes_of_three_orders, three_orders

CASES = [
    ("none", False),
    ("none", True),
    ("causal", False),
    ("boolean", True),
    ("additive", False),
    ("causal and keys", True),
]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def fused(q, k, v, sinks=None, **options):
    return attention(q, k, v, 0.7, "triton", sinks=sinks, **options)


def plain(q, k, v, sinks=None, *, mask=None, is_causal=False):
    return attention_eager(q, k, v, 0.7, mask, sinks, is_causal)


def assert_passes_match(inputs, options, full):
    """``options`` mask the kernels' attention as ``full`` does eager attention."""
    truth = three_orders(functools.partial(plain, **full), *(x.double() for x in inputs))
    naive = three_orders(functools.partial(plain, **full), *inputs)
    fast = three_orders(functools.partial(fused, **options), *inputs)
    for actual, p, t, size in zip(fast, naive, truth, sizes_of_three_orders(plain, *inputs, **full), strict=True):
        if t.count_nonzero():
            assert_as_accurate(actual, p, t, size=size)
        else:
            assert actual.abs().max() <= FLOOR[actual.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "has_sinks"), CASES)
def test_three_orders(case, has_sinks, dtype, device):
    inputs = [x.to(device) for x in head_operands(2, 2, 1, 37, 41, 8, 24, dtype)]
    options, full = (
        {name: x if x is True else x.to(device) for name, x in o.items()} for o in masks(case, 2, 2, 37, 41)
    )
    assert_passes_match(inputs[: 4 if has_sinks else 3], options, full)


@pytest.mark.parametrize("case", ["none", "causal", "boolean"])
def test_rows_that_several_programs_share(case, device, monkeypatch):
    counts = []
    right = launch.parts_of_rows
    monkeypatch.setattr(config, "LEAST_TURNS", 1)
    monkeypatch.setattr(launch, "parts_of_rows", lambda *args: counts.append(right(*args)) or counts[-1])
    inputs = [x.to(device) for x in head_operands(1, 2, 1, 70, 41, 8, 24, torch.float32)]
    options, full = (
        {name: x if x is True else x.to(device) for name, x in o.items()} for o in masks(case, 1, 2, 70, 41)
    )
    assert_passes_match(inputs, options, full)
    assert min(counts) > 1


@pytest.mark.parametrize(
    ("case", "shares_rows", "dtype"),
    [
        ("causal", False, torch.bfloat16),
        ("causal", True, torch.float32),
        ("boolean", False, torch.float32),
        ("boolean", True, torch.bfloat16),
    ],
)
def test_whole_tiles_need_no_mask_for_the_end_of_the_map(case, shares_rows, dtype, device, monkeypatch):
    if shares_rows:
        monkeypatch.setattr(config, "LEAST_TURNS", 1)
    inputs = [x.to(device) for x in head_operands(1, 2, 1, 128, 128, 8, 16, dtype)]
    options, full = (
        {name: x if x is True else x.to(device) for name, x in o.items()} for o in masks(case, 1, 2, 128, 128)
    )
    assert_passes_match(inputs, options, full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("d", "e"), [(72, 33), (128, 256), (12, 130)])
def test_many_channels(d, e, dtype, device):
    inputs = [x.to(device) for x in head_operands(1, 2, 1, 18, 21, d, e, dtype)]
    inputs[:2] = [x.detach() / d**0.25 for x in inputs[:2]]
    assert_passes_match(inputs, {"is_causal": True}, {"is_causal": True})
    one_head = [x.detach()[:, 0] for x in inputs[:3]]
    truth = three_orders(attention_eager, *(x.double() for x in one_head))
    naive = three_orders(attention_eager, *one_head)
    for actual, p, t in zip(
        three_orders(lambda *x: attention(*x, impl="triton"), *one_head), naive, truth, strict=True
    ):
        assert_as_accurate(actual, p, t)


def test_the_layout_of_transformers_and_strided_masks(device):
    q, k, v = (torch.randn(2, 35, 3, 16, device=device).transpose(1, 2) for _ in range(3))
    o = attention(q, k, v, impl="triton")
    assert o.transpose(1, 2).is_contiguous()
    mask = torch.rand(35, 1, 3, 2 * 35, device=device)[..., ::2].permute(1, 2, 3, 0).log()
    assert_passes_match([q, k, v], {"mask": mask}, {"mask": mask.expand(2, 3, 35, 35)})


def test_gradients_of_grouped_heads_have_the_layout_of_the_keys(device):
    q, k = (torch.randn(2, 9, heads, 8, device=device).transpose(1, 2).requires_grad_() for heads in (4, 2))
    (gradient,) = torch.autograd.grad(attention(q, k, k, impl="triton").sum(), k)
    assert gradient.shape == k.shape
    assert gradient.stride() == k.stride()


def test_a_row_that_sees_no_key_is_zero_and_has_no_gradient(device):
    q, k, v, sinks = (x.to(device) for x in head_operands(1, 2, 2, 20, 33, 4, 5, torch.float32))
    mask = torch.rand(1, 1, 20, 33, device=device) < 0.7
    mask[:, :, 2] = False
    mask[:, :, 5, :32] = False  # the first tile has no key for it
    for extra in ((), (sinks,)):
        o, dq, *_, d2o = outputs = three_orders(lambda *x: fused(*x, mask=mask), q, k, v, *extra)
        assert all(x.isfinite().all() for x in outputs)
        for x in (o, dq, d2o):
            assert x[:, :, 2].count_nonzero() == 0
            assert x[:, :, 5].count_nonzero() > 0


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_sinks_far_from_the_logits(logit, device):
    q, k, v, _ = (x.to(device) for x in head_operands(1, 2, 2, 5, 7, 4, 3, torch.float32))
    sinks = torch.full((2,), logit, device=device)
    outputs = three_orders(fused, q, k, v, sinks)
    expected = three_orders(plain, q, k, v, sinks)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("b", "n"), [(0, 3), (2, 0)])
def test_empty(b, n, device):
    q, k, v, sinks = (x.to(device) for x in head_operands(b, 4, 2, n, 5, 4, 3, torch.float32))
    o, *gradients = three_orders(fused, q, k, v, sinks)
    assert o.shape == (b, 4, n, 3)
    assert all(g.count_nonzero() == 0 for g in gradients)


def test_runs_are_bitwise_repeatable(device):
    inputs = [x.to(device) for x in head_operands(1, 2, 1, 40, 33, 8, 16, torch.float32)]
    for a, b in zip(three_orders(fused, *inputs), three_orders(fused, *inputs), strict=True):
        assert torch.equal(a, b)


def test_a_mask_takes_tiles_of_its_own():
    q = torch.empty(2, 12, 256, 64, device="meta")
    options = launch.Heads(12, 1, mask=None, sinks=None, is_causal=False)
    mask = torch.empty(1, 1, 256, 256, device="meta").expand(2, 12, 256, 256)
    made = []
    for heads in (options, replace(options, is_causal=True), replace(options, mask=mask)):
        with recorded() as launches:
            o, stats = launch.attention_fwd(q, q, q, 1.0, heads)
            launch.attention_bwd(o, q, q, q, o, stats, 1.0, heads)
        made.append([one.config for one in launches])
    assert made[0] == made[1] != made[2]
