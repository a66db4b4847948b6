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
from typing import TYPE_CHECKING

import numpy as np

from .sums import WEIGHT_BINS, MismatchSums

if TYPE_CHECKING:
    import torch

__all__ = ["add_correction", "correction_scalars"]

_LEAST, _PER_DECADE = -4, 12  # of the histogram, a bin about 1e-4, ..., 1, ... 10: bin 0 holds w below

_LARGEST = 1e6  # a weight, where the correction has no upper bound


def add_correction(out: MismatchSums, weights: torch.Tensor, mask: torch.Tensor) -> None:
    """Add the weights of a batch's sequences, in place. ``weights``: (B, 1) or (B, C); ``mask``: (B, C) bool."""
    import torch

    lengths = mask.sum(-1).double()
    has_tokens = (lengths > 0).double()
    # a weight that is no number teaches nothing either
    w = weights.to(mask.device).double().nan_to_num(nan=0.0, posinf=_LARGEST).clamp(0.0, _LARGEST)
    terms = torch.stack([(w == 0).double(), w.clamp(max=1.0), w])
    if w.shape[1] == 1:
        terms = terms[..., 0] * has_tokens
    else:
        terms = (terms * mask).sum(-1) / lengths.clamp(min=1.0)
    mean = terms[2]
    long = has_tokens * (lengths * has_tokens.sum() > lengths.sum())
    sums = torch.cat([torch.stack([has_tokens, *terms, mean * mean, long]), terms[:2] * long]).sum(-1)
    out.span(
        "corrected", "corrected_zeroed", "corrected_kept", "corrected_w", "corrected_w2",
        "long_corrected", "long_zeroed", "long_kept",
    ).add_(sums)  # fmt: skip
    bins = mean.log10().mul(_PER_DECADE).add(1.5 - _LEAST * _PER_DECADE).clamp(0, WEIGHT_BINS - 1).long()
    out.correction_weights.scatter_add_(0, bins, has_tokens)


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
