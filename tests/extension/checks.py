"""Checks that several tests of the extension share."""

import functools

import torch

from fastgan.ops import attention
from fastgan.reference.attention import attention_eager
from tests.accuracy import assert_as_accurate
from tests.ops.operands import sizes_of_three_orders, three_orders, three_passes

NAMES = ("o", "dq", "dk", "dv", "d2q", "d2k", "d2v")
extension = functools.partial(attention, impl="extension")


def assert_same_for_any_number_of_threads(run, counts=(1, 2, 3, 7)):
    """Compare the bits of the tensors that ``run()`` returns with each number of torch's threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def assert_three_passes_are_as_accurate(inputs, scale=1.0):
    """Compare attention and its gradients of both orders with eager torch in the same dtype and in float64."""
    truth = three_passes(functools.partial(attention_eager, scale=scale), *(x.double() for x in inputs))
    plain = three_passes(functools.partial(attention_eager, scale=scale), *inputs)
    fast = three_passes(functools.partial(extension, scale=scale), *inputs)
    for actual, p, t, name in zip(fast, plain, truth, NAMES, strict=True):
        assert actual.dtype == inputs[0].dtype
        assert_as_accurate(actual, p, t, name)


def plain_heads(q, k, v, sinks=None, *, scale=1.0, mask=None, is_causal=False):
    """Attention of several heads by the textbook formula."""
    return attention_eager(q, k, v, scale, mask, sinks, is_causal)


def assert_three_orders_are_right(inputs, options, full, scale):
    """Compare in float64 up to rounding errors, in other dtypes with the errors of eager torch in the same dtype."""

    def fast(q, k, v, sinks=None):
        return extension(q, k, v, scale, sinks=sinks, **options)

    slow = functools.partial(plain_heads, scale=scale, **full)
    ours = three_orders(fast, *inputs)
    if inputs[0].dtype == torch.float64:
        for a, e in zip(ours, three_orders(slow, *inputs), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)
        return
    truth, naive = three_orders(slow, *(x.double() for x in inputs)), three_orders(slow, *inputs)
    sizes = sizes_of_three_orders(functools.partial(plain_heads, scale=scale), *inputs, **full)
    for i, (a, p, t) in enumerate(zip(ours, naive, truth, strict=True)):
        assert_as_accurate(a, p, t, f"{i}", sizes[i])
