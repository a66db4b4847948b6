"""Standard errors of means over tokens, whose independent draws are sequences; and how many rows are one draw.

For sums x_c of the clusters c of equal rows (the same completion of the same prompt), with n_c tokens, n in all, and
θ = Σ x_c / n:

    s² = Σ (x_c - θ n_c)² / n² x G / (G - 1),  G = n² / Σ n_c² the effective number of clusters

Rows are found equal within a batch of one rank. Over batches and ranks the Poisson resamples tell, in which equal rows
are drawn together: Σ n_c² by their variance, over Σ n_i² of rows, is how many rows a cluster has on average. Where
that is five standard errors above what was found within batches and chance collisions make of it, it takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .sums import SECOND_MOMENTS

__all__ = ["evidence_inputs", "second_moments"]

_STATS = ("kl_k1", "logp_abs_diff/mean", "kl_k3")

_SUMS = ("delta", "abs_delta", "k3")

_POOL = 4096  # as that of the resamples

_MOST = 1e100  # what is squared still fits a double


def second_moments(x: np.ndarray, draws: np.ndarray) -> tuple[list[float], float]:
    """``SECOND_MOMENTS`` of (4, B) Σ Δ, Σ |Δ|, Σ k3 and tokens of sequences, and the largest number of equal ones.

    ``draws``: (B,) numbers equal ones alike, from 0 on.
    """
    x = np.minimum(np.maximum(x, -_MOST), _MOST)
    whole = np.array([np.bincount(draws, one) for one in x])
    rows = np.bincount(draws, x[3] > 0)
    return [*(whole @ whole.T).ravel().tolist(), float(x[3] @ x[3])], float(rows.max())


def evidence_inputs(s: Mapping[str, float], copies: float, bootstrap: np.ndarray) -> dict[str, float | None]:
    """What ``trl_parity.judging.evidence`` reads of a window beside its statistics; there is a token.

    ``s``: sums by name. ``bootstrap``: (R, 3), as ``MismatchSums`` has them.
    """
    n = s["tokens"]
    if s["clipped_tokens"] != n:  # of a window that an older version began
        return {}
    squares = np.array([s[name] for name in SECOND_MOMENTS[:-1]]).reshape(4, 4)
    clustered, by_row = squares[3, 3], s[SECOND_MOMENTS[-1]]
    found: dict[str, float | None] = {
        "ratio/clipped": 1.0 + s["clipped"] / n,
        "ratio/clipped_square": s["clipped_square"] / n,
    }
    off = bootstrap[:, 2] - n
    sure = 1.0 + 5.0 * math.sqrt(2.0 / len(off))
    told = float(off @ off) / len(off) / by_row
    spread = clustered
    if told * by_row > sure * clustered * (1.0 + s["sequences"] / _POOL):
        spread, copies = told * by_row, max(copies, told)
    found["copies"] = copies
    effective = n * n / spread
    if effective <= 1.0 + 1e-9:  # one draw has no spread
        return found
    found["effective_sequences"] = effective
    enlarged = spread / clustered * effective / (effective - 1.0)
    for i, (stat, name) in enumerate(zip(_STATS, _SUMS, strict=True)):
        mean = s[name] / n
        variance = squares[i, i] - 2.0 * mean * squares[i, 3] + mean * mean * clustered
        found[f"se/{stat}"] = math.sqrt(max(0.0, variance) * enlarged) / n
    return found
