import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgan import _extension, linalg
from fastgan.linalg import trace_sqrt_product
from fastgan.ops.trace_sqrt_product import asymmetry, trace_sqrt_product_bwd
from fastgan.ops.trace_sqrt_product import trace_sqrt_product as op
from fastgan.reference import trace_sqrt_product as reference

SIZES = (1, 2, 3, 31, 64, 65, 192)
SPECTRA = ("flat", "geometric", "dominant", "clustered", "singular", "repeated")
METHODS = ("auto", "eigh", "svd", "polar")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
IMPLS = [
    pytest.param("extension", marks=pytest.mark.skipif(bool(_extension._load()), reason="the extension is not built")),
    "reference",
]


def spectrum(name: str, d: int) -> Tensor:
    steps = torch.arange(d, dtype=torch.float64) / max(d - 1, 1)
    values = {
        "flat": torch.ones_like(steps),
        "geometric": 10 ** (-8 * steps),
        "dominant": 1e-3 ** (steps > 0),
        "clustered": (1 + 1e-9 * torch.rand_like(steps)) * 1e-4 ** (steps >= 0.5),
        "singular": (0.1 + torch.rand_like(steps)) * (steps <= 0.5),
        "repeated": 0.25 ** (steps >= 0.4),
    }
    return values[name].double()


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


def factor(name: str, d: int) -> Tensor:
    """F of A = F F^T with the named spectrum, in directions of its own."""
    return rotation(d) * spectrum(name, d).sqrt()


def covariance(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A well-conditioned positive definite matrix (*shape, d), d the last of ``shape``."""
    x = torch.randn(*shape, 2 * shape[-1] + 5, dtype=torch.float64)
    return (x @ x.mT / x.shape[-1]).to(dtype)


def nuclear_norm(factor_a: Tensor, factor_b: Tensor) -> Tensor:
    return torch.linalg.svdvals(factor_a.mT @ factor_b).sum(-1)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).abs() / truth).max().item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("name_a", SPECTRA)
def test_equals_the_singular_values_of_the_factors(name_a, d, impl):
    for name_b in SPECTRA:
        factor_a, factor_b = factor(name_a, d), factor(name_b, d)
        for method in METHODS:
            value = trace_sqrt_product(factor_a @ factor_a.mT, factor_b @ factor_b.mT, method=method, impl=impl)
            assert relative_error(value, nuclear_norm(factor_a, factor_b)) < 1e-9, (name_b, method)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("d", SIZES)
def test_commuting_matrices_have_a_closed_form(d, impl):
    q = rotation(d)
    for name_a in SPECTRA:
        for name_b in SPECTRA:
            a, b = spectrum(name_a, d), spectrum(name_b, d)
            value = trace_sqrt_product((q * a) @ q.mT, (q * b) @ q.mT, impl=impl)
            assert relative_error(value, (a * b).sqrt().sum()) < 1e-9, (name_a, name_b)


def test_auto_holds_where_cholesky_alone_loses_digits():
    # Half the eigenvalues of the product are zero, and come out of the eigensolver as rounding errors of which the root
    # is 1e-8.
    factor_a, factor_b = factor("flat", 192), factor("singular", 192)
    a, b = 2 * torch.eye(192, dtype=torch.float64) + factor_a @ factor_a.mT, factor_b @ factor_b.mT
    truth = math.sqrt(3) * spectrum_root_sum(b)
    careless, careless_info = trace_sqrt_product(a, b, method="cholesky", return_info=True)
    value, info = trace_sqrt_product(a, b, return_info=True)
    assert relative_error(careless, truth) > 1e-9
    assert careless_info.error_bound > (careless - truth).abs()
    assert relative_error(value, truth) < 1e-12
    assert info.method == "svd"


def spectrum_root_sum(b: Tensor) -> Tensor:
    """tr(B^{1/2}) with the eigenvalues at rounding level left out."""
    values = torch.linalg.eigvalsh(b)
    return values[values > 1e-12 * values[-1]].sqrt().sum()


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_equals_float64_of_the_same_entries(impl):
    for name in SPECTRA:
        for d in SIZES:
            a, b = (f @ f.mT for f in (factor(name, d), factor("repeated", d)))
            a, b = a.float(), b.float()
            # Rounding to float32 leaves eigenvalues of either sign: the oracle is the positive part of what is left.
            (values_a, q_a), (values_b, q_b) = (torch.linalg.eigh(0.5 * (m + m.mT).double()) for m in (a, b))
            truth = nuclear_norm(q_a * values_a.clamp(min=0).sqrt(), q_b * values_b.clamp(min=0).sqrt())
            value = trace_sqrt_product(a, b, impl=impl)
            assert value.dtype == torch.float32
            assert relative_error(value, truth) < 1e-5, (name, d)


@pytest.mark.parametrize("impl", IMPLS)
def test_exactly_singular_float32(impl):
    factor_a = torch.randint(-3, 4, (31, 7)).double()  # products of small integers: no rounding in float32
    factor_b = torch.randint(-3, 4, (31, 12)).double()
    value = trace_sqrt_product((factor_a @ factor_a.mT).float(), (factor_b @ factor_b.mT).float(), impl=impl)
    assert relative_error(value, nuclear_norm(factor_a, factor_b)) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n_a", "n_b", "d"), [(20, 30, 64), (20, 200, 64), (200, 20, 64), (5, 3, 65), (2, 2, 3)])
def test_fewer_samples_than_dimensions(n_a, n_b, d, impl):
    x, y = torch.randn(n_a, d, dtype=torch.float64), torch.randn(n_b, d, dtype=torch.float64)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    truth = torch.linalg.svdvals(centred_x @ centred_y.mT).sum() / math.sqrt((n_a - 1) * (n_b - 1))
    for method in METHODS:
        value, info = trace_sqrt_product(torch.cov(x.T), torch.cov(y.T), method=method, impl=impl, return_info=True)
        assert relative_error(value, truth) < 1e-9
        if n_a < d or method != "auto":
            assert info.method in ("eigh", "svd", "polar")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("scale_a", "scale_b"), [(1e-12, 1e12), (1e12, 1e12), (1e-12, 1e-12), (1e-30, 1e-30), (1e30, 1.0)]
)
def test_scales(scale_a, scale_b, dtype, impl):
    a, b = covariance(31, dtype=dtype), covariance(31, dtype=dtype)
    truth = trace_sqrt_product(a.double(), b.double()) * math.sqrt(scale_a) * math.sqrt(scale_b)
    value = trace_sqrt_product(a * scale_a, b * scale_b, impl=impl)
    assert relative_error(value, truth) < (1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_scales_of_float64(impl):
    a, b = covariance(7), covariance(7)
    truth = trace_sqrt_product(a, b)
    assert relative_error(trace_sqrt_product(a * 1e300, b * 1e300, impl=impl) / 1e300, truth) < 1e-13
    assert relative_error(trace_sqrt_product(a * 1e-300, b * 1e-300, impl=impl) * 1e300, truth) < 1e-13


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS)
def test_zero(method, impl):
    zero, b = torch.zeros(5, 5, dtype=torch.float64), covariance(5)
    for left, right in ((zero, b), (b, zero), (zero, zero)):
        assert trace_sqrt_product(left, right, method=method, impl=impl).item() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_orthogonal_ranges(impl):
    a, b = (
        torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0])).double(),
        torch.diag(torch.tensor([0.0, 0.0, 3.0, 4.0])).double(),
    )
    assert trace_sqrt_product(a, b, impl=impl).item() == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("d", [5, 255, 256, 257, 600])
def test_sizes_about_the_blocks(d, impl):
    a, b = covariance(d), covariance(d)
    value = trace_sqrt_product(a, b, method="cholesky", impl=impl)
    assert relative_error(value, nuclear_norm(torch.linalg.cholesky(a), torch.linalg.cholesky(b))) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("batch_a", "batch_b"), [((), (4,)), ((4,), ()), ((3, 1), (2,)), ((2, 3), (2, 3)), ((0,), ()), ((1,), (5, 1))]
)
def test_broadcasting(batch_a, batch_b, impl):
    a, b = covariance(*batch_a, 6), covariance(*batch_b, 6)
    value = trace_sqrt_product(a, b, impl=impl)
    shape = torch.broadcast_shapes(batch_a, batch_b)
    assert value.shape == shape
    wide_a, wide_b = a.expand(*shape, 6, 6).reshape(-1, 6, 6), b.expand(*shape, 6, 6).reshape(-1, 6, 6)
    for got, x, y in zip(value.reshape(-1), wide_a, wide_b, strict=True):
        assert relative_error(got, nuclear_norm(torch.linalg.cholesky(x), torch.linalg.cholesky(y))) < 1e-13


def test_one_reference_against_many_is_factored_once(monkeypatch):
    calls = []
    cholesky = reference._cholesky
    monkeypatch.setattr(reference, "_cholesky", lambda matrix: calls.append(matrix) or cholesky(matrix))
    candidates, one = covariance(6, 5), covariance(5)
    trace_sqrt_product(candidates, one, impl="reference")
    trace_sqrt_product(one, candidates, impl="reference")
    assert len(calls) == 2


def test_mixed_batch_reports_the_method_of_each():
    singular = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).double()
    a, b = torch.stack([covariance(4), singular]), covariance(2, 4)
    value, info = trace_sqrt_product(a, b, return_info=True)
    assert info.methods == ("cholesky", "eigh")
    assert info.method == "eigh"
    assert info.error_bound.shape == (2,)
    assert (info.error_bound < 1e-12 * value).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layouts(dtype, impl):
    a, b = covariance(3, 9, dtype=dtype), covariance(3, 9, dtype=dtype)
    value = trace_sqrt_product(a, b, impl=impl)
    padded = torch.full((3, 12, 30), math.nan, dtype=dtype)
    padded[:, 1:10, 2:20:2] = a
    assert torch.equal(trace_sqrt_product(padded[:, 1:10, 2:20:2], b.permute(0, 2, 1), impl=impl), value)
    permuted = a.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(trace_sqrt_product(permuted, b, impl=impl), value)
    assert torch.equal(trace_sqrt_product(a.flip(0), b.flip(0), impl=impl), value.flip(0))


@pytest.mark.skipif(bool(_extension._load()), reason="the extension is not built")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", ["cholesky", "eigh", "svd", "auto"])
def test_extension_equals_reference(method, dtype):
    a, b = covariance(4, 65, dtype=dtype), covariance(2, 1, 65, dtype=dtype)
    value, info = trace_sqrt_product(a, b, method=method, impl="extension", return_info=True)
    expected, expected_info = trace_sqrt_product(a, b, method=method, impl="reference", return_info=True)
    assert relative_error(value, expected.double()) < 4 * torch.finfo(dtype).eps
    assert info.methods == expected_info.methods
    torch.testing.assert_close(info.error_bound, expected_info.error_bound, rtol=1e-9, atol=0)
    assert (info.implementation, expected_info.implementation) == ("extension", "reference")


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
def test_gradients_are_finite_where_the_derivative_is_not(name):
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
        assert torch.equal(got, expected)


def asymmetric(d: int) -> Tensor:
    a = covariance(d)
    a[0, 1] += 0.1
    return a


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("operand", "message"),
    [
        (torch.ones(3, 4), r"must have shape \(\.\.\., d, d\)"),
        (torch.ones(3), r"must have shape \(\.\.\., d, d\)"),
        (torch.ones(0, 0), "d >= 1"),
        (torch.ones(3, 3, dtype=torch.int64), "must have dtype float32, float64, got int64"),
        (torch.ones(3, 3, dtype=torch.float16), "must have dtype float32, float64, got float16"),
        (torch.full((3, 3), math.nan).double(), "must be finite"),
        (torch.diag(torch.tensor([1.0, math.inf, 1.0])).double(), "must be finite"),
        (torch.diag(torch.tensor([1.0, math.nan, 1.0])).double(), "must be finite"),
        (asymmetric(3), r"must be symmetric: max \|A - A\^T\| is 0\.1,"),
        (
            torch.diag(torch.tensor([1.0, 1.0, -0.5])).double(),
            r"must be positive semi-definite: .* is -0\.5 of the largest",
        ),
        (-torch.eye(3).double(), "must be positive semi-definite"),
        (torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).double(), "must be positive semi-definite"),
    ],
)
def test_bad_operand(operand, message, impl):
    good = torch.eye(3).double()
    with pytest.raises(ValueError, match=rf"^a\b.*{message}"):
        trace_sqrt_product(operand, good, impl=impl)
    with pytest.raises(ValueError, match=rf"^b\b.*{message}"):
        trace_sqrt_product(good, operand, impl=impl)


@pytest.mark.parametrize("method", ["auto", "cholesky", "eigh", "svd"])
@pytest.mark.parametrize("left", ["definite", "singular", "zero"])
def test_indefinite_beside_any_other(left, method):
    others = {
        "definite": covariance(3),
        "singular": torch.diag(torch.tensor([1.0, 1.0, 0.0])).double(),
        "zero": torch.zeros(3, 3).double(),
    }
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.01])).double()
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"^b must be positive semi-definite"):
            trace_sqrt_product(others[left], indefinite, method=method, impl=impl)


def test_bad_pairs():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match=r"b must have the d of a \(3\), got 4"):
        trace_sqrt_product(eye, torch.eye(4))
    with pytest.raises(
        ValueError, match=r"b must have batch dimensions that broadcast with those of a: \(2,\), got \(3,\)"
    ):
        trace_sqrt_product(eye.expand(2, 3, 3), eye.expand(3, 3, 3))
    with pytest.raises(ValueError, match="b must have the dtype of a"):
        trace_sqrt_product(eye, eye.double())
    with pytest.raises(ValueError, match="b must be on the device of a"):
        trace_sqrt_product(eye, eye.to("meta"))


def test_bad_options():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="method must be one of 'auto', 'cholesky', .*, got 'schur'"):
        trace_sqrt_product(eye, eye, method="schur")
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'extension', 'reference', got 'triton'"):
        trace_sqrt_product(eye, eye, impl="triton")
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor, got list"):
        trace_sqrt_product(eye, [1])


def test_cholesky_of_a_singular_matrix_says_which():
    singular, stack = torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2).expand(3, 2, 2)
    with pytest.raises(ValueError, match=r"^a must be positive definite for method='cholesky'"):
        trace_sqrt_product(singular, torch.eye(2), method="cholesky")
    with pytest.raises(ValueError, match=r"^b must be positive definite for method='cholesky'"):
        trace_sqrt_product(stack, singular, method="cholesky")


def test_bad_matrix_of_a_batch_is_numbered():
    batch = torch.eye(3).repeat(2, 2, 1, 1)
    batch[1, 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match="^a, matrix 2 of the flattened batch, must be finite"):
        trace_sqrt_product(batch, torch.eye(3))


def test_rounding_level_asymmetry_is_accepted():
    a, b = covariance(8), covariance(8)
    tilted = a.clone()
    tilted[0, 1] *= 1 + 1e-12
    assert relative_error(trace_sqrt_product(tilted, b), trace_sqrt_product(a, b)) < 1e-11


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [1, 63, 64, 65, 129, 300])
def test_asymmetry_equals_its_definition(d, dtype):
    a = torch.randn(2, d, d, dtype=dtype)
    expected = torch.stack([(a - a.mT).abs().amax((1, 2)), a.abs().amax((1, 2))], 1).double()
    assert torch.equal(asymmetry(a), expected)
    assert torch.equal(reference.asymmetry(a), expected)
    for bad in (math.nan, math.inf, -math.inf):
        for row, column in ((0, d - 1), (d // 2, d // 2), (d - 1, 0)):
            poisoned = a.clone()
            poisoned[1, row, column] = bad
            for measure in (asymmetry, reference.asymmetry):
                assert not measure(poisoned)[1].isfinite().all()
                assert torch.equal(measure(poisoned)[0], expected[0])


def test_missing_extension_is_an_error_only_where_demanded(monkeypatch):
    monkeypatch.setattr(_extension, "_load", lambda: "not built")
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
        if impl == "extension" and not _extension.available("cuda"):
            continue
        value = trace_sqrt_product(a.cuda(), b.cuda(), impl=impl)
        assert value.is_cuda
        assert relative_error(value.cpu(), expected) < TOLERANCE[dtype]


def test_docstring_names_every_option():
    for option in (*linalg.METHODS, *linalg.IMPLS):
        assert f'``"{option}"``' in (linalg.trace_sqrt_product.__doc__ or ""), option
