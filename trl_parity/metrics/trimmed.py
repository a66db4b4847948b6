"""``trimmed/*``: statistics that no single token, of any size, can move, but a thousandth of all tokens can.

The token of largest |Δ| is left out. Of the others among the ``max(1, n // TRIM)`` tokens of largest |Δ|, each counts
in sums with at most ``CAP``: a few of any size can't move a large window, and as many as these can't hide. Rates and
quantiles, in which a token can't count for more than one, are those without these tokens.
"""

from __future__ import annotations

import math

import numpy as np

from .histogram import CENTERS

__all__ = ["CAP", "EXTREME", "K3", "TRIM", "trimmed"]

TRIM = 1000  # one token of so many, the worst ones, at least one, is no more than CAP in trimmed/*

CAP = 8.0  # of |Δ|, of k3 and of w: a token the trainer gives e^-8 of what the engine does still counts in full

EXTREME = int(np.searchsorted(CENTERS, 4.0))  # the first bin of those "several nats" off: from 4.07 nats on

# (2, bins), as the histogram: what a token in the middle of its bin adds
_DELTA = np.stack([-CENTERS, CENTERS])

_CLAMPED = _DELTA.clip(max=300.0)  # as in the exact sums

_ABS, _W, K3 = np.abs(_DELTA), np.exp(_CLAMPED), np.expm1(_CLAMPED) - _DELTA

_TERMS = np.stack([_ABS, K3, _W, _W * _W]).reshape(4, -1)

_CAPPED = _TERMS.clip(max=np.array([[CAP], [CAP], [CAP], [CAP * CAP]]))


def trimmed(histogram: np.ndarray, cumulative: np.ndarray, s: dict[str, float]) -> dict[str, float | None]:
    """All of them, from the histogram of Δ, its counts of both signs cumulated, and the sums by name.

    From a histogram: off by a bin's width (3.7 %) at most per token, and far less in the mean. Rates are exact,
    without the left-out tokens (or one of them).
    """
    values: dict[str, float | None] = {}
    n = int(s["tokens"])
    left = n - max(1, n // TRIM)
    if s["compared"] > 1:
        values["trimmed/nonfinite_rate"] = max(0.0, s["compared"] - n - 1) / s["compared"]
    if s["last_tokens"]:
        values["trimmed/last_token/disagreement"] = max(0.0, s["last_apart"] - 1) / s["last_tokens"]
    if left <= 0:
        return values
    body = _smallest(histogram, cumulative, left)
    rest = _smallest(histogram, cumulative, n - 1) - body
    abs_delta, k3, sum_w, sum_w2 = (_TERMS @ body.ravel() + _CAPPED @ rest.ravel()).tolist()
    extreme = n - float(cumulative[EXTREME - 1])
    return values | {
        "trimmed/kl_k3": k3 / (n - 1),
        "trimmed/logp_abs_diff/mean": abs_delta / (n - 1),
        "trimmed/logp_abs_diff/p99": float(CENTERS[cumulative.searchsorted(math.ceil(0.99 * left) - 1e-6)]),
        "trimmed/ratio/out_of_band": max(0.0, s["out_of_band"] - (n - left)) / left,
        "trimmed/ratio/extreme": max(0.0, extreme - 1) / n,
        "trimmed/ess": sum_w**2 / ((n - 1) * sum_w2) if sum_w2 > 0 else 0.0,
        "trimmed/confident_disagreement": max(0.0, s["confident"] - 1) / n,
    }


def _smallest(histogram: np.ndarray, cumulative: np.ndarray, count: int) -> np.ndarray:
    """The histogram of the ``count`` tokens of smallest |Δ|."""
    cut = int(cumulative.searchsorted(count))
    counts = histogram.copy()
    inside = float(counts[0, cut] + counts[1, cut])
    counts[:, cut] *= (count - float(cumulative[cut]) + inside) / inside
    counts[:, cut + 1 :] = 0.0
    return counts
