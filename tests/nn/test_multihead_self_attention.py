"""The attention module against its formulas, and its options."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastgan.nn import MultiheadSelfAttention, TokenAttention2d
from fastgan.nn.multihead_self_attention import LOGITS

OPTIONS = [{"logits": logits, "sinks": sinks} for logits in LOGITS for sinks in (False, True)]
OPTIONS = [o for o in OPTIONS if o != {"logits": "distance", "sinks": True}]


def make(**options):
    layer = MultiheadSelfAttention(12, 3, **options).double()
    if layer.sinks is not None:
        torch.nn.init.normal_(layer.sinks)
    return layer


def by_hand(layer, x):
    heads = layer.qkv(x).unflatten(2, (-1, 3, 4)).permute(2, 0, 3, 1, 4)
    q, k, v = heads[0], heads[-2], heads[-1]
    if layer.logits == "product":
        logits = q @ k.mT / 2
    elif layer.logits == "cosine":
        logits = layer.log_factor.exp() * F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    else:
        logits = -(q[:, :, :, None] - k[:, :, None]).square().sum(-1) / 2
    if layer.sinks is not None:
        logits = torch.cat([logits, layer.sinks[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    p = torch.softmax(logits, dim=-1)[..., : x.shape[1]]
    return layer.out((p @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_formula_with_both_gradients(options, impl):
    layer, x = make(impl=impl, **options), torch.randn(2, 7, 12, dtype=torch.float64)

    def derivatives(run):
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        first = torch.autograd.grad(run(inputs[0]).square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [run(x), *first, *second]

    for actual, expected in zip(derivatives(layer), derivatives(lambda x: by_hand(layer, x)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


def test_distance_attention_is_lipschitz_and_products_are_not():
    """The Jacobian in the inputs where one token is 0 and the others are far from it grows with products alone."""
    norms = {}
    for logits in ("product", "distance"):
        torch.manual_seed(0)
        layer = make(logits=logits, bias=False)
        tokens = torch.randn(1, 6, 12, dtype=torch.float64)
        tokens[:, 0] = 0
        norms[logits] = [torch.autograd.functional.jacobian(layer, size * tokens).norm().item() for size in (1.0, 30.0)]
    assert norms["product"][1] > 50 * norms["product"][0]
    assert norms["distance"][1] < 5 * norms["distance"][0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast(options):
    layer, x = make(**options).float(), torch.randn(2, 7, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.05)


def test_a_map_of_pixels():
    block, x = TokenAttention2d(12, 3), torch.randn(2, 12, 4, 5)
    torch.testing.assert_close(block(x), x)
    torch.nn.init.constant_(block.gamma, 0.5)
    expected = x + 0.5 * block.attention(x.flatten(2).mT).mT.unflatten(2, (4, 5))
    torch.testing.assert_close(block(x), expected)
    channels_last = copy.deepcopy(block).to(memory_format=torch.channels_last)
    y = channels_last(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((12, 5), {}, "channels must be a positive multiple of num_heads, got 12 for 5 heads"),
        ((12, 3), {"logits": "l2"}, "logits must be one of 'product', 'cosine', 'distance', got 'l2'"),
        ((12, 3), {"logits": "distance", "sinks": True}, "sinks must be False for logits='distance'"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MultiheadSelfAttention(*arguments, **options)
    with pytest.raises(ValueError, match=r"x must have shape \(n, tokens, 12\), got \(2, 3\)"):
        make()(torch.ones(2, 3))
