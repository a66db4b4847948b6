"""What the histogram of Δ tells: quantiles, and a histogram on a linear scale for trackers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .sums import BINS, DECADES, PER_DECADE, MismatchSums

__all__ = ["CENTERS", "log_ratio_histogram", "monotone", "quantiles", "quantiles_abs"]

# |Δ| at the middle of each bin on the log scale, 0 for the first
CENTERS = np.where(np.arange(BINS) == 0, 0.0, 10.0 ** (DECADES[0] + (np.arange(BINS) - 0.5) / PER_DECADE))

_SIGNED_CENTERS = np.concatenate([-CENTERS[::-1], CENTERS])  # Δ over all signed bins in ascending order


def monotone(histogram: np.ndarray) -> np.ndarray:
    """Counts (2, bins) of which none is negative, with the same totals by sign; itself where none is.

    A sample takes tokens from the bins of their own-head numbers to those of their fp32 ones, more than are there: the
    cumulated counts are made the nearest (least squares) that never fall. A token alone in the tail stays one.
    """
    if (histogram >= 0).all():
        return histogram
    from scipy.optimize import isotonic_regression

    fixed = np.empty_like(histogram)
    for row, counts in zip(fixed, histogram, strict=True):
        total = max(0.0, float(counts.sum()))
        rising = isotonic_regression(counts.cumsum().clip(0.0, total)).x
        rising[-1] = total
        row[:] = np.diff(rising, prepend=0.0)
    return fixed * (float(histogram.sum()) / max(float(fixed.sum()), 1e-300))


def quantiles_abs(cumulative: np.ndarray, qs: Sequence[float], maxima: dict[str, float]) -> list[float]:
    """Of |Δ|, from the cumulated counts of both signs."""
    return _pick(cumulative, CENTERS, qs, 0.0, maxima["abs_delta"])


def quantiles(histogram: np.ndarray, qs: Sequence[float], maxima: dict[str, float]) -> list[float]:
    """Of Δ, off by half a bin at most."""
    counts = np.concatenate([histogram[0][::-1], histogram[1]])
    return _pick(counts.cumsum(), _SIGNED_CENTERS, qs, -maxima["neg_delta"], maxima["delta"])


def _pick(cumulative: np.ndarray, values: np.ndarray, qs: Sequence[float], low: float, high: float) -> list[float]:
    """The values at ranks ceil(q n), kept inside the observed range."""
    n = float(cumulative[-1])
    ranks = [max(1.0, math.ceil(q * n)) for q in qs]
    return [min(max(x, low), high) for x in values[cumulative.searchsorted(ranks)].tolist()]


def log_ratio_histogram(sums: MismatchSums, bins: int = 64) -> tuple[np.ndarray, np.ndarray] | None:
    """Counts and edges of Δ on a linear scale, over the range that holds all but the outermost 0.1 % at each end.

    Rebinned from the log histogram for trackers; tails are counted in the end bins. ``None`` without tokens.
    """
    sums = sums.cpu()
    histogram = monotone(sums.histogram.numpy())
    if histogram.sum() == 0:
        return None
    low, high = quantiles(histogram, (0.001, 0.999), sums.peaks())
    if high - low < 1e-8:
        low, high = low - 1e-8, high + 1e-8
    values = _SIGNED_CENTERS.clip(low, high)
    counts = np.concatenate([histogram[0][::-1], histogram[1]])
    return np.histogram(values, bins=bins, range=(low, high), weights=counts)
