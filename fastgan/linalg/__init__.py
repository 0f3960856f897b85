"""Matrix functions of covariances: batched, differentiable, and right to the last digits also for singular ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor

from fastgan.linalg import _checks as checks
from fastgan.linalg import _nuclear_norm as nuclear_norm_ops
from fastgan.linalg import _nuclear_norm_reference as norm_reference
from fastgan.linalg import _sqrtm as sqrtm_ops
from fastgan.linalg import _trace as trace_ops
from fastgan.linalg import _trace_reference as trace_reference
from fastgan.linalg._checks import ASYMMETRIC, DTYPES
from fastgan.linalg._factors import against_covariance, against_factor
from fastgan.linalg._nuclear_norm import IMPLS, ITERATIONS, LOWER, METHOD, UPPER, resolve
from fastgan.linalg._trace_reference import FAILED, INDEFINITE

__all__ = ["ASYMMETRIC", "DTYPES", "IMPLS", "TraceSqrtInfo", "nuclear_norm", "sqrtm", "trace_sqrt_product"]

METHODS = (*trace_ops.METHODS, "lowrank")
NORM_METHODS = ("auto", "svd", "gram", "polar")

_TRACE_NAMES = {getattr(trace_reference, name.upper()): name for name in trace_ops.METHODS if name != "auto"}
_NORM_NAMES = {code: name for name, code in norm_reference.METHODS.items()}

Factors = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class TraceSqrtInfo:
    """How :func:`trace_sqrt_product` or :func:`nuclear_norm` found its values.

    Attributes:
        method: the costliest of ``methods``; ``"lowrank"`` where factors were given.
        methods: what was used for each matrix or pair of the flattened batch.
        lower, upper: float64, shape of the value: bounds of what exact arithmetic would give, from the entries as they
            are.
        iterations: int64, shape of the value: steps of an iteration, 0 for the direct methods.
        implementation: ``"extension"`` or ``"reference"``.
    """

    method: str
    methods: tuple[str, ...]
    lower: Tensor
    upper: Tensor
    iterations: Tensor
    implementation: str

    @property
    def error_bound(self) -> Tensor:
        """Half the distance between the bounds."""
        return 0.5 * (self.upper - self.lower)


def sqrtm(a: Tensor, *, method: str = "auto", inverse: bool = False, impl: str = "auto") -> Tensor:
    """The symmetric positive semi-definite root A^{1/2}, or A^{-1/2}, of symmetric positive semi-definite matrices.

    Args:
        a: shape (..., d, d), float32 or float64. May be singular unless ``inverse``. Computed in float64.
        method: ``"eigh"`` takes eigenvectors; ``"newton_schulz"`` the coupled Newton-Schulz iteration, matrix products
            alone (Higham, "Functions of Matrices", 2008), which resolves eigenvalues down to 1e-10 of |A|_F, 1e-16 for
            the inverse. ``"auto"`` is ``"eigh"`` on a CPU; on a GPU, where eigensolvers are slow, ``"newton_schulz"``,
            and ``"eigh"`` for what does not converge.
        inverse: the root of the inverse; ``a`` must be positive definite.
        impl: ``"extension"`` (C++/CUDA), ``"reference"`` (plain PyTorch, same iteration), or ``"auto"``: the first
            available. ``"eigh"`` is torch's in both.

    Returns:
        The root, of the shape and dtype of ``a``; differentiable any number of times. Gradients are symmetric, solve
        the Lyapunov equation S X + X S = G in the eigenbasis (on a GPU, for definite S, by Newton-Schulz steps), and
        are zero, not infinite, between directions that a singular matrix lacks.

    Raises:
        ValueError: ``a`` is not square, not finite, clearly asymmetric or indefinite (by 1e-5 of its largest entry or
            eigenvalue), of another dtype, or singular with ``inverse=True``.
        RuntimeError: ``method="newton_schulz"`` did not converge.
    """
    checks.check_square("a", a)
    checks.check_options(method, sqrtm_ops.METHODS, impl)
    if not checks.watched():
        impl = resolve(impl, a.device)
        checks.check_symmetric("a", a)
        if inverse:
            checks.check_definite("a", a)
        else:
            checks.check_semidefinite("a", a)
    return sqrtm_ops.call(a, method, inverse, impl)


@overload
def nuclear_norm(m: Tensor, *, method: str = ..., impl: str = ..., return_info: Literal[False] = ...) -> Tensor: ...
@overload
def nuclear_norm(
    m: Tensor, *, method: str = ..., impl: str = ..., return_info: Literal[True]
) -> tuple[Tensor, TraceSqrtInfo]: ...
def nuclear_norm(
    m: Tensor, *, method: str = "auto", impl: str = "auto", return_info: bool = False
) -> Tensor | tuple[Tensor, TraceSqrtInfo]:
    """||M||_*, the sum of the singular values.

    Args:
        m: shape (..., rows, cols), float32 or float64. Computed in float64, but for the first iterations of ``"polar"``
            on float32 matrices.
        method: ``"gram"`` takes eigenvalues of M M^T (of the smaller side), ``"svd"`` singular values. ``"polar"`` is
            <U, M> by the polar factor U, from matrix products alone: scaled Newton-Schulz (Chen & Chow, 2014).
            ``"auto"``: on a CPU ``"gram"`` where its error bound is below 1e-9 of the value (1e-7 for float32), else
            ``"svd"``; on a GPU ``"polar"``.
        impl: as in :func:`sqrtm`.
        return_info: return also a :class:`TraceSqrtInfo`.

    Returns:
        The value, of the batch shape and dtype of ``m``, differentiable twice: the gradient is the polar factor, and
        zero in directions that a rank-deficient M lacks.

    Raises:
        ValueError: ``m`` has under two dimensions or an empty one, another dtype, or entries that are not finite.
    """
    checks.check_matrix("m", m)
    checks.check_options(method, NORM_METHODS, impl)
    if not checks.watched():
        impl = resolve(impl, m.device)
        checks.check_finite("m", m)
    value, report = nuclear_norm_ops.call(m, method, impl, return_info)
    return (value, _info(report, _NORM_NAMES, impl)) if return_info else value


@overload
def trace_sqrt_product(
    a: Tensor | None,
    b: Tensor | None,
    *,
    factors: Factors | None = ...,
    method: str = ...,
    impl: str = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def trace_sqrt_product(
    a: Tensor | None,
    b: Tensor | None,
    *,
    factors: Factors | None = ...,
    method: str = ...,
    impl: str = ...,
    return_info: Literal[True],
) -> tuple[Tensor, TraceSqrtInfo]: ...
def trace_sqrt_product(
    a: Tensor | None,
    b: Tensor | None,
    *,
    factors: Factors | None = None,
    method: str = "auto",
    impl: str = "auto",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, TraceSqrtInfo]:
    """tr((A B)^{1/2}) for symmetric positive semi-definite A and B, the cross term of the Frechet distance.

    It is the sum of the singular values of F^T H, where A = F F^T and B = H H^T (Dowson & Landau, "The Frechet distance
    between multivariate normal distributions", 1982). Returned in the operands' dtype but computed in float64 also for
    float32 ones: a square root of an eigenvalue at rounding level keeps half the digits only. The entries are taken as
    exact; eigenvalues below zero, and in a singular matrix those up to d * 8.9e-16 of the largest, as zero. So a
    singular covariance that was rounded to float32 brings a relative error of about 1e-4 for each missing direction
    along: keep covariances in float64, or give factors.

    ========================================  ==========================================================================
    ``method``                                what it does
    ========================================  ==========================================================================
    ``"cholesky"``                            eigenvalues of L^T B L, with A = L L^T of the operand that has fewer
                                              matrices, which must be positive definite
    ``"pivoted"``                             the same with a factor by pivoted Cholesky, which has as many columns as A
                                              has rank, or of B where that has fewer; on a CPU, for singular A
    ``"eigh"``                                the same with a factor by eigenvectors: slow, also for A with eigenvalues
                                              below zero that are not quite rounding
    ``"svd"``                                 singular values of the product of two such factors: slow, for any spectrum
    ``"polar"``                               matrix products alone: the polar factor U of M = F^T H by scaled
                                              Newton-Schulz, then <U, M>; float32 iterations first for float32 operands
    ``"jacobi"``                              pivoted Cholesky and one-sided Jacobi of each pair, d <= 64, one kernel
                                              for the whole batch; needs ``impl="extension"``
    ``"lowrank"``                             with the given ``factors``: singular values of F H^T, or of F L with
                                              B = L L^T; on a CPU, for one F of more than d / 2 rows, eigenvalues of
                                              F B F^T where their error bound is as small as for ``"auto"``
    ========================================  ==========================================================================

    ========================================  ==========================================================================
    ``"auto"`` with                           is
    ========================================  ==========================================================================
    ``factors``                               ``"lowrank"``
    CPU                                       ``"cholesky"`` where its error bound is below 1e-9 of the value (1e-7 for
                                              float32); ``"pivoted"`` of the singular one where A or B is, with the same
                                              bound, or ``"eigh"`` where that fails; else ``"svd"``, of Cholesky factors
                                              where they serve. As one batch from 4 pairs on where d <= 128, else pair
                                              by pair
    GPU, d <= 64, extension built             ``"jacobi"``
    GPU                                       ``"polar"``
    ========================================  ==========================================================================

    ``python -m bench --suite sqrtm`` times every method that a device can run.

    Args:
        a, b: shape (..., d, d), float32 or float64, same dtype and device. Batch dimensions broadcast; of one reference
            against K candidates, the reference is factored once. Either may be None where its factor is given.
        factors: (F, H), either None: F of shape (..., n, d) with F^T F = A, e.g. centred features over sqrt(n - 1).
            Then A is neither read nor factored.
        method: one of those above.
        impl: ``"extension"`` (C++/CUDA), ``"reference"`` (plain PyTorch, same algorithm), or ``"auto"``: the first
            available.
        return_info: return also a :class:`TraceSqrtInfo`.

    Returns:
        The value, of the broadcast batch shape and the operands' dtype, differentiable twice in operands or factors.
        Gradients of ``a`` and ``b`` are symmetric. In directions that a singular operand lacks, where the derivative is
        infinite, they are zero. On a GPU those of definite operands are matrix products and triangular solves alone.

    Raises:
        ValueError: an operand is not square, not finite, clearly asymmetric or indefinite (by 1e-5 of its largest entry
            or eigenvalue), of another dtype, or does not fit the other; ``method="cholesky"`` meets a singular matrix,
            or ``method="pivoted"`` one that is indefinite beyond rounding.
    """
    checks.check_options(method, METHODS, impl)
    if factors is not None or method == "lowrank":
        return _lowrank(a, b, factors, method, impl, return_info)
    for name, operand in (("a", a), ("b", b)):
        checks.check_square(name, operand)  # type: ignore[arg-type]
    assert a is not None
    assert b is not None
    checks.check_pair(("a", "b"), a, b)
    watched = checks.watched()
    if not watched:
        impl = resolve(impl, a.device)
        checks.check_symmetric("a", a)
        checks.check_symmetric("b", b)
    if method == "jacobi" and (impl == "reference" or a.shape[-1] > trace_ops.JACOBI_SIZE):
        limit = trace_ops.JACOBI_SIZE
        raise ValueError(f"method='jacobi' needs the extension and d <= {limit}, got impl={impl!r}, d = {a.shape[-1]}")
    if method == "pivoted" and a.is_cuda:
        raise ValueError(f"method='pivoted' runs on a CPU: it looks at each pivot; got operands on {a.device}")
    value, report = trace_ops.call(a, b, method, impl, return_info)
    if not watched and bool((report[..., METHOD] == FAILED).any()):
        raise ValueError(_failure(a, b, method))
    return (value, _info(report, _TRACE_NAMES, impl)) if return_info else value


def _failure(a: Tensor, b: Tensor, method: str) -> str:
    """Why no value was found; called after the fact only, so its own eigenvalues cost nothing in the good case."""
    for name, operand in (("a", a), ("b", b)):
        share = checks.smallest_share(operand)
        if share.min() < -INDEFINITE:
            return checks.indefinite(name, share)
    if method == "cholesky":
        factored = "b" if b.shape[:-2].numel() < a.shape[:-2].numel() else "a"
        return f"{factored} must be positive definite for method='cholesky', and is singular: use 'auto' or 'eigh'"
    if method == "pivoted":
        return "a and b must be positive semi-definite up to rounding for method='pivoted': use 'auto' or 'eigh'"
    return "a and b must be positive semi-definite"


def _lowrank(
    a: Tensor | None, b: Tensor | None, factors: Factors | None, method: str, impl: str, return_info: bool
) -> Tensor | tuple[Tensor, TraceSqrtInfo]:
    if factors is None or len(factors) != 2 or all(factor is None for factor in factors):
        raise ValueError(f"factors must be a pair with at least one factor for method='lowrank', got {factors!r}")
    if method not in ("auto", "lowrank"):
        raise ValueError(f"method must be 'auto' or 'lowrank' where factors are given, got {method!r}")
    names = tuple(f"factors[{i}]" if factor is not None else "ab"[i] for i, factor in enumerate(factors))
    left, right = (factor if factor is not None else operand for factor, operand in zip(factors, (a, b), strict=True))
    for name, operand, factor in zip(names, (left, right), factors, strict=True):
        (checks.check_matrix if factor is not None else checks.check_square)(name, operand)  # type: ignore[arg-type]
    assert left is not None
    assert right is not None
    checks.check_pair((names[0], names[1]), left, right)
    if not checks.watched():
        for name, operand, factor in zip(names, (left, right), factors, strict=True):
            (checks.check_finite if factor is not None else checks.check_symmetric)(name, operand)
    first, second = factors
    if first is None:
        first, second, right, names = second, first, left, (names[1], names[0])
    assert first is not None
    impl = resolve(impl, first.device)
    if second is not None:
        value, report = against_factor(first, second, impl, return_info)
    else:
        value, report = against_covariance(first, names[1], right, impl, return_info)
    value = value.to(first.dtype)
    if not return_info:
        return value
    info = _info(report, _NORM_NAMES, impl)
    return value, TraceSqrtInfo(
        "lowrank", ("lowrank",) * len(info.methods), info.lower, info.upper, info.iterations, info.implementation
    )


def _info(report: Tensor, names: dict[int, str], implementation: str) -> TraceSqrtInfo:
    codes = report[..., METHOD].reshape(-1).long().tolist()
    methods = tuple(names[code] for code in codes)
    method = names[max(codes, default=min(names))]
    iterations = report[..., ITERATIONS].long()
    return TraceSqrtInfo(method, methods, report[..., LOWER], report[..., UPPER], iterations, implementation)
