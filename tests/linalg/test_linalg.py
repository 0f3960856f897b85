import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgan import backend, linalg
from fastgan.linalg import trace_sqrt_product, trace_sqrt_product_from_factors
from fastgan.linalg._trace import DEFINITE_SIZE
from tests.linalg.spectra import (
    IMPLS,
    SIZES,
    SPECTRA,
    TOLERANCE,
    count_factorizations,
    covariance,
    covariance_of_rank,
    eigen_factor,
    factor,
    nuclear_norm,
    relative_error,
    rotation,
    spectrum,
)

METHODS = ("auto", "pivoted", "eigh", "svd", "polar")


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
    assert info.method == "pivoted"


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
            truth = nuclear_norm(eigen_factor(a.double()), eigen_factor(b.double()))
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
    centered_x, centered_y = x - x.mean(0), y - y.mean(0)
    truth = torch.linalg.svdvals(centered_x @ centered_y.mT).sum() / math.sqrt((n_a - 1) * (n_b - 1))
    for method in METHODS:
        value, info = trace_sqrt_product(torch.cov(x.T), torch.cov(y.T), method=method, impl=impl, return_info=True)
        assert relative_error(value, truth) < 1e-9
        if n_a < d or method != "auto":
            assert info.method in ("pivoted", "eigh", "svd", "polar")


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


def test_mixed_batch_reports_the_method_of_each():
    singular = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).double()
    a, b = torch.stack([covariance(4), singular]), covariance(2, 4)
    value, info = trace_sqrt_product(a, b, return_info=True)
    assert info.methods == ("cholesky", "pivoted")
    assert info.method == "pivoted"
    assert info.error_bound.shape == (2,)
    assert (info.error_bound < 1e-12 * value).all()


def test_a_batch_equals_its_pairs():
    singular = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).double()
    a, b = torch.stack([covariance(4), singular, covariance(4), singular]), torch.stack([singular, covariance(4)])
    value, info = trace_sqrt_product(a[:, None], b, return_info=True)
    for i in range(4):
        for j in range(2):
            single, single_info = trace_sqrt_product(a[i], b[j], return_info=True)
            assert abs(value[i, j] - single) <= info.error_bound[i, j] + single_info.error_bound
            assert relative_error(value[i, j], single) < 1e-13
    assert set(info.methods) >= {"cholesky", "pivoted"}


def test_rounding_level_asymmetry_is_accepted():
    a, b = covariance(8), covariance(8)
    tilted = a.clone()
    tilted[0, 1] *= 1 + 1e-12
    assert relative_error(trace_sqrt_product(tilted, b), trace_sqrt_product(a, b)) < 1e-11


def test_docstring_names_every_option():
    for option in (*linalg.METHODS, *linalg.IMPLS):
        assert f'``"{option}"``' in (linalg.trace_sqrt_product.__doc__ or ""), option


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", ["polar", "jacobi", "auto"])
def test_every_method_on_every_spectrum_and_scale(method, dtype):
    if method == "jacobi" and backend.extension_missing():
        pytest.skip("the extension is not built")
    for name in SPECTRA:
        for d in SIZES[:5] if method == "jacobi" else SIZES[:6]:
            factors = factor(name, d), factor("repeated", d)
            if dtype == torch.float32:  # what is not rounded by float32 itself
                factors = tuple((8 * f).round() for f in factors)
            truth = nuclear_norm(*factors)
            a, b = ((f @ f.mT).to(dtype) for f in factors)
            for scale in (1.0, 2.0**40, 2.0**-40):  # 1e12 and 1e-12
                value, info = trace_sqrt_product(a * scale, b * scale, method=method, return_info=True)
                assert ((value.double() / scale - truth).abs() <= TOLERANCE[dtype] * truth).all(), (name, d, scale)
                assert value.dtype == dtype
                assert info.method == method or method == "auto"
                assert (info.iterations > 0) == (method == "polar")


PAIRS = (("flat", "geometric"), ("clustered", "dominant"), ("repeated", "singular"))


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("d", [768, 2048])
def test_large_float64(d, names):
    """Commuting, so that the truth is known in closed form."""
    a, b = (spectrum(name, d) for name in names)
    b = b[torch.randperm(d)]
    value, info = trace_sqrt_product(reflected(a), reflected(b) * 1e-12, return_info=True)
    assert relative_error(value * 1e6, (a * b).sqrt().sum()) < 1e-9
    assert info.upper - info.lower < 2e-9 * value


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@pytest.mark.parametrize("d", [768, 2048])
def test_large_float32(d, names):
    """Blocks of eight, rows and columns shuffled, so that the truth of the rounded entries is that of the blocks."""
    order = torch.randperm(d)
    blocks = [blocks_of_eight(spectrum(name, d)).float() for name in names]
    truth = nuclear_norm(*(eigen_factor(block.double()) for block in blocks)).sum()
    a, b = (torch.block_diag(*block)[order][:, order] for block in blocks)
    assert relative_error(trace_sqrt_product(a, b * 2.0**40) / 2.0**20, truth) < 1e-5


def reflected(values: Tensor) -> Tensor:
    """A matrix with these eigenvalues, as dense as any, from two reflections, the same ones in every call."""
    d, generator = len(values), torch.Generator().manual_seed(0)
    matrix = torch.diag(values)
    for v in torch.nn.functional.normalize(torch.randn(2, d, generator=generator, dtype=torch.float64)):
        av = matrix @ v
        matrix = matrix - 2 * torch.outer(av, v) - 2 * torch.outer(v, av - 2 * (v @ av) * v)
    return 0.5 * (matrix + matrix.mT)


def blocks_of_eight(values: Tensor) -> Tensor:
    q = torch.linalg.qr(torch.randn(len(values) // 8, 8, 8, dtype=torch.float64))[0]
    return (q * values.reshape(-1, 1, 8)) @ q.mT


@pytest.mark.slow
def test_large_factors():
    (x, a), (y, b) = covariance_of_rank(96, 768, 0), covariance_of_rank(48, 768, 1)
    truth = torch.linalg.svdvals(x @ y.mT).sum()
    assert relative_error(trace_sqrt_product_from_factors(x, y), truth) < 1e-12
    assert relative_error(trace_sqrt_product_from_factors(x, cov=b), truth) < 1e-9
    assert relative_error(trace_sqrt_product(a, b, method="polar"), truth) < 1e-9
    (x, _), (y, _) = covariance_of_rank(256, 2048, 0), covariance_of_rank(128, 2048, 1)
    truth = torch.linalg.svdvals(x @ y.mT).sum()
    assert relative_error(trace_sqrt_product_from_factors(x, y), truth) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_graded_matrices_need_no_eigenvectors(impl):
    grades = torch.logspace(0, -4, 40, dtype=torch.float64)
    f, h = (grades[:, None] * torch.linalg.cholesky(covariance(40)) for _ in range(2))
    a, b = f @ f.mT, h @ h.mT
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        value, info = trace_sqrt_product(a, b, impl=impl, return_info=True)
    assert info.method == "svd"
    assert "aten::linalg_eigh" not in {event.key for event in profile.key_averages()}
    truth = nuclear_norm(f, h)
    assert relative_error(value, truth) < 1e-11
    assert info.lower <= truth <= info.upper
    assert info.error_bound < 1e-9 * value


@pytest.fixture(scope="module")
def digit_features():
    """EfficientNet features of real digits, 24 zeros and 24 ones."""
    pytest.importorskip("sklearn")
    from fastgan.data import digits
    from fastgan.metrics.backbones import load_backbone

    data, _ = digits()
    network = load_backbone("efficientnet_lite0")
    images = (data.images.float() + 1) / 2
    return [network(images[data.labels == label][:24].clamp(0, 1)).double() for label in (0, 1)]


@pytest.mark.slow
def test_real_features(digit_features):
    x, y = ((f - f.mean(0)) / math.sqrt(len(f) - 1) for f in digit_features)
    truth = torch.linalg.svdvals(x @ y.mT).sum()
    for factors, cov in (((x, y), None), ((x,), y.mT @ y), ((y,), x.mT @ x)):
        value, info = trace_sqrt_product_from_factors(*factors, cov=cov, return_info=True)
        assert relative_error(value, truth) < 1e-9
        assert info.method == "lowrank"
    spread = (x.square().sum(0) * y.square().sum(0)).topk(20).indices  # full rank
    x, y = x[:, spread], y[:, spread]
    truth = torch.linalg.svdvals(x @ y.mT).sum()
    for method in (*METHODS, "cholesky"):
        for dtype, tolerance in TOLERANCE.items():
            value = trace_sqrt_product((x.mT @ x).to(dtype), (y.mT @ y).to(dtype), method=method)
            assert relative_error(value, truth) < tolerance, (method, dtype)


@st.composite
def exact_factors(draw):
    """Two integer matrices (n, d) with graded columns, whose covariances F^T F are exact in float64."""
    d = draw(st.integers(1, 8))
    sides = []
    for _ in range(2):
        n = draw(st.integers(1, 12))
        entries = st.lists(st.integers(-9, 9), min_size=n * d, max_size=n * d)
        grades = st.lists(st.integers(-8, 0), min_size=d, max_size=d)
        sides.append(torch.tensor(draw(entries)).reshape(n, d) * 2.0 ** torch.tensor(draw(grades)).double())
    return sides


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    exact_factors(),
    st.sampled_from(["auto", "cholesky", "pivoted", "eigh", "svd", "polar", "jacobi", "lowrank", "one factor"]),
)
def test_bounds_contain_the_truth(sides, method):
    f, h = sides
    truth = torch.linalg.svdvals(f @ h.mT).sum()
    slack = 1e-15 * torch.linalg.norm(f) * torch.linalg.norm(h)  # the oracle's own rounding
    definite = torch.linalg.matrix_rank(f) == f.shape[1]
    assume(method != "cholesky" or definite)
    assume(method != "jacobi" or not backend.extension_missing())
    if method == "lowrank":
        value, info = trace_sqrt_product_from_factors(f, h, return_info=True)
    elif method == "one factor":
        value, info = trace_sqrt_product_from_factors(f, cov=h.mT @ h, return_info=True)
    else:
        value, info = trace_sqrt_product(f.mT @ f, h.mT @ h, method=method, return_info=True)
    assert info.lower <= value <= info.upper
    assert info.lower - slack <= truth <= info.upper + slack
    assert info.error_bound <= 1e-5 * truth + slack


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", ["auto", "polar"])
def test_one_reference_against_many_is_factored_once(method, impl):
    in_one_call = method == "auto" and impl == "extension"  # up to a size, by the extension alone
    d = DEFINITE_SIZE + 1 if in_one_call else 33
    candidates, one = covariance(6, d), covariance(d)
    own_factors = 1 if method == "polar" else 0  # the candidates', as one batch
    for pair in ((candidates, one), (one, candidates)):
        found = count_factorizations(lambda pair=pair: trace_sqrt_product(*pair, method=method, impl=impl))
        assert found == 1 + own_factors
