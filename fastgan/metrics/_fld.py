"""Feature Likelihood Divergence (FLD): how likely held-out images are under Gaussians around the generated ones.

Jiralerspong et al., "Feature Likelihood Divergence: Evaluating the Generalization of Generative Models Using Samples",
2023; formerly the Feature Likelihood Score, FLS. Generated vectors become the centers of a mixture of isotropic
Gaussians, whose variances are fitted to the training vectors by Adam. A copy of a training vector gets a variance near
0, and gives no likelihood to test vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastgan._checks import InputError, check_count, check_features, check_seed
from fastgan.metrics.moments import as_features
from fastgan.metrics.prdc import distances

if TYPE_CHECKING:
    import numpy.typing as npt

# the constants of the authors' code
_GEN_SIZE = 10_000
_BATCH, _EPOCHS, _LEARNING_RATE = 10_000, 50, 0.5
_STOP_BELOW = 5e-4  # the loss of the last five epochs has to stay within this
_BACKGROUND = 0.9**2  # of the squared distance to the training set's mean, for the component that is fitted beside
_MOST_LOG = 40.0

_BLOCK = 2048
_MOST_KEPT = 1 << 29  # distances, 2 GiB in float32; more are computed again in each epoch
_SETS = ("test", "train", "gap")


def fld(
    train: Tensor | npt.ArrayLike,
    test: Tensor | npt.ArrayLike,
    fake: Tensor | npt.ArrayLike,
    *,
    evaluate: str = "test",
    gen_size: int = _GEN_SIZE,
    seed: int = 0,
) -> float:
    """Compute the FLD: 100 times the negative log-likelihood per feature, less that of a split of ``train``.

    About 0 for a perfect generator, higher is worse. The value is that of the authors' code
    (github.com/marcojira/fld, commit ffbbf20) after ``numpy.random.seed(seed)``: the seed draws at most ``gen_size``
    fake vectors, the halves of ``train`` for the baseline, and the order of the training vectors in Adam's batches.
    Published values use 10,000 generated images and DINOv2 features. Distances are exact here; the authors' code
    rounds them to float32, which shows in ``"train"`` and ``"gap"`` of exact copies.

    Args:
        train, test, fake: features (l, dim), (n, dim) and (m, dim) of the images trained on, of held-out ones, and of
            generated ones.
        evaluate: the vectors whose likelihood counts: ``"test"``, ``"train"``, or ``"gap"``, 100 times the difference
            of train and test, which is below 0 for a generator that overfits.
        gen_size: fake vectors used, at most.
        seed: of the random draws.

    Raises:
        InputError: the features are not finite sets of at least 2 vectors (``train``: 4) and one dim, or ``test`` is
            constant in a feature.
        ValueError: ``evaluate``, ``gen_size`` or ``seed`` is out of its range.

    Example:
        >>> train, test, copies = torch.randn(200, 4), torch.randn(100, 4), torch.randn(100, 4)
        >>> fld(train, test, train[:100]) > fld(train, test, copies)  # copies of training vectors are found out
        True
    """
    if evaluate not in _SETS:
        raise ValueError(f"evaluate must be one of {', '.join(_SETS)}, got {evaluate!r}")
    check_count("gen_size", gen_size, 2)
    check_seed("seed", seed)
    sets = {"train": as_features("train", train), "test": as_features("test", test), "fake": as_features("fake", fake)}
    check_features(**sets, least=2)
    check_features(train=sets["train"], least=4)
    dtype = torch.float32
    for rows in sets.values():
        dtype = torch.promote_types(dtype, rows.dtype)
    x, y, z = (rows.to(dtype) for rows in sets.values())
    random = np.random.RandomState(seed)
    if len(z) > gen_size:
        z = z[_drawn(random, len(z), gen_size)]
    mean, std = y.mean(dim=0), y.std(dim=0)
    if not (std > 0).all():
        constant = int(torch.nonzero(std <= 0)[0])
        raise InputError(f"test must vary in every feature for an FLD, feature {constant} is constant")
    x, y, z = ((rows - mean) / std for rows in (x, y, z))
    log_variances = _fitted(z, x[_drawn(random, len(x))])
    if evaluate == "gap":
        return 100 * (_nll(x, z, log_variances) - _nll(y, z, log_variances))
    nll = _nll(y if evaluate == "test" else x, z, log_variances)
    shuffled = x[_drawn(random, len(x))]
    size = min(len(z), len(x) // 2)
    centers, others = shuffled[:size], shuffled[size:]
    baseline = _nll(y, centers, _fitted(centers, others[_drawn(random, len(others))]))
    return 100 * (nll - baseline)


def _drawn(random: np.random.RandomState, n: int, size: int | None = None) -> Tensor:
    """Return ``size`` of ``n`` indices in random order, by default all, as the authors' code draws them."""
    return torch.from_numpy(random.choice(n, n if size is None else size, replace=False))


def _fitted(centers: Tensor, rows: Tensor) -> Tensor:
    """Return the logarithm of each center's variance (m,) that makes ``rows`` (n, dim) likely.

    The gradient is written out, so that a block of the n x m likelihoods is all that it needs.
    """
    squares = _squared_distances(rows, centers)
    dim, log_m = rows.shape[1], math.log(len(centers))
    to_mean = _BACKGROUND * (rows - rows.mean(dim=0)).square().sum(dim=1)
    batches = [(start, min(start + _BATCH, len(rows))) for start in range(0, len(rows), _BATCH)]
    nearest = torch.stack([block.amin(dim=0) for batch in batches for _, block in squares(*batch)]).amin(dim=0)
    log_variances = ((nearest + 1e-3) / dim).log()
    background = log_variances.new_zeros(())
    optimizer = torch.optim.Adam([log_variances, background], lr=_LEARNING_RATE)
    losses: list[float] = []
    for _ in range(_EPOCHS):
        of_batches = []
        for start, stop in batches:
            loss, slope, background_slope = 0.0, torch.zeros_like(log_variances), torch.zeros_like(background)
            inverse = (-log_variances).exp()
            for here, block in squares(start, stop):
                terms = _log_densities(block, log_variances, dim).sub_(log_m)
                beside = _log_densities(to_mean[here], background, dim)
                total = torch.logaddexp(terms.logsumexp(dim=1), beside)
                loss -= total.sum().item()
                weights = terms.sub_(total[:, None]).exp_()
                slope += dim / 2 * weights.sum(dim=0) - 0.5 * inverse * (weights * block).sum(dim=0)
                weight = (beside - total).exp()
                background_slope += (weight * (dim / 2 - 0.5 * to_mean[here] * (-background).exp())).sum()
            scale = 1 / ((stop - start) * dim)
            log_variances.grad, background.grad = slope * scale, background_slope * scale
            optimizer.step()
            log_variances.clamp_(-_MOST_LOG, _MOST_LOG)
            of_batches.append(loss * scale)
        losses.append(sum(of_batches) / len(of_batches))
        if len(losses) > 6 and max(abs(losses[-1] - one) for one in losses[-5:]) < _STOP_BELOW:
            break
    return log_variances


def _nll(rows: Tensor, centers: Tensor, log_variances: Tensor) -> float:
    """Return the mean negative log-likelihood of ``rows`` per feature, without the background."""
    dim, total = rows.shape[1], 0.0
    for block in rows.split(_BLOCK):
        terms = _log_densities(distances(block, centers).square(), log_variances, dim)
        total += (terms.logsumexp(dim=1) - math.log(len(centers))).sum().item()
    return -total / (len(rows) * dim)


def _log_densities(squares: Tensor, log_variances: Tensor, dim: int) -> Tensor:
    constant = dim / 2 * (log_variances + math.log(2 * math.pi))
    return (squares * (-0.5 * (-log_variances).exp())).sub_(constant)


def _squared_distances(rows: Tensor, centers: Tensor) -> Callable[[int, int], Iterator[tuple[slice, Tensor]]]:
    """Return a function that yields the blocks of squared distances (block, m) from row ``start`` to ``stop``."""
    kept: dict[int, Tensor] = {}
    keep = len(rows) * len(centers) <= _MOST_KEPT

    def blocks(start: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        for first in range(start, stop, _BLOCK):
            here = slice(first, min(first + _BLOCK, stop))
            block = kept.get(first)
            if block is None:
                block = distances(rows[here], centers).square()
                if keep:
                    kept[first] = block
            yield here, block

    return blocks
