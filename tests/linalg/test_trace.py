import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastgan import backend
from fastgan.linalg import trace_sqrt_product
from fastgan.linalg._checks import asymmetry
from fastgan.linalg._symmetric import scaled
from fastgan.linalg._trace import trace_sqrt_product as op
from fastgan.linalg._trace_gradients import trace_sqrt_product_bwd
from tests.linalg.spectra import (
    IMPLS,
    SPECTRA,
    TOLERANCE,
    covariance,
    covariance_of_rank,
    factor,
    nuclear_norm,
    relative_error,
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("d", [5, 255, 256, 257, 513, 800])
def test_sizes_about_the_blocks(d, impl):
    a, b = covariance(d), covariance(d)
    value = trace_sqrt_product(a, b, method="cholesky", impl=impl)
    assert relative_error(value, nuclear_norm(torch.linalg.cholesky(a), torch.linalg.cholesky(b))) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layouts(dtype, impl):
    a, b = covariance(3, 9, dtype=dtype), covariance(3, 9, dtype=dtype)
    value = trace_sqrt_product(a, b, impl=impl)
    padded = torch.full((3, 12, 30), math.nan, dtype=dtype)
    padded[:, 1:10, 2:20:2] = a
    tolerance = {
        "rtol": 16 * torch.finfo(dtype).eps,
        "atol": 0,
    }  # copies and batches may take other kernels of the BLAS
    strided = trace_sqrt_product(padded[:, 1:10, 2:20:2], b.permute(0, 2, 1), impl=impl)
    torch.testing.assert_close(strided, value, **tolerance)
    permuted = a.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    torch.testing.assert_close(trace_sqrt_product(permuted, b, impl=impl), value, **tolerance)
    torch.testing.assert_close(trace_sqrt_product(a.flip(0), b.flip(0), impl=impl), value.flip(0), **tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", ["cholesky", "pivoted", "eigh", "svd", "auto"])
def test_every_method_equals_the_oracle(method, dtype, impl):
    a, b = covariance(4, 65, dtype=dtype), covariance(2, 1, 65, dtype=dtype)
    value, info = trace_sqrt_product(a, b, method=method, impl=impl, return_info=True)
    truth = nuclear_norm(*(torch.linalg.cholesky(x.double()) for x in (a, b)))
    assert relative_error(value, truth) < 4 * torch.finfo(dtype).eps + 1e-14
    assert info.methods == ("cholesky" if method == "auto" else method,) * 8
    assert ((info.lower <= truth) & (truth <= info.upper)).all()
    assert (info.error_bound < 1e-9 * truth).all()
    assert info.implementation == impl


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("factor", [2.0**-120, 1.0, 2.0**120])
def test_scaled_equals_its_definition(factor, dtype, impl):
    matrices = torch.randn(3, 67, 67, dtype=torch.float64).mul(factor).to(dtype)
    matrices[1] = 0
    scale, found = scaled(matrices, impl)
    assert torch.equal(scale[[0, 2]], 2 ** matrices[[0, 2]].double().abs().amax((1, 2)).log2().floor())
    assert scale[1] == 1
    wide = matrices.double() / scale[:, None, None]
    assert torch.equal(found, 0.5 * (wide + wide.mT))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ranks", [(30, 9), (9, 30)])
def test_singular_pairs_go_by_the_factor_of_lower_rank(ranks, impl):
    (x, a), (y, b) = (covariance_of_rank(rank + 1, 48, seed=rank) for rank in ranks)
    value, info = trace_sqrt_product(a, b, impl=impl, return_info=True)
    assert info.method == "pivoted"
    assert relative_error(value, torch.linalg.svdvals(x @ y.mT).sum()) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_batches_at_extreme_scales(impl):
    a, b = covariance(5, 7), covariance(5, 7)
    truth = trace_sqrt_product(a, b)
    for scale in (1e300, 1e-300):
        assert relative_error(trace_sqrt_product(a * scale, b * scale, impl=impl) / scale, truth) < 1e-13


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch_a", "batch_b"), [((), ()), ((2, 1), (3,))])
def test_gradients(batch_a, batch_b, impl):
    a, b = covariance(*batch_a, 4).requires_grad_(), covariance(*batch_b, 4).requires_grad_()
    assert gradcheck(lambda a, b: trace_sqrt_product(a, b, impl=impl), (a, b))
    assert gradgradcheck(lambda a, b: trace_sqrt_product(a, b, impl=impl), (a, b))


def test_gradients_of_repeated_eigenvalues():
    a = torch.diag(torch.tensor([2.0, 2.0, 1.0])).double().requires_grad_()
    b = torch.eye(3, dtype=torch.float64).requires_grad_()
    assert gradcheck(trace_sqrt_product, (a, b))
    assert gradgradcheck(trace_sqrt_product, (a, b))


def test_gradients_of_scaled_operands():
    a, b = covariance(6), covariance(6)
    plain = [a.requires_grad_(), b.requires_grad_()]
    first = torch.autograd.grad(trace_sqrt_product(*plain), plain, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), plain)
    scaled = [(a.detach() * 1e10).requires_grad_(), (b.detach() * 1e-6).requires_grad_()]
    scaled_first = torch.autograd.grad(trace_sqrt_product(*scaled), scaled, create_graph=True)
    scaled_second = torch.autograd.grad(scaled_first[0].square().sum(), scaled)
    for got, expected, exponent in zip(
        (*scaled_first, *scaled_second), (*first, *second), (-8, 8, -26, -10), strict=True
    ):  # tr is of degree 1/2 in each operand
        torch.testing.assert_close(got * 10.0**-exponent, expected, rtol=1e-10, atol=0)


def test_gradients_are_symmetric_and_solve_the_transport_equation():
    a, b = covariance(33).requires_grad_(), covariance(33).requires_grad_()
    grad_a, grad_b = torch.autograd.grad(trace_sqrt_product(a, b), (a, b))
    assert torch.equal(grad_a, grad_a.mT)
    assert torch.equal(grad_b, grad_b.mT)
    torch.testing.assert_close(4 * grad_a @ a @ grad_a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(4 * grad_b @ b @ grad_b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["singular", "zero", "identity"])
def test_gradients_are_finite_even_if_the_derivative_is_not(name):
    matrices = {
        "singular": torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0])),
        "zero": torch.zeros(4, 4),
        "identity": torch.eye(4),
    }
    a, b = matrices[name].double().requires_grad_(), covariance(4).requires_grad_()
    first = torch.autograd.grad(trace_sqrt_product(a, b), (a, b), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))
    assert all(g.isfinite().all() for g in (*first, *second))


def test_gradient_in_float32_keeps_its_dtype():
    a, b = covariance(6, dtype=torch.float32).requires_grad_(), covariance(2, 6, dtype=torch.float32).requires_grad_()
    grads = torch.autograd.grad(trace_sqrt_product(a, b).sum(), (a, b))
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    expected = torch.autograd.grad(trace_sqrt_product(*wide).sum(), wide)
    for got, want in zip(grads, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    a, b = covariance(2, 1, 3).requires_grad_(), covariance(2, 3).requires_grad_()
    torch.library.opcheck(op, (a, b, "auto", impl, True))
    torch.library.opcheck(trace_sqrt_product_bwd, (torch.randn(2, 2, dtype=torch.float64).requires_grad_(), a, b))


def test_opcheck_bwd_bwd():
    a, b, grad = covariance(3), covariance(2, 3), torch.randn(2, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastgan.trace_sqrt_product_bwd_bwd.default, (a, b, grad, a, b))


@pytest.mark.slow
def test_compiled_gradient_equals_eager():
    a, b = covariance(5).requires_grad_(), covariance(5).requires_grad_()
    compiled = torch.compile(trace_sqrt_product, backend="aot_eager", fullgraph=True)
    for got, expected in zip(
        torch.autograd.grad(compiled(a, b), (a, b)), torch.autograd.grad(trace_sqrt_product(a, b), (a, b)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [1, 63, 64, 65, 129, 300])
def test_asymmetry_equals_its_definition(d, dtype, impl):
    a = torch.randn(2, d, d, dtype=dtype)
    expected = torch.stack([(a - a.mT).abs().amax((1, 2)), a.abs().amax((1, 2))], 1).double()
    assert torch.equal(asymmetry(a, impl), expected)
    for bad in (math.nan, math.inf, -math.inf):
        for row, column in ((0, d - 1), (d // 2, d // 2), (d - 1, 0)):
            poisoned = a.clone()
            poisoned[1, row, column] = bad
            found = asymmetry(poisoned, impl)
            assert not found[1].isfinite().all()
            assert torch.equal(found[0], expected[0])


def test_missing_extension_is_an_error_only_if_demanded(monkeypatch):
    monkeypatch.setattr(backend, "load_extension", lambda: "not built")
    a = covariance(4)
    value, info = trace_sqrt_product(a, a, return_info=True)
    assert info.implementation == "reference"
    assert relative_error(value, a.trace()) < 1e-13
    with pytest.raises(ValueError, match="impl='extension' cannot be used: not built"):
        trace_sqrt_product(a, a, impl="extension")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SPECTRA)
def test_cuda_equals_cpu(name, dtype):
    a, b = (f @ f.mT for f in (factor(name, 65), factor("repeated", 65)))
    a, b = a.to(dtype), b.to(dtype)
    expected = trace_sqrt_product(a, b).double()
    for impl in ("extension", "reference"):
        if impl == "extension" and not backend.extension_available("cuda"):
            continue
        value = trace_sqrt_product(a.cuda(), b.cuda(), impl=impl)
        assert value.is_cuda
        assert relative_error(value.cpu(), expected) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "method"), [(32, "jacobi"), (96, "polar")])
def test_captured_in_a_cuda_graph(d, method):
    if method == "jacobi" and not backend.extension_available("cuda"):
        pytest.skip("the CUDA half is not built")
    a, b = covariance(3, d).cuda(), covariance(d).cuda()
    trace_sqrt_product(a, b, method=method)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = trace_sqrt_product(a, b, method=method)
    a.mul_(4)
    graph.replay()
    assert relative_error(value.cpu(), trace_sqrt_product(a.cpu(), b.cpu())) < 1e-9
