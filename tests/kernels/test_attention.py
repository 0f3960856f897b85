"""The Triton kernels against eager attention in float64: on a GPU where there is one, else interpreted."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fastgan._layout import empty_rows_like
from fastgan.kernels.attention import config, launch
from fastgan.kernels.precision import input_precision
from fastgan.ops import attention
from fastgan.reference.attention import attention_eager
from tests.accuracy import FLOOR, assert_as_accurate
from tests.ops.operands import block_operands, operands, three_passes

NAMES = ("o", "dq", "dk", "dv", "d2q", "d2k", "d2v")
SHAPES = [(2, 37, 19, 8, 24), (1, 130, 70, 12, 33), (1, 5, 1, 1, 1), (1, 16, 16, 16, 16), (1, 3, 17, 48, 192)]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def triton_attention(q, k, v):
    return attention(q, k, v, impl="triton")


def assert_passes_match(q, k, v):
    truth = three_passes(attention_eager, *(x.double() for x in (q, k, v)))
    plain = three_passes(attention_eager, q, k, v)
    for actual, p, t, name in zip(three_passes(triton_attention, q, k, v), plain, truth, NAMES, strict=True):
        if t.count_nonzero():
            assert_as_accurate(actual, p, t, name)
        else:  # one key: terms of magnitude 1 cancel, to their rounding
            assert actual.abs().max() <= FLOOR[actual.dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_three_passes(shape, dtype, device):
    assert_passes_match(*(x.to(device) for x in operands(shape, dtype)))


def test_strided_operands_and_grad(device):
    q = torch.randn(2, 8, 21, device=device).mT
    k = torch.randn(2, 15, 16, device=device)[..., ::2]
    v = torch.randn(15, 2, 6, device=device).transpose(0, 1)
    assert_passes_match(q, k, v)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    grad_o = torch.randn(2, 6, 21, device=device).mT
    o = triton_attention(q, k, v)
    assert o.mT.is_contiguous()
    expanded = torch.autograd.grad(o, (q, k, v), torch.ones_like(o[:, :1]).expand_as(o), retain_graph=True)
    ones = torch.autograd.grad(o, (q, k, v), torch.ones_like(o), retain_graph=True)
    for a, b in zip(expanded, ones, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    strided = torch.autograd.grad(o, (q, k, v), grad_o, retain_graph=True)
    for a, b in zip(strided, torch.autograd.grad(o, (q, k, v), grad_o.contiguous()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_a_scale_that_is_not_positive(scale, device):
    inputs = [x.to(device) for x in operands((1, 21, 19, 3, 6), torch.float32)]
    expected = three_passes(lambda *x: attention_eager(*x, scale=scale), *inputs)
    actual = three_passes(lambda *x: attention(*x, scale=scale, impl="triton"), *inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_is_broadcast_without_a_copy(device):
    q, k, v = (x.detach().to(device) for x in operands((3, 5, 4, 2, 3), torch.float32))
    torch.testing.assert_close(triton_attention(q, k[:1], v[:1]), attention_eager(q, k[:1], v[:1]))


@pytest.mark.parametrize(("b", "n"), [(0, 3), (2, 0)])
def test_empty(b, n, device):
    o, *gradients = three_passes(triton_attention, *(x.to(device) for x in operands((b, n, 4, 2, 3), torch.float32)))
    assert o.shape == (b, n, 3)
    assert all(g.count_nonzero() == 0 for g in gradients)


def test_large_logits_and_nan(device):
    q, k, v = (x.detach().to(device) for x in operands((1, 4, 5, 3, 2), torch.float32))
    assert all(x.isfinite().all() for x in three_passes(triton_attention, 1e3 * q, 1e3 * k, v))
    q[0, 2, 1] = float("nan")
    o = triton_attention(q, k, v)
    assert o[0, 2].isnan().all()
    assert o[0, [0, 1, 3]].isfinite().all()


def test_masked_keys_do_not_leak_when_the_logits_are_very_negative(device):
    """A padded key has logit 0, far above every true one here: its probability would overflow if it were not masked."""
    q = -16 - torch.arange(6, device=device).reshape(1, 3, 2) / 8  # logits near -260, exact in float32
    k = 8 + torch.arange(10, device=device).reshape(1, 5, 2) / 64
    assert_passes_match(q, k, torch.randn(1, 5, 2, device=device))


def test_keys_far_from_zero(device):
    """Terms constant along a row of the double backward's maps cancel: little may be left of them."""
    q, k, v = (x.detach().to(device) for x in operands((1, 64, 128, 8, 32), torch.float32))
    assert_passes_match(0.3 * q, 0.3 * k + 10, v)


def test_runs_are_bitwise_repeatable(device):
    inputs = [x.to(device) for x in operands((2, 40, 33, 8, 16), torch.float32)]
    for a, b in zip(three_passes(triton_attention, *inputs), three_passes(triton_attention, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def few_programs(monkeypatch):
    """The rows are split for the kernels that own keys, as far as they can be: the numbers of parts."""
    counts = []
    right = launch.parts_of_rows
    monkeypatch.setattr(config, "LEAST_TURNS", 1)
    monkeypatch.setattr(launch, "parts_of_rows", lambda *args: counts.append(right(*args)) or counts[-1])
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 150, 19, 8, 24), (1, 97, 3, 48, 192), (1, 70, 5, 3, 5)])
def test_rows_that_several_programs_share(shape, dtype, device, few_programs):
    assert_passes_match(*(x.to(device) for x in operands(shape, dtype)))
    assert min(few_programs) > 1


def test_shared_rows_are_bitwise_repeatable(device, few_programs):
    inputs = [x.to(device) for x in operands((2, 100, 33, 8, 16), torch.float32)]
    for a, b in zip(three_passes(triton_attention, *inputs), three_passes(triton_attention, *inputs), strict=True):
        assert torch.equal(a, b)
    assert min(few_programs) > 1


def test_rows_are_split_if_few_programs_would_have_much_to_do():
    cpu = torch.device("cpu")
    one = config.Pass(config.Tile(32, 64, 64, 4), 1, {})
    assert config.parts_of_rows(one, 32, 1024, 256, cpu) == 3  # 128 programs, 132 multiprocessors
    assert config.parts_of_rows(replace(one, slabs=4), 32, 1024, 256, cpu) == 1
    assert config.parts_of_rows(one, 32, 4096, 1024, cpu) == 1  # 512 programs
    assert config.parts_of_rows(one, 32, 256, 64, cpu) == 1  # 8 tiles each
    assert config.parts_of_rows(one, 1, 1 << 16, 64, cpu) == 16


LAYOUTS = {
    "odd channels": lambda x: x[..., :-1],
    "misaligned": lambda x: torch.cat((x, x), -1)[..., 3 : 3 + x.shape[-1]],
    "channels-first": lambda x: x.mT.contiguous().mT,
    "every second channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "aligned": lambda x: x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 2])
def test_operands_in_any_layout(layout, which, device):
    """Those whose rows cannot be loaded 16 bytes at once are copied, which shows in neither values nor strides."""
    inputs = [x.detach().to(device) for x in operands((2, 37, 19, 16, 16), torch.bfloat16)]
    for i in (0, 1) if which == 0 else (2,):
        inputs[i] = LAYOUTS[layout](inputs[i])
    assert_passes_match(*inputs)
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    o = triton_attention(q, k, v)
    assert o.stride() == empty_rows_like(q, v.shape[2]).stride()
    gradients = torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    assert [g.stride() for g in gradients] == [torch.empty_like(x).stride() for x in (q, k, v)]


def test_unsupported_channels(device):
    for shape, message in (
        ((1, 2, 2, 129, 2), "q must have at most 128 channels"),
        ((1, 2, 2, 2, 257), "v must have at most 256 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*(x.to(device) for x in operands(shape, torch.float32)), impl="triton")


def test_precision_set_through_either_of_torchs_interfaces(device):
    q, k, v = (x.detach().to(device) for x in operands((1, 4, 5, 3, 2), torch.float32))
    backend, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    assert input_precision(torch.float32) == "tf32x3"
    try:
        backend.fp32_precision = "tf32"  # from here on torch.get_float32_matmul_precision() raises
        assert input_precision(torch.float32) == "tf32"
        assert triton_attention(q, k, v).isfinite().all()
    finally:
        backend.fp32_precision = before


# Channels and height of the feature maps of SAGAN and BigGAN.
MAPS = [(256, 32), (128, 32), (64, 64), (96, 64), (192, 64), (384, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channels-last", "channels-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "height"), MAPS)
def test_shapes_of_published_models(channels, height, dtype, layout):
    assert_passes_match(*block_operands(2, height, channels, dtype, layout, "cuda"))
