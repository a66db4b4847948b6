"""99 % intervals of means over tokens whose independent draws are sequences: few, of unequal length, of heavy tails.

For sums x of sequences with n_i tokens, n in all, θ = Σ x / n and e = x - θ n_i:

    Student's t     θ ± t s, s² = Σ e² / n² x G / (G - 1), G = n² / Σ n_i² the effective number of sequences; t with
                    G - 4 degrees of freedom, at least 2: heavy tails cost the variance some beside the mean's one.
                    Never more than G - 1: two draws that happen to agree say little.
    skewness        the end on the side of the long tail moves outwards by 3 |γ| (t² / 3 + 1 / 6) s, where
                    γ = Σ e³ / (Σ e²)^1.5: Johnson's modified t (1978), with three times the skewness of the sample, in
                    which a heavy tail is seldom seen in full. The other end stays where it is.

Σ e² and Σ n_i² are mean squares over Poisson resamples, in which equal sequences (the same completion of the same
prompt) are drawn together: eight copies, in whatever batch or rank, are one piece of evidence. What these intervals
cover: ``benchmarks/coverage.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["MIN_BOOTSTRAP_SEQUENCES", "intervals"]

Moments = Sequence[Sequence[float]]

# An interval from a handful of sequences says nothing: below this many, honesty has no interval and no gap.
MIN_BOOTSTRAP_SEQUENCES = 8

_SKEW = 3.0  # times the sample's skewness

_LOST = 4  # degrees of freedom, and the fewest that are left
_LEAST = 2.0


def intervals(s: Mapping[str, float], bootstrap: np.ndarray, moments: Moments) -> dict[str, float | None]:
    """``honesty_*``, ``entropy/drift_*`` and ``se/entropy/drift``, from enough sequences.

    ``s``: sums by name. ``bootstrap``: (R, 3), ``moments``: (3, 3), as ``MismatchSums`` has them.
    """
    n = s["tokens"]
    if s["sequences"] < MIN_BOOTSTRAP_SEQUENCES:
        return {}
    t, effective = _student(bootstrap[:, 2], n)
    spread = math.sqrt(effective / max(effective - 1.0, 0.5))
    found: dict[str, float | None] = {}
    means = {"honesty": (s["w"] / n, 1.0)}
    if s["entropy_tokens"] == n:
        means["entropy/drift"] = ((s["law_entropy"] + s["rollout_logprob"]) / n, 0.0)
    for i, (name, (mean, expected)) in enumerate(means.items()):
        e = bootstrap[:, i] - mean * bootstrap[:, 2]
        deviation = math.sqrt(float(e @ e) / len(e))
        error, skew = deviation * spread / n, _skewness(deviation, mean - expected, i, moments)
        room = t * t / 3.0 + 1.0 / 6.0
        low, high = mean - error * (t + room * max(0.0, -skew)), mean + error * (t + room * max(0.0, skew))
        gap = max(0.0, low - expected, expected - high)
        found |= {f"{name}_low": low, f"{name}_high": high, f"{name}_gap": gap}
        if name == "entropy/drift":
            found["se/entropy/drift"] = error
    return found


def _student(sizes: np.ndarray, n: float) -> tuple[float, float]:
    """t of 99 %, and G, from resamples of Σ tokens: (R,)."""
    from scipy.special import stdtrit

    samples, off = len(sizes), sizes - n
    effective = n * n * samples / max(float(off @ off), 1e-300)
    known = min(max(effective - _LOST, _LEAST), max(effective - 1.0, 0.5))
    return float(stdtrit(1.0 / (1.0 / known + 1.0 / samples), 0.995)), effective


def _skewness(deviation: float, mean: float, i: int, moments: Moments) -> float:
    """Σ e³ / (Σ e²)^1.5, enlarged by ``_SKEW``. ``deviation``: the root of Σ e²."""
    if deviation == 0:
        return 0.0
    cubes = moments[i][i] - 3 * mean * (moments[i][2] - mean * moments[2][i]) - mean * mean * mean * moments[2][2]
    skew = cubes / deviation / deviation / deviation
    if not math.isfinite(skew):  # one sequence, hundreds of nats off, is all there is
        skew = math.copysign(1.0, moments[i][i])
    return _SKEW * min(max(skew, -1.0), 1.0)
