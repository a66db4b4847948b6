"""What TRL's correction of the mismatch leaves of a batch: statistics of the weights it multiplies the loss by.

``vllm_importance_sampling_mode`` gives each sequence one weight w = e^S, or each token w = e^Δ, and cuts weights
beyond its bounds (``*_truncate``) or makes them 0 (``*_mask``; TRL's default is ``sequence_mask`` with w <= 3). Here a
sequence counts once: with its weight, or with the mean over its tokens of theirs, of min(w, 1) and of w = 0.

Where both sides are honest, the mean of w before the bounds is 1: by Markov's inequality at most a third of all
sequences can have w > 3, and the mean of min(w, 1) is 1 minus the total variation distance of the two laws of
sequences, which falls with length: 2 Φ(-s/2) for S ~ N(-s²/2, s²), s² = length x variance of Δ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .sums import WEIGHT_BINS

if TYPE_CHECKING:
    import torch

__all__ = ["CORRECTION_ROWS", "add_correction", "correction_rows", "correction_scalars"]

# of each sequence: the mean of w; where tokens have weights of their own, the share of w = 0 and the mean of min(w, 1)
CORRECTION_ROWS = ("weight", "zeroed", "kept")

_LEAST, _PER_DECADE = -4, 12  # of the histogram, a bin about 1e-4, ..., 1, ... 10: bin 0 holds w below

_EDGES = 10.0 ** (_LEAST + (np.arange(1, WEIGHT_BINS) - 1.5) / _PER_DECADE)

_LARGEST = 1e6  # a weight, where the correction has no upper bound


def correction_rows(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The ``CORRECTION_ROWS`` there are. ``weights``: (B, 1) or (B, C); ``mask``: (B, C) bool."""
    import torch

    if weights.shape[1] == 1:
        return weights.t()
    w = weights.double().nan_to_num(nan=0.0).clamp(0.0, _LARGEST)
    return (torch.stack([w, (w == 0).double(), w.clamp(max=1.0)]) * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def add_correction(histogram: np.ndarray, at: Mapping[str, np.ndarray]) -> tuple[float, ...]:
    """Count the weights of a batch's sequences, rows by name; ``corrected`` and the sums behind it are returned."""
    if "weight" not in at:
        return (0.0,) * 8
    lengths, w = at["compared"], at["weight"]
    w = np.where(w > 0, np.minimum(w, _LARGEST), 0.0)  # a weight that is no number teaches nothing either
    zeroed, kept = at.get("zeroed", w == 0), at.get("kept", np.minimum(w, 1.0))
    has_tokens = np.minimum(lengths, 1.0)
    count = has_tokens.sum()
    histogram += np.bincount(_EDGES.searchsorted(w, side="right"), has_tokens, WEIGHT_BINS)
    long = (lengths * count > lengths.sum()).astype(np.float64)
    weighted = w * has_tokens
    return (
        count, zeroed @ has_tokens, kept @ has_tokens, weighted.sum(), weighted @ weighted,
        long.sum(), zeroed @ long, kept @ long,
    )  # fmt: skip


def correction_scalars(s: dict[str, float], weights: np.ndarray) -> dict[str, float | None]:
    """``correction/*`` and their ``trimmed/*``, which one sequence can't move: without its worst one."""
    if not s["corrected"]:
        return {}
    middle = int(weights.cumsum().searchsorted(math.ceil(s["corrected"] / 2)))
    found: dict[str, float | None] = {
        "correction/weight_median": 0.0 if middle == 0 else 10.0 ** (_LEAST + (middle - 1) / _PER_DECADE),
        "correction/ess": s["corrected_w"] ** 2 / (s["corrected"] * s["corrected_w2"]) if s["corrected_w2"] else 0.0,
    }
    groups = {
        "correction": ("corrected", "corrected_zeroed", "corrected_kept"),
        "correction/long": ("long_corrected", "long_zeroed", "long_kept"),
    }
    for name, parts in groups.items():
        count, zeroed, kept = (s[part] for part in parts)
        if not count:
            continue
        found |= {
            f"{name}/zeroed": zeroed / count,
            f"{name}/lost": max(0.0, 1.0 - kept / count),
            f"trimmed/{name}/zeroed": max(0.0, zeroed - 1.0) / count,
            f"trimmed/{name}/lost": max(0.0, 1.0 - kept / (count - 1.0)) if count > 1 else 0.0,
        }
    return found
