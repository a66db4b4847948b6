"""In how few of a window's sequences, and of its prompts, the drift is. Plain numpy.

Of K, the Σ k3 of a sequence, and of all sequences of a prompt in a batch of one rank, counts and sums are kept by
bins of a log scale: they add over batches and ranks, in constant memory. From the largest K down, as many are counted
as carry 90 % of all; within the last bin, in which K differs by half at most, all weigh alike.

Few of them carry most of an evenly spread drift, too, where few tokens do: k3 has heavy tails. So K² is held against
what it would be, had the same tokens been dealt out to the sequences at random (n tokens in all, n_i in sequence i;
the exact mean over all permutations):

    dispersion = Σ K_i² / (q + (Σ n_i² - n) / (n (n - 1)) (t² - q)),    t = Σ k3,  q = Σ k3² over tokens
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .sums import CARRIED_BINS
from .trimmed import K3

__all__ = ["add_carried", "concentration"]

_LEAST, _PER_DECADE = -8, 6  # of the bins of K

_TINY = 1e-300

_K3_SQUARE = K3 * K3

_SHARE = 0.9  # of Σ k3


def add_carried(part: np.ndarray, k3: np.ndarray, prompts: np.ndarray | None) -> None:
    """Count a batch's sequences that were compared. ``part``: (2, 2, bins) sequences and prompts, counts and sums.

    ``k3``: (B,) sums of sequences. ``prompts``: (B,) numbers theirs from 0 on; None: not known.
    """
    x = k3 if prompts is None else np.concatenate([k3, np.bincount(prompts, k3)])
    bins = (np.log10(np.maximum(x, _TINY)) - _LEAST) * _PER_DECADE + 1.0
    bins = np.minimum(np.maximum(bins, 0.0), CARRIED_BINS - 1).astype(np.intp)
    bins[len(k3) :] += 2 * CARRIED_BINS
    places, added = np.concatenate([bins, bins + CARRIED_BINS]), np.concatenate([np.ones(len(x)), x])
    part += np.bincount(places, added, part.size).reshape(part.shape)


def concentration(s: Mapping[str, float], part: np.ndarray, histogram: np.ndarray) -> dict[str, float | None]:
    """``concentration/*``. ``s``: sums by name. ``part`` as above; ``histogram``: (2, bins) counts of Δ."""
    found: dict[str, float | None] = {}
    if s["clipped_tokens"] != s["tokens"]:  # of a window that an older version began
        return found
    for name, (counts, sums) in zip(("sequences", "prompts"), part, strict=True):
        if counts.sum() > 1 and sums.sum() > 0:
            found[f"concentration/{name}"] = _carriers(counts[::-1], sums[::-1])
    n, t = s["tokens"], s["k3"]
    if "concentration/sequences" in found and n > 1:
        q = min(float(np.vdot(_K3_SQUARE, histogram)), t * t)
        even = q + (s["row_tokens_square"] - n) / (n * (n - 1.0)) * (t * t - q)
        if even > 0:  # not where each sequence is a token, and each |Δ| too small for the histogram
            found["concentration/dispersion"] = s["row_k3_square"] / even
    return found


def _carriers(counts: np.ndarray, sums: np.ndarray) -> float:
    """The share of all that carries ``_SHARE`` of the sum, the largest first."""
    wanted = _SHARE * float(sums.sum())
    cumulative = sums.cumsum()
    last = min(int(cumulative.searchsorted(wanted)), len(sums) - 1)
    before = float(cumulative[last] - sums[last])
    rest = float(counts[last]) * (wanted - before) / float(sums[last])
    return min(1.0, (float(counts[:last].sum()) + rest) / float(counts.sum()))
