"""Matrix functions of covariances: batched, differentiable, and right to the last digits also for singular ones.

Reverse mode, forward mode and ``torch.func`` work, in any nesting with ``torch.vmap``. ``torch.compile`` runs calls
under a transform eagerly.

Within a CUDA graph no value can be read, so operands are not checked there. Results and gradients are NaN for operands
that are indefinite or need an eigensolver, as most singular ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor

from fastgan._dispatch import needs_no_dispatch
from fastgan.linalg import _checks as checks
from fastgan.linalg import _nuclear_norm as norm_ops
from fastgan.linalg import _sqrtm as sqrtm_ops
from fastgan.linalg import _trace as trace_ops
from fastgan.linalg._checks import ASYMMETRIC, DTYPES
from fastgan.linalg._dispatch import IMPLS, resolve, watched
from fastgan.linalg._factors import against_covariance, against_factor, covariance_factor, drop_redundant_row
from fastgan.linalg._nuclear_norm import ITERATIONS, LOWER, METHOD, UPPER
from fastgan.linalg._trace_direct import BY_COST, FAILED, METHODS
from fastgan.linalg._transforms import is_mapped, values_of

__all__ = [
    "ASYMMETRIC",
    "DTYPES",
    "IMPLS",
    "TraceSqrtInfo",
    "covariance_factor",
    "drop_redundant_row",
    "nuclear_norm",
    "sqrtm",
    "trace_sqrt_product",
    "trace_sqrt_product_from_factors",
]


@dataclass(frozen=True)
class TraceSqrtInfo:
    """Methods and error bounds of values of :func:`nuclear_norm`, :func:`trace_sqrt_product` or its form for factors.

    Attributes:
        method: the costliest of ``methods``; ``"lowrank"`` from :func:`trace_sqrt_product_from_factors`.
        methods: the method used for each matrix or pair of the flattened batch.
        lower, upper: float64, shape of the value: bounds of the result that exact arithmetic on the same entries gives.
        iterations: int64, shape of the value: steps of an iteration, 0 for the direct methods.
        implementation: ``"extension"`` if the C++/CUDA extension could take its part, else ``"reference"``.

    Example:
        >>> value, info = trace_sqrt_product(torch.eye(4), torch.eye(4), return_info=True)
        >>> bool(info.lower <= value <= info.upper)
        True
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
    """Compute the symmetric root A^{1/2}, or A^{-1/2}, of symmetric positive semi-definite matrices.

    Args:
        a: shape (..., d, d), float32 or float64. May be singular unless ``inverse``. Computed in float64.
        method: ``"eigh"`` uses eigenvectors. ``"newton_schulz"`` uses the coupled Newton-Schulz iteration, which
            consists of matrix products (Higham, "Functions of Matrices", 2008) and resolves eigenvalues down to 1e-10
            of |A|_F, 1e-16 for the inverse. ``"auto"`` is ``"eigh"`` on a CPU. On a GPU, whose eigensolvers are slow,
            it is ``"newton_schulz"``, and ``"eigh"`` for matrices that do not converge.
        inverse: return A^{-1/2}; ``a`` must be positive definite.
        impl: ``"extension"`` uses C++/CUDA for the iteration on a GPU and for scaling the matrices on a CPU.
            ``"reference"`` is plain PyTorch, with the same steps. ``"auto"`` is the first available.

    Returns:
        The root, of the shape and dtype of ``a``; differentiable any number of times. Gradients are symmetric and solve
        the Lyapunov equation S X + X S = G in the eigenbasis (on a GPU, for definite S, by Newton-Schulz steps). In
        the null space of a singular matrix they are zero, not infinite.

    Raises:
        ValueError: ``a`` is not square, not finite, clearly asymmetric or indefinite (by 1e-5 of its largest entry or
            eigenvalue), of another dtype, or singular with ``inverse=True``.
        RuntimeError: ``method="newton_schulz"`` did not converge.

    >>> import torch
    >>> sqrtm(torch.tensor([[5.0, 4.0], [4.0, 5.0]]))
    tensor([[2., 1.],
            [1., 2.]])
    """
    checks.check_square("a", a)
    checks.check_options(method=(method, sqrtm_ops.METHODS), impl=(impl, IMPLS))
    if not watched():
        impl = resolve(impl, a.device)
        checks.check_symmetric("a", a, impl)
        if not sqrtm_ops.by_eigenvectors(a, method):  # else the op looks at its eigenvalues
            checks.check_eigenvalues("a", a, definite=inverse)
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
    """Compute the nuclear norm ||M||_*, the sum of the singular values.

    Args:
        m: shape (..., rows, cols), float32 or float64. Computed in float64, but for the first iterations of ``"polar"``
            on float32 matrices.
        method: ``"gram"`` uses eigenvalues of M M^T (of the smaller side), ``"svd"`` singular values. ``"polar"`` is
            <U, M> with the polar factor U, from matrix products alone by scaled Newton-Schulz (Chen & Chow, 2014).
            ``"auto"`` on a CPU is ``"gram"`` if its error bound is below 1e-9 of the value (1e-7 for float32), else
            ``"svd"``; on a GPU it is ``"polar"``.
        impl: ``"extension"`` (CUDA) or ``"reference"`` (plain PyTorch, the same steps) for the polar iteration on a
            GPU; ``"auto"`` is the first available. On a CPU all methods are PyTorch.
        return_info: return also a :class:`TraceSqrtInfo`.

    Returns:
        The value, of the batch shape and dtype of ``m``, differentiable twice: the gradient is the polar factor, and
        zero in the null space of a rank-deficient M.

    Raises:
        ValueError: ``m`` has under two dimensions or an empty one, another dtype, or entries that are not finite.

    >>> import torch
    >>> nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
    tensor(7.)
    """
    checks.check_matrix("m", m)
    checks.check_options(method=(method, norm_ops.METHODS), impl=(impl, IMPLS))
    if not watched():
        impl = resolve(impl, m.device)
        checks.check_finite("m", m)
    value, report = norm_ops.call(m, method, impl, return_info)
    return (value, _info(report, norm_ops.BY_COST, impl)) if return_info else value


@overload
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, method: str = ..., impl: str = ..., return_info: Literal[False] = ...
) -> Tensor: ...
@overload
def trace_sqrt_product(
    a: Tensor, b: Tensor, *, method: str = ..., impl: str = ..., return_info: Literal[True]
) -> tuple[Tensor, TraceSqrtInfo]: ...
def trace_sqrt_product(
    a: Tensor,
    b: Tensor,
    *,
    method: str = "auto",
    impl: str = "auto",
    return_info: bool = False,
    factors: object = None,
) -> Tensor | tuple[Tensor, TraceSqrtInfo]:
    """Compute tr((A B)^{1/2}) of symmetric positive semi-definite A and B, the cross term of the Frechet distance.

    It is the sum of the singular values of F^T H with A = F F^T and B = H H^T (Dowson & Landau, "The Frechet distance
    between multivariate normal distributions", 1982). It is computed in float64 and returned in the operands' dtype,
    since the square root of an eigenvalue at rounding level keeps only half the digits. The entries are taken as exact.
    Eigenvalues below zero count as zero; so do, in a singular matrix, those up to d * 8.9e-16 of the largest. A
    singular covariance that was rounded to float32 therefore causes a relative error of about 1e-4 per missing
    direction: keep covariances in float64, or pass factors to :func:`trace_sqrt_product_from_factors`.

    Methods:

    - ``"cholesky"``: eigenvalues of L^T B L with A = L L^T. A, the operand that has fewer matrices, must be positive
      definite.
    - ``"pivoted"``: the same for singular A, on a CPU, with a factor by pivoted Cholesky that has as many columns as A
      has rank; or a factor of B, if its rank is lower.
    - ``"eigh"``: the same with a factor by eigenvectors. Slow; tolerates eigenvalues of A slightly below zero.
    - ``"svd"``: singular values of the product of two such factors. Slow; for any spectrum.
    - ``"polar"``: the polar factor U of M = F^T H by scaled Newton-Schulz, then <U, M>: matrix products alone. For
      float32 operands the first iterations are float32.
    - ``"jacobi"``: pivoted Cholesky and one-sided Jacobi of each pair, in one kernel for the whole batch. Needs d <= 64
      and the extension.
    - ``"auto"`` on a GPU: ``"jacobi"`` for d <= 64 if the extension is built, else ``"polar"``. On a CPU:
      ``"cholesky"`` if its error bound is below 1e-9 of the value (1e-7 for float32); if A or B is singular,
      ``"pivoted"`` of that one, with the same bound, or ``"eigh"`` if it fails; else ``"svd"``, of Cholesky factors if
      they serve. Pair by pair, but as one batch from 2 pairs on for d <= 128 in plain PyTorch.

    ``python -m bench --suite sqrtm`` times every method that a device can run.

    Args:
        a, b: shape (..., d, d), float32 or float64, same dtype and device. Batch dimensions broadcast; one reference
            against K candidates is factored once.
        method: one of those above.
        impl: ``"extension"`` uses C++/CUDA: on a CPU for all of ``"cholesky"`` up to d = 256, for pivoted Cholesky,
            ``"jacobi"`` and scaling the matrices, on a GPU for ``"polar"`` and ``"jacobi"``. ``"reference"`` is plain
            PyTorch, with the same steps. ``"auto"`` is the first available.
        return_info: return also a :class:`TraceSqrtInfo`.

    Returns:
        The value, of the broadcast batch shape and the operands' dtype, differentiable twice. Gradients of ``a`` and
        ``b`` are symmetric. They are zero in the null space of a singular operand, although the derivative is infinite
        there. On a GPU, gradients of definite operands take only matrix products and triangular solves.

    Raises:
        ValueError: an operand is not square, not finite, clearly asymmetric or indefinite (by 1e-5 of its largest entry
            or eigenvalue), of another dtype, or does not fit the other; ``method="cholesky"`` meets a singular matrix,
            or ``method="pivoted"`` one that is indefinite beyond rounding.

    >>> import torch
    >>> a, b = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))
    >>> value, info = trace_sqrt_product(a, b, return_info=True)
    >>> value, info.method, bool(info.error_bound < 1e-14)
    (tensor(5.), 'cholesky', True)
    """
    if factors is not None or method == "lowrank":
        raise TypeError(
            "trace_sqrt_product takes covariances; for factors of them use trace_sqrt_product_from_factors(f, g), or "
            "trace_sqrt_product_from_factors(f, cov=b) with the factor of one side"
        )
    checks.check_options(method=(method, METHODS), impl=(impl, IMPLS))
    checks.check_square("a", a)
    checks.check_square("b", b)
    checks.check_pair("a", a, "b", b)
    looked_at = not watched()
    if looked_at:
        impl = resolve(impl, a.device)
        if trace_ops.is_small(a, method, impl) and needs_no_dispatch(a, b):
            found = trace_ops.definite(a, b)  # below, the op would try it too, after checks that it does not need
            if found is not None:
                return (found[0], _info(found[1], BY_COST, impl)) if return_info else found[0]
        checks.check_symmetric("a", a, impl)
        checks.check_symmetric("b", b, impl)
    if method == "jacobi" and (impl == "reference" or a.shape[-1] > trace_ops.JACOBI_SIZE):
        limit = trace_ops.JACOBI_SIZE
        raise ValueError(f"method='jacobi' needs the extension and d <= {limit}, got impl={impl!r}, d = {a.shape[-1]}")
    if method == "pivoted" and a.is_cuda:
        raise ValueError(f"method='pivoted' runs on a CPU: it looks at each pivot; got operands on {a.device}")
    value, report = trace_ops.call(a, b, method, impl, return_info)
    if looked_at and bool((values_of(report)[..., METHOD] == FAILED).any()):
        _raise_failure(a, b, method)
    return (value, _info(report, BY_COST, impl)) if return_info else value


@overload
def trace_sqrt_product_from_factors(
    f: Tensor,
    g: Tensor | None = ...,
    *,
    cov: Tensor | None = ...,
    impl: str = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def trace_sqrt_product_from_factors(
    f: Tensor, g: Tensor | None = ..., *, cov: Tensor | None = ..., impl: str = ..., return_info: Literal[True]
) -> tuple[Tensor, TraceSqrtInfo]: ...
def trace_sqrt_product_from_factors(
    f: Tensor,
    g: Tensor | None = None,
    *,
    cov: Tensor | None = None,
    impl: str = "auto",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, TraceSqrtInfo]:
    """Compute tr((A B)^{1/2}) of A = F^T F and B = G^T G, or a covariance B, without forming or factoring A.

    It is the sum of the singular values of F G^T, or of F L with B = L L^T. On a CPU one F of more than d / 2 rows
    against a covariance takes eigenvalues of F B F^T, if their error bound is as small as :func:`trace_sqrt_product`'s.

    Args:
        f: shape (..., n, d), float32 or float64, for example centered features over sqrt(n - 1), or the result of
            :func:`covariance_factor`.
        g: shape (..., m, d), the factor of the other side, of the same dtype and device. Batch dimensions broadcast.
        cov: shape (..., d, d), the covariance of the other side, instead of ``g``.
        impl: as in :func:`trace_sqrt_product`.
        return_info: return also a :class:`TraceSqrtInfo`.

    Returns:
        The value, of the broadcast batch shape and the operands' dtype, differentiable twice.

    Raises:
        ValueError: both or none of ``g`` and ``cov`` are given, an operand is not finite, of another shape or dtype, or
            does not fit the other, or ``cov`` is clearly asymmetric or indefinite.

    >>> import torch
    >>> f, g = torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    >>> trace_sqrt_product_from_factors(f, g)
    tensor(6.)
    >>> trace_sqrt_product_from_factors(f, cov=g.mT @ g)
    tensor(6.)
    """
    checks.check_options(impl=(impl, IMPLS))
    other, name = (cov, "cov") if g is None else (g, "g")
    if other is None or (g is not None and cov is not None):
        raise ValueError(f"one of g and cov must be given, got {'neither' if other is None else 'both'}")
    checks.check_matrix("f", f)
    (checks.check_square if g is None else checks.check_matrix)(name, other)
    checks.check_pair("f", f, name, other)
    if not watched():
        impl = resolve(impl, f.device)
        checks.check_finite("f", f)
        if g is None:
            checks.check_symmetric(name, other, impl)
        else:
            checks.check_finite(name, other)
    value, report = (against_covariance if g is None else against_factor)(f, other, impl, return_info)
    value = value.to(f.dtype)
    return (value, _info(report, ("lowrank",) * len(norm_ops.BY_COST), impl)) if return_info else value


def _raise_failure(a: Tensor, b: Tensor, method: str) -> None:
    """Raise the reason why a pair has no value. It is sought only after a failure, so it costs nothing otherwise."""
    checks.check_eigenvalues("a", a)
    checks.check_eigenvalues("b", b)
    if method == "cholesky":
        factored = "b" if b.shape[:-2].numel() < a.shape[:-2].numel() else "a"
        reason = f"{factored} must be positive definite for method='cholesky', and is singular: use 'auto' or 'eigh'"
    elif method == "pivoted":
        reason = "a and b must be positive semi-definite up to rounding for method='pivoted': use 'auto' or 'eigh'"
    else:
        reason = "a and b must be positive semi-definite"
    raise ValueError(reason)


def _info(report: Tensor, names: Sequence[str], implementation: str) -> TraceSqrtInfo:
    if is_mapped(report):
        raise NotImplementedError("return_info=True is not available under torch.vmap: call it on the batch itself")
    codes = report[..., METHOD].reshape(-1).long().tolist()
    methods = tuple(names[code] for code in codes)
    method = names[max(codes, default=0)]
    iterations = report[..., ITERATIONS].long()
    return TraceSqrtInfo(method, methods, report[..., LOWER], report[..., UPPER], iterations, implementation)
