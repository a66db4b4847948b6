"""PSIS k-hat of the ratios of sequences: whether few of them weigh everything. Plain numpy.

The largest M = min(N / 5, 3 √N) of the N ratios e^S, less the next one, follow a generalized Pareto law where N is
large; k-hat is its shape. Below 1/2 ratios have a variance, below 1 a mean; estimates by importance sampling from N
of them are to be relied on up to min(1 - 1 / log10 N, 0.7). The estimator, with a weak prior (10 values of 0.5): Zhang
and Stephens, "A new and efficient estimation method for the generalized Pareto distribution", Technometrics 51 (2009);
Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 25 (2024).

S is kept as counts by sign on a log scale, which add over batches and ranks; those of a bin are spread over it evenly.
"""

from __future__ import annotations

import math

import numpy as np

from .sums import LOG_RATIO_BINS

__all__ = ["add_log_ratios", "khat", "pareto_shape"]

_LEAST, _PER_DECADE = -2, 48  # of the bins of |S|

_EDGES = np.concatenate([[0.0], 10.0 ** (_LEAST + np.arange(LOG_RATIO_BINS) / _PER_DECADE)])  # of |S|

# by descending S
_LOW = np.concatenate([_EDGES[:-1][::-1], -_EDGES[1:]])
_HIGH = np.concatenate([_EDGES[1:][::-1], -_EDGES[:-1]])

_FEWEST = 25  # sequences: five are the fewest a tail is fitted to

_PRIOR, _PRIOR_K = 10.0, 0.5  # so many values, of that k

_TINY = 1e-300


def add_log_ratios(part: np.ndarray, log_ratios: np.ndarray) -> None:
    """Count sequences. ``part``: (2, bins), row 0 of S < 0; ``log_ratios``: (B,) S of those that were compared."""
    bins = (np.log10(np.maximum(np.abs(log_ratios), _TINY)) - _LEAST) * _PER_DECADE + 1.0
    bins = np.minimum(np.maximum(bins, 0.0), LOG_RATIO_BINS - 1).astype(np.intp)
    bins += LOG_RATIO_BINS * (log_ratios >= 0)
    part += np.bincount(bins, minlength=2 * LOG_RATIO_BINS).reshape(part.shape)


def khat(part: np.ndarray) -> dict[str, float | None]:
    """``seq/khat`` and ``seq/khat_limit``, of 25 sequences or more."""
    counts = np.concatenate([part[1][::-1], part[0]])
    n = float(counts.sum())
    if n < _FEWEST:
        return {}
    size = math.ceil(min(n / 5.0, 3.0 * math.sqrt(n)))
    s = _largest(counts, size + 1)
    excess = np.exp(s[:-1] - s[0]) - math.exp(s[-1] - s[0])  # largest first
    return {
        "seq/khat": pareto_shape(np.maximum(excess, _TINY)[::-1]),
        "seq/khat_limit": min(1.0 - 1.0 / math.log10(n), 0.7),
    }


def _largest(counts: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` largest S, descending."""
    filled = counts.nonzero()[0]
    filled = filled[: int(counts[filled].cumsum().searchsorted(size)) + 1]
    many = counts[filled].astype(np.intp)
    places = np.arange(many.sum()) - np.repeat(many.cumsum() - many, many)  # of each within its bin
    low, high = _LOW[filled].repeat(many), _HIGH[filled].repeat(many)
    return (high - (high - low) * (places + 0.5) / many.repeat(many))[:size]


def pareto_shape(x: np.ndarray) -> float:
    """k of excesses x > 0, ascending: a mean over a profile likelihood, drawn towards the prior's."""
    n = len(x)
    grid = 30 + int(math.sqrt(n))
    b = (1.0 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3.0 * x[int(n / 4 + 0.5) - 1]) + 1.0 / x[-1]
    k = np.log1p(-b[:, None] * x).mean(1)
    likelihood = n * (np.log(-b / k) - k - 1.0)
    weights = np.exp(likelihood - likelihood.max())
    b_mean = float(weights @ b / weights.sum())
    return (n * float(np.log1p(-b_mean * x).mean()) + _PRIOR * _PRIOR_K) / (n + _PRIOR)
