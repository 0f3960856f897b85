"""Forward mode and ``torch.func`` against reverse mode, differences and loops."""

import math
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from fastgan.linalg import (
    covariance_factor,
    drop_redundant_row,
    nuclear_norm,
    sqrtm,
    trace_sqrt_product,
    trace_sqrt_product_from_factors,
)
from fastgan.linalg._symmetric import symmetric_part
from tests.linalg.spectra import IMPLS, covariance


def symmetrized(function, **options):
    """``function`` of symmetric matrices: differences of single entries leave its domain."""
    return lambda *operands: function(*map(symmetric_part, operands), **options)


def against_covariance(f, cov):
    return trace_sqrt_product_from_factors(f, cov=symmetric_part(cov))


def without_mean(x):
    return drop_redundant_row(x - x.mean(-2, keepdim=True)).square()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def identity(d):
    return torch.eye(d, dtype=torch.float64)


CASES = {
    "sqrtm": lambda: (symmetrized(sqrtm), covariance(2, 3)),
    "inverse root": lambda: (symmetrized(sqrtm, inverse=True), covariance(3)),
    "sqrtm by newton_schulz": lambda: (symmetrized(sqrtm, method="newton_schulz"), covariance(3)),
    "root of repeated eigenvalues": lambda: (symmetrized(sqrtm), identity(3)),
    "wide nuclear_norm": lambda: (nuclear_norm, normal(2, 2, 4)),
    "tall nuclear_norm": lambda: (partial(nuclear_norm, method="polar"), normal(4, 2)),
    "square nuclear_norm": lambda: (partial(nuclear_norm, method="svd"), normal(3, 3)),
    "trace_sqrt_product": lambda: (symmetrized(trace_sqrt_product), covariance(3), covariance(3)),
    "broadcast trace_sqrt_product": lambda: (symmetrized(trace_sqrt_product), covariance(2, 1, 2), covariance(3, 2)),
    "one reference": lambda: (symmetrized(trace_sqrt_product), covariance(3), covariance(2, 3)),
    "trace of repeated eigenvalues": lambda: (symmetrized(trace_sqrt_product), identity(3), 4 * identity(3)),
    "two factors": lambda: (trace_sqrt_product_from_factors, normal(2, 2, 4), normal(3, 4)),
    "a factor and a covariance": lambda: (against_covariance, normal(3, 4), covariance(4)),
    "factors and covariances": lambda: (against_covariance, normal(2, 3, 3), covariance(2, 3)),
    "drop_redundant_row": lambda: (without_mean, normal(2, 3, 2)),
}
every_case = pytest.mark.parametrize("name", CASES)


def weighted(function):
    def scalar(*operands):
        value = function(*operands)
        return (value * torch.arange(1.0, 1 + value.numel(), dtype=value.dtype).reshape(value.shape)).sum()

    return scalar


def assert_all_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@every_case
def test_forward_mode_equals_differences(name):
    function, *operands = CASES[name]()
    operands = [x.requires_grad_() for x in operands]
    assert gradcheck(
        function, operands, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(function, operands, check_fwd_over_rev=True, check_rev_over_rev=True)


@every_case
def test_jacobians(name):
    function, *operands = CASES[name]()
    every = tuple(range(len(operands)))
    expected = jacobian(function, tuple(operands))
    for transform in (jacfwd, jacrev):
        assert_all_close(transform(function, argnums=every)(*operands), expected)
    for strategy in ("reverse-mode", "forward-mode"):
        found = jacobian(function, tuple(operands), vectorize=True, strategy=strategy)
        assert_all_close(tuple(found), expected)


@every_case
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
def test_hessians(name, outer, inner):
    function, *operands = CASES[name]()
    function, every = weighted(function), tuple(range(len(operands)))
    expected = hessian(function, tuple(operands))
    assert_all_close(outer(inner(function, argnums=every), argnums=every)(*operands), expected)
    assert_all_close(hessian(function, tuple(operands), vectorize=True), expected)


@every_case
def test_vmap(name):
    function, *operands = CASES[name]()
    scales, scalar = (1.0, 4.0), weighted(function)
    many = [torch.stack([scale * x for scale in scales]) for x in operands]
    last = [x.movedim(0, -1) for x in many]
    loop = [[scale * x for x in operands] for scale in scales]
    values = torch.stack([function(*one) for one in loop])
    assert_all_close(vmap(function)(*many), values)
    assert_all_close(vmap(function, in_dims=-1, out_dims=-1)(*last), values.movedim(0, -1))
    assert_all_close(vmap(vmap(function), in_dims=-1)(*[torch.stack([x, x], -1) for x in many])[1], values)
    assert_all_close(vmap(grad(scalar))(*many), torch.stack([grad(scalar)(*one) for one in loop]))
    for k in range(len(operands)):  # one operand is mapped over, the others are not
        mixed = [*operands[:k], many[k], *operands[k + 1 :]]
        dims = tuple(0 if j == k else None for j in range(len(operands)))
        expected = [function(*operands[:k], x, *operands[k + 1 :]) for x in many[k]]
        assert_all_close(vmap(function, in_dims=dims)(*mixed), torch.stack(expected))
        expected = [grad(scalar, argnums=k)(*operands[:k], x, *operands[k + 1 :]) for x in many[k]]
        assert_all_close(vmap(grad(scalar, argnums=k), in_dims=dims)(*mixed), torch.stack(expected))


@every_case
def test_vmap_of_jvp_and_of_vjp(name):
    function, *operands = CASES[name]()
    directions = [torch.stack([x, x.flip(-1)]) for x in operands]

    def along(*direction):
        return jvp(function, tuple(operands), direction)[1]

    expected = torch.stack([along(*one) for one in zip(*directions, strict=True)])
    assert_all_close(vmap(along)(*directions), expected)
    value, back = vjp(function, *operands)
    for cotangent in (torch.ones_like(value), torch.randn_like(value)):
        pairs = zip(back(cotangent), operands, strict=True)
        product = torch.stack([(gradient * x).sum() for gradient, x in pairs]).sum()
        assert_all_close((cotangent * along(*operands)).sum(), product)
    many = torch.stack([torch.ones_like(value), torch.randn_like(value)])
    for found, *expected in zip(vmap(back)(many), *map(back, many), strict=True):
        assert_all_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", [name for name in CASES if name != "drop_redundant_row"])  # reads float64 rounding
def test_float32_tangents_equal_those_of_float64(name):
    function, *operands = CASES[name]()
    single = tuple(x.float() for x in operands)
    directions = tuple(x.mT.contiguous().reshape(x.shape) for x in single)
    value, tangent = jvp(function, single, directions)
    assert value.dtype == tangent.dtype == torch.float32
    expected = jvp(function, tuple(x.double() for x in single), tuple(x.double() for x in directions))
    scale = max(1.0, expected[1].abs().max().item())
    torch.testing.assert_close((value.double(), tangent.double()), expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("function", "methods"),
    [
        (sqrtm, ("auto", "eigh", "newton_schulz")),
        (nuclear_norm, ("auto", "gram", "svd", "polar")),
        (trace_sqrt_product, ("auto", "cholesky", "pivoted", "eigh", "svd", "polar")),
    ],
)
def test_every_method_and_implementation(function, methods, impl):
    operands = tuple(covariance(4) for _ in range(2 if function is trace_sqrt_product else 1))
    for method in methods:
        run = partial(function, method=method, impl=impl)
        value, tangent = jvp(run, operands, operands)
        degree = 1 if function is not sqrtm else 0.5  # Euler: f'(x) x = degree f(x)
        assert_all_close(value, run(*operands))
        assert_all_close(tangent, degree * value)


@pytest.mark.parametrize("name", ["sqrtm", "inverse root", "wide nuclear_norm", "one reference"])
def test_gradients_by_products_have_tangents_too(name, monkeypatch):
    for op in ("nuclear_norm", "trace_gradients", "sqrtm"):
        monkeypatch.setattr(f"fastgan.linalg._{op}.by_products", lambda operand: True)
    function, *operands = CASES[name]()
    every = tuple(range(len(operands)))
    scalar, expected = weighted(function), jacobian(function, tuple(operands))
    assert_all_close(jacfwd(function, argnums=every)(*operands), expected)
    expected = hessian(scalar, tuple(operands))
    assert_all_close(jacfwd(jacfwd(scalar, argnums=every), argnums=every)(*operands), expected)


def test_singular_matrices():
    low = normal(4, 2)
    a, m, b = low @ low.mT, low @ normal(2, 5), covariance(4)
    f = normal(3, 4)
    for function, operands in (
        (sqrtm, (a,)),
        (nuclear_norm, (m,)),
        (trace_sqrt_product, (a, b)),
        (trace_sqrt_product, (b, a)),
        (lambda f, a: trace_sqrt_product_from_factors(f, cov=a), (f, a)),
    ):
        scalar = weighted(function)
        leaves = [x.clone().requires_grad_() for x in operands]
        expected = torch.autograd.grad(scalar(*leaves), leaves)
        directions = tuple(operands)  # within the range of the singular matrix
        _, tangent = jvp(scalar, operands, directions)
        product = torch.stack([(g * t).sum() for g, t in zip(expected, directions, strict=True)]).sum()
        torch.testing.assert_close(tangent, product, rtol=1e-6, atol=1e-8)
        h = 1e-6
        plus, minus = ([(1 + sign * h) * x for x in operands] for sign in (1, -1))
        torch.testing.assert_close(tangent, (scalar(*plus) - scalar(*minus)) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sqrtm", "square nuclear_norm", "one reference"])
def test_a_graph_from_outside_is_differentiated_within(name):
    function, *operands = CASES[name]()
    operands = [x.requires_grad_() for x in operands]
    value = function(*operands)
    weight, change = torch.rand_like(value).requires_grad_(), torch.rand_like(value)
    expected = torch.autograd.grad(value, operands, change, retain_graph=True)
    with forward_ad.dual_level():  # gradients are linear in the weight
        gradients = torch.autograd.grad(value, operands, forward_ad.make_dual(weight, change), create_graph=True)
        tangents = tuple(forward_ad.unpack_dual(gradient).tangent for gradient in gradients)
    assert_all_close(tangents, expected)


def test_second_order_in_a_level_of_forward_mode():
    a, b = covariance(3), covariance(3)
    expected = jvp(grad(weighted(trace_sqrt_product), argnums=(0, 1)), (a, b), (b, a))[1]
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    with forward_ad.dual_level():
        value = trace_sqrt_product(*[forward_ad.make_dual(x, t) for x, t in zip(leaves, (b, a), strict=True)])
        tangent = forward_ad.unpack_dual(value).tangent
    assert_all_close(torch.autograd.grad(tangent, leaves), expected)


def test_bad_input_is_refused_under_transforms_too():
    indefinite, good = torch.diag(torch.tensor([1.0, 1.0, -0.5])).double(), covariance(3)
    both = torch.stack([good, indefinite])
    for function in (sqrtm, partial(trace_sqrt_product, good), partial(against_covariance, good)):
        for transform in (lambda x: jvp(function, (x,), (x,)), lambda x: grad(weighted(function))(x)):  # noqa: B023
            with pytest.raises(ValueError, match=r"must be positive semi-definite: .* is -0\.5 of the largest"):
                transform(indefinite)
        with pytest.raises(ValueError, match=r"matrix 1 of the flattened batch, must be positive semi-definite"):
            vmap(function)(both)
        with pytest.raises(ValueError, match=r"must be positive semi-definite"):
            vmap(function, in_dims=2)(both.movedim(0, 2))
    with pytest.raises(ValueError, match=r"^m, matrix 1 of the flattened batch, must be finite"):
        vmap(nuclear_norm)(torch.stack([good, math.nan * good]))
    with pytest.raises(ValueError, match=r"^a, matrix 1 of the flattened batch, must be symmetric"):
        vmap(grad(weighted(sqrtm)))(torch.stack([good, good.triu()]))


def test_reports():
    a, b = covariance(2, 3), covariance(3)

    def with_info(a):
        value, info = trace_sqrt_product(a, b, return_info=True)
        return value, (info.lower, info.upper)

    value, tangent, (lower, upper) = jvp(with_info, (a,), (a,), has_aux=True)
    assert_all_close(tangent, 0.5 * value)
    assert ((lower <= value) & (value <= upper)).all()
    with pytest.raises(NotImplementedError, match=r"^return_info=True is not available under torch\.vmap"):
        vmap(with_info)(a)


def test_covariance_factor_has_no_derivative():
    cov = covariance(3)
    with pytest.raises(NotImplementedError, match="^covariance_factor has no derivative and no vmap"):
        jvp(covariance_factor, (cov,), (cov,))
    with pytest.raises(NotImplementedError, match="^covariance_factor has no derivative and no vmap"):
        vmap(covariance_factor)(cov[None])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="^covariance_factor has no derivative"):
        covariance_factor(forward_ad.make_dual(cov, cov))

    def against_constant(x):
        return trace_sqrt_product_from_factors(x, covariance_factor(cov))

    assert_all_close(jvp(against_constant, (cov,), (cov,))[1], against_constant(cov))


@pytest.mark.parametrize("name", ["square nuclear_norm", "trace_sqrt_product"])
def test_third_derivatives_are_refused(name):
    function, *operands = CASES[name]()
    for outer in (jacfwd, jacrev):
        for middle in (jacfwd, jacrev):
            with pytest.raises(NotImplementedError, match="its third derivative is not implemented"):
                outer(middle(jacrev(function)))(*operands)
    operands = [x.requires_grad_() for x in operands]
    (first, *_) = torch.autograd.grad(function(*operands), operands, create_graph=True)
    (second, *_) = torch.autograd.grad(first.square().sum(), operands, create_graph=True)
    with pytest.raises(NotImplementedError, match="its third derivative is not implemented"):
        torch.autograd.grad(second.square().sum(), operands)


@pytest.mark.slow
def test_roots_have_third_derivatives():
    a = covariance(2)
    function = weighted(symmetrized(sqrtm))
    expected = jacrev(jacrev(jacrev(function)))(a)
    assert_all_close(jacfwd(jacfwd(jacfwd(function)))(a), expected)
    assert_all_close(jacfwd(jacrev(jacfwd(function)))(a), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sqrtm", "square nuclear_norm", "one reference", "a factor and a covariance"])
def test_compiled(name):
    function, *operands = CASES[name]()
    operands = tuple(operands)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    assert_all_close(compiled(*operands), function(*operands))  # a graph that must not serve the calls below
    expected = jvp(function, operands, operands)
    assert_all_close(jvp(compiled, operands, operands), expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(compiled(*[forward_ad.make_dual(x, x) for x in operands]))
    assert_all_close(tuple(dual), expected)
    for transformed in (
        lambda *x: jvp(function, x, x)[1],
        grad(weighted(function)),
        lambda *x: vmap(function)(*[torch.stack([y, 2 * y]) for y in x]),
    ):
        within = torch.compile(transformed, backend="aot_eager")
        assert_all_close(within(*operands), transformed(*operands))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fastgan.linalg runs eagerly under transforms"):
        torch.compile(lambda *x: jvp(function, x, x)[1], backend="aot_eager", fullgraph=True)(*operands)
