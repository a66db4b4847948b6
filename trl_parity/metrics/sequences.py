"""What the sequences of a batch say, from their numbers on the host. Plain numpy: of small vectors, many operations.

The device sums over tokens and hands ``ROWS`` over when the window's sums are read: kernels on vectors this short
would cost more than those on all tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .concentration import add_carried
from .correction import CORRECTION_ROWS, add_correction
from .equal_rows import equal_pairs
from .pareto import add_log_ratios
from .standard_errors import second_moments
from .sums import INDEX, REPLAYED, SCALES

__all__ = ["KEYS", "POOL", "ROWS", "SCALE", "TOKEN_ROWS", "add_sampled_sequences", "add_sequences"]

TOKEN_ROWS = (
    # sums over tokens, as named in ``SUMS``
    "delta", "own_delta", "rollout_logprob", "entropy", "law_entropy",
    "k3", "own_k3", "abs_delta", "own_abs_delta", "w", "w2",
    "tokens", "own_tokens", "out_of_band", "confident", "compared", "entropy_tokens",
)  # fmt: skip

ROWS = (
    *TOKEN_ROWS,
    "entropy_nonfinite",
    "clipped", "clipped_square",  # of min(w, 2) - 1
    "last_delta",  # of its last token
    "number",  # what tells it from others, up to ``KEYS``
    "prompt",  # what tells its prompt from others; -1: not known
    # with a correction only
    *CORRECTION_ROWS,
)  # fmt: skip

POOL = 4096  # sequences until their resampling weights repeat

KEYS = (1 << 52) - 1  # numbers up to it fit a double

SCALE = 600.0  # nats between the scales of sequence weights: within one, e^2S fits a double

_APART = 1.0  # nats by which a sequence's last token is more than rounding off

_CUBED = 1e100  # what is cubed still fits a double

_ENTROPY_NONFINITE, _CLIPPED = ROWS.index("entropy_nonfinite"), ROWS.index("clipped")

_PLACES = np.array([INDEX[name] for name in TOKEN_ROWS])

_COUNTS = [ROWS.index(name) for name in ("tokens", "own_tokens", "compared", "entropy_tokens")]


def add_sampled_sequences(parts: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """``add_sequences`` of sums that are estimated from a sample of each sequence's tokens.

    What is not linear in the sum of one sequence (e^S, |S|, its share of Σ k3) would take the chance of its sample for
    drift. It is made of the own head's sums; those of k3 times what makes the batch's the estimated one.
    """
    rows = rows.copy()
    rows[_COUNTS] = rows[_COUNTS].round().clip(0.0)  # weights of a sequence add up to its tokens, but for rounding
    at = dict(zip(ROWS, rows, strict=False))
    factor = max(0.0, at["k3"].sum()) / max(at["own_k3"].sum(), 1e-300)
    return add_sequences(parts, rows, at["own_delta"], at["own_k3"] * factor)


def add_sequences(
    parts: dict[str, np.ndarray],
    rows: np.ndarray,
    log_ratios: np.ndarray | None = None,
    k3: np.ndarray | None = None,
) -> dict[str, float]:
    """Add what (rows, B) numbers, in the order of ``ROWS``, say to the parts of sums; the maxima are returned.

    ``log_ratios``, ``k3``: (B,) S and Σ k3 of the sequences; None: the sums over their tokens.
    """
    at = dict(zip(ROWS, rows, strict=False))
    delta = at["delta"] if log_ratios is None else log_ratios
    k3 = at["k3"] if k3 is None else k3
    totals, tokens = rows.sum(1), at["tokens"]
    has_tokens = np.minimum(tokens, 1.0)
    parts["sums"][_PLACES] += totals[: len(TOKEN_ROWS)]
    parts["sums"][INDEX["sequences"]] += has_tokens.sum()

    scale = np.minimum(np.maximum(np.rint(delta / SCALE), -(SCALES // 2)), SCALES // 2)
    w = np.exp(np.minimum(np.maximum(delta - SCALE * scale, -SCALE / 2), SCALE / 2)) * has_tokens
    scales = scale.astype(np.intp) + SCALES // 2
    for part, x in zip(parts["sequence_weights"], (w, w * w), strict=False):  # none of a noise floor
        part += np.bincount(scales, x, SCALES)

    keys = at["number"].astype(np.int64)
    numbers = keys & (POOL - 1)
    x = np.array([at["w"], at["law_entropy"] + at["rollout_logprob"], tokens])
    weights = _resample_weights(len(parts["bootstrap"]))[numbers].astype(np.float64)
    parts["bootstrap"] += (x @ weights).T
    x[0] -= tokens
    x = np.minimum(np.maximum(x, -_CUBED), _CUBED)
    whole = np.array([np.bincount(numbers, one)[numbers] for one in x])  # of all equal sequences together

    draws = _numbered(keys)
    moments, copies = second_moments(np.array([at["delta"], at["abs_delta"], at["k3"], tokens]), draws)
    some = tokens > 0
    k3 = k3[some]
    if parts["carried"].size:
        prompts = _numbered(at["prompt"][some]) if at["prompt"][0] >= 0 else None
        add_carried(parts["carried"], k3, prompts)
        if prompts is not None:
            logprobs = at["rollout_logprob"][some]
            pairs = equal_pairs(draws[some], prompts, logprobs)
            parts["equal_rows"] += (len(k3), *pairs, np.exp(np.minimum(logprobs, 0.0)).sum())
        add_log_ratios(parts["log_ratios"], delta[some])
    last = np.abs(at["last_delta"])
    last = last[(last < math.inf) & (at["compared"] > 0)]
    parts["added"][: -len(REPLAYED)] += (
        *((whole * whole) @ x.T).ravel().tolist(),
        totals[_ENTROPY_NONFINITE],
        len(last), last.sum(), np.count_nonzero(last > _APART),
        *add_correction(parts["correction_weights"], at),
        totals[_CLIPPED], totals[_CLIPPED + 1], tokens.sum(),
        *moments, float(k3 @ k3),
    )  # fmt: skip
    return {"seq_abs_delta": float(np.abs(delta).max()), "copies": copies}


def _numbered(x: np.ndarray) -> np.ndarray:
    """Equal elements by one number, from 0 on."""
    return np.unique(x, return_inverse=True)[1]


@lru_cache(maxsize=4)
def _resample_weights(samples: int) -> np.ndarray:
    """(POOL, R) int8 draws from Poisson(1): how often each resample holds each sequence. Made once, from one seed.

    Drawing them anew for every batch would cost more than all its sums. The global random state is not touched.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.poisson(torch.ones(POOL, samples, dtype=torch.float64), generator).to(torch.int8).numpy()
