import contextlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from fastgan.ops import _spectral_norm as ops
from fastgan.ops import spectral_norm_scale, spectral_norm_update
from fastgan.reference.spectral_norm import as_matrix, matrix_shape

DIMS = [0, 1, 0, 0, 2]


def example(dtype=torch.float64, requires_grad=True):
    weights = [
        torch.randn(3, 4),
        torch.randn(5, 2, 3, 3),
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 5).t(),
        torch.randn(3, 4, 5)[:, ::2],
    ]
    weights = [w.to(dtype).detach().requires_grad_(requires_grad) for w in weights]
    shapes = [matrix_shape(w, d) for w, d in zip(weights, DIMS, strict=True)]
    us, vs = ([normalize(torch.randn(s[k], dtype=dtype), dim=0) for s in shapes] for k in (0, 1))
    return weights, us, vs


def normalized(weights, us, vs):
    vectors = spectral_norm_update(weights, us, vs, DIMS, n_power_iterations=0)
    return spectral_norm_scale(weights, *vectors, DIMS)


@pytest.mark.parametrize("v_first", [False, True])
def test_update_is_the_power_method(v_first):
    weights, us, vs = example()
    before = [[t.clone() for t in group] for group in (us, vs)]
    u, v, sigma = spectral_norm_update(weights, us, vs, DIMS, n_power_iterations=2, v_first=v_first)
    assert not any(t.requires_grad for t in (u, v, sigma))
    for i, (weight, dim, x, y) in enumerate(zip(weights, DIMS, *before, strict=True)):
        w = as_matrix(weight.detach(), dim)
        for _ in range(2):
            if v_first:
                y = normalize(w.T @ x, dim=0)
            x = normalize(w @ y, dim=0)
            if not v_first:
                y = normalize(w.T @ x, dim=0)
        torch.testing.assert_close(us[i], x, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(vs[i], y, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(sigma[i], x @ w @ y, rtol=1e-14, atol=0)
    torch.testing.assert_close(u, torch.cat(us), rtol=0, atol=0)
    torch.testing.assert_close(v, torch.cat(vs), rtol=0, atol=0)


def test_many_iterations_find_the_largest_singular_value():
    weights, us, vs = example()
    sigma = spectral_norm_update(weights, us, vs, DIMS, n_power_iterations=500)[2]
    exact = [torch.linalg.matrix_norm(as_matrix(w.detach(), d), 2) for w, d in zip(weights, DIMS, strict=True)]
    torch.testing.assert_close(sigma, torch.stack(exact), rtol=1e-12, atol=0)


def test_no_iteration_writes_nothing():
    weights, us, vs = example()
    before = [t.clone() for t in us + vs]
    versions = [t._version for t in us + vs]
    spectral_norm_update(weights, us, vs, DIMS, n_power_iterations=0)
    assert [t._version for t in us + vs] == versions
    assert all(torch.equal(a, b) for a, b in zip(before, us + vs, strict=True))


def test_update_bumps_versions_of_the_vectors():
    weights, us, vs = example()
    versions = [t._version for t in us + vs]
    spectral_norm_update(weights, us, vs, DIMS)
    assert all(t._version > before for t, before in zip(us + vs, versions, strict=True))


def test_gradients():
    weights, us, vs = example()

    def f(*ws):
        return tuple(normalized(ws, us, vs))

    assert torch.autograd.gradcheck(f, weights)
    assert torch.autograd.gradgradcheck(f, weights)


def test_gradients_are_those_of_plain_autograd():
    weights, us, vs = example()
    plain = []
    for weight, dim, u, v in zip(weights, DIMS, us, vs, strict=True):
        plain.append(weight / (u @ as_matrix(weight, dim) @ v))
    for outputs in (normalized(weights, us, vs), plain):
        grads = torch.autograd.grad(sum((w**3).sum() for w in outputs), weights, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in grads), weights)
        if outputs is not plain:
            actual = (*grads, *second)
    for a, b in zip(actual, (*grads, *second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_unused_outputs_and_non_contiguous_gradients():
    weights, us, vs = example()
    outputs = normalized(weights, us, vs)
    (outputs[1].transpose(0, 3) ** 2).sum().backward()
    assert weights[1].grad is not None
    assert all(w.grad is None or not w.grad.any() for w in (weights[0], *weights[2:]))


def test_opcheck():
    weights, us, vs = example()
    plain = [w.detach() for w in weights]
    vectors = spectral_norm_update(weights, us, vs, DIMS)
    grads = [torch.randn_like(w).requires_grad_() for w in weights]
    opcheck(ops.spectral_norm_update_op, (plain, us, vs, DIMS, 1, 1e-12, "reference", True))
    opcheck(ops.spectral_norm_sigma_op, (plain, us, vs, DIMS, "reference"))
    opcheck(ops.spectral_norm_scale_op, (weights, *vectors, DIMS, torch.float64, "reference"))
    opcheck(ops.spectral_norm_scale_bwd_op, (grads, weights, *vectors, DIMS, "reference"))
    detached = [g.detach() for g in grads]
    opcheck(ops.spectral_norm_scale_bwd_bwd_op, (plain, detached, plain, *vectors, DIMS, "reference"))


def test_a_captured_step_with_second_order_gradients():
    weights, us, vs = example()

    def step(ws, us, vs):
        ws = [w.detach().requires_grad_() for w in ws]
        vectors = spectral_norm_update(ws, us, vs, DIMS)
        outputs = spectral_norm_scale(ws, *vectors, DIMS)
        grads = torch.autograd.grad(sum((w**2 + w**3).sum() for w in outputs), ws, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), ws)

    plain = [w.detach() for w in weights]
    eager_state = [[t.clone() for t in group] for group in (us, vs)]
    captured_state = [[t.clone() for t in group] for group in (us, vs)]
    captured = make_fx(step, tracing_mode="fake")(plain, us, vs)
    compiled = torch.compile(captured, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for a, b in zip(step(plain, *eager_state), compiled(plain, *captured_state), strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip([*eager_state[0], *eager_state[1]], [*captured_state[0], *captured_state[1]], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_iterated_in_float32(dtype):
    weights, us, vs = example(dtype)
    wide_us, wide_vs = ([t.float() for t in group] for group in (us, vs))
    vectors = spectral_norm_update(weights, us, vs, DIMS)
    wide = spectral_norm_update([w.float() for w in weights], wide_us, wide_vs, DIMS)
    for a, b in zip(vectors, wide, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    for a, b in zip(
        spectral_norm_scale(weights, *vectors, DIMS),
        spectral_norm_scale([w.float() for w in weights], *wide, DIMS),
        strict=True,
    ):
        assert torch.equal(a, b.to(dtype))


def test_autocast_chooses_the_output_dtype():
    weights, us, vs = example(torch.float32)
    vectors = spectral_norm_update(weights, us, vs, DIMS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(w.dtype == torch.bfloat16 for w in spectral_norm_scale(weights, *vectors, DIMS))
        outputs = spectral_norm_scale(weights, *vectors, DIMS, dtype=torch.float32)
    assert all(w.dtype == torch.float32 for w in outputs)
    doubles, us, vs = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normalized(doubles, us, vs)[0].dtype == torch.float64


def test_zero_and_non_finite_weights_leave_the_vectors_alone():
    for value in (0.0, float("nan")):
        weight = torch.full((3, 4), value)
        u, v = normalize(torch.randn(3), dim=0), normalize(torch.randn(4), dim=0)
        before = u.clone(), v.clone()
        vectors = spectral_norm_update([weight], [u], [v])
        assert torch.equal(u, before[0])
        assert torch.equal(v, before[1])
        torch.testing.assert_close(spectral_norm_scale([weight], *vectors)[0], weight, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights must hold at least one"),
        ({"weights": [torch.randn(3)]}, r"weights\[0\] must have 2 or more dimensions"),
        ({"weights": [torch.randn(3, 0)]}, r"weights\[0\] must have 2 or more dimensions"),
        ({"weights": [torch.ones(3, 4, dtype=torch.int64)]}, r"weights\[0\] must have dtype"),
        ({"weights": [torch.randn(3, 4), torch.randn(3, 4).double()]}, r"weights\[1\] must have the dtype and device"),
        ({"us": []}, "us must have one vector"),
        ({"us": [torch.randn(4)]}, r"us\[0\] must have 3 entries"),
        ({"vs": [torch.randn(3)]}, r"vs\[0\] must have 4 entries"),
        ({"vs": [torch.randn(4, 1)]}, r"vs\[0\] must have 1 dimensions"),
        ({"dims": [2]}, r"dims\[0\] must lie in \[-2, 1\]"),
        ({"dims": [0, 0]}, "dims must have one entry"),
        ({"n_power_iterations": -1}, "n_power_iterations must be 0 or more"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_bad_input(change, message):
    arguments = {"weights": [torch.randn(3, 4)], "us": [torch.randn(3)], "vs": [torch.randn(4)], "dims": [0]}
    arguments |= change
    if len(arguments["weights"]) == 2:
        arguments |= {"dims": [0, 0]}
    with pytest.raises(ValueError, match=message):
        spectral_norm_update(**arguments)


def test_bad_vectors_of_scale():
    weight = torch.randn(3, 4)
    with pytest.raises(ValueError, match="u must have 3 entries"):
        spectral_norm_scale([weight], torch.randn(2), torch.randn(4), torch.ones(1))
    with pytest.raises(ValueError, match="sigma must have dtype float32"):
        spectral_norm_scale([weight], torch.randn(3), torch.randn(4), torch.ones(1).double())


@pytest.mark.parametrize("traced", [False, True])
def test_vectors_that_are_written_count_as_changed(traced):
    """Also where the call does not pass through torch's dispatcher, as without a trace, mode or transform."""
    weights, us, vs = [torch.randn(3, 4)], [torch.randn(3)], [torch.randn(4)]
    before = us[0]._version, vs[0]._version
    with FlopCounterMode(display=False) if traced else contextlib.nullcontext():
        spectral_norm_update(weights, us, vs)
    assert us[0]._version > before[0]
    assert vs[0]._version > before[1]
