"""Mismatch statistics as mergeable sums, maxima and histograms: pure tensor maths.

``measure(batch)`` turns a scored batch into :class:`MismatchSums`; sums of batches, windows and ranks merge by
adding; ``compute(sums)`` turns them into :class:`~trl_parity.records.MismatchStats`. Nothing is ever averaged before
it is summed. Formulas: :data:`trl_parity.scalars.SCALARS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .records import MismatchStats, ScoredBatch
from .scalars import SCALARS

__all__ = ["MismatchSums", "compute", "log_ratio_histogram", "measure", "measure_policy_drift"]

# Histogram of Δ: by sign, |Δ| on a log scale. A quantile read from it is off by half a bin at most, 1.8 %.
_DECADES = (-9, 3)  # |Δ| from 1e-9 (below: zero) to 1e3 nats (above: the last bin)
_PER_DECADE = 64
_BINS = (_DECADES[1] - _DECADES[0]) * _PER_DECADE + 1  # bin 0 holds |Δ| < 1e-9
_SEQ_CLAMP = 300.0  # e^600 still fits a double
BAND = 0.1  # a ratio outside [1 - BAND, 1 + BAND] counts as out_of_band (the band of TRL issue 6789)
# An interval from a handful of sequences says nothing: below this many, honesty has no interval and no gap.
MIN_BOOTSTRAP_SEQUENCES = 8
_POOL = 4096  # sequences until their resampling weights repeat

_SUMS = (
    # tokens both sides scored with a finite number, and how many were to be compared
    "tokens", "neg_delta", "k3", "abs_delta", "w", "w2", "out_of_band", "rollout_logprob", "entropy", "confident",
    "compared",
    # the trainer's own head
    "own_tokens", "own_k3", "own_abs_delta",
    # sequences with at least one such token
    "sequences", "seq_delta", "seq_w", "seq_w2",
    # truncation replay
    "trunc_tokens", "kept_mass", "log_kept", "out_of_support",
    # updates against the policy that generated
    "drift_tokens", "drift_k3",
    # bookkeeping, per rank
    "batches", "errors", "lag", "cost_seconds", "wall_seconds",
)  # fmt: skip
_INDEX = {name: i for i, name in enumerate(_SUMS)}
_MAXIMA = ("abs_delta", "delta", "neg_delta", "seq_abs_delta")


@dataclass(slots=True)
class MismatchSums:
    """Everything a window needs, in two vectors: one that adds and one that takes the maximum.

    ``additive``: fp64, the sums named in ``_SUMS``, then the histogram (2 signs x ``_BINS``), then the bootstrap
    (R resamples x [Σ w, Σ tokens]). ``maxima``: fp64, ``-inf`` where nothing was seen. About 16 KiB with R = 200,
    whatever the number of tokens.
    """

    additive: torch.Tensor
    maxima: torch.Tensor
    bootstrap_samples: int

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu", bootstrap_samples: int = 200) -> MismatchSums:
        """The sums of no tokens."""
        size = len(_SUMS) + 2 * _BINS + 2 * bootstrap_samples
        return cls(
            torch.zeros(size, dtype=torch.float64, device=device),
            torch.full((len(_MAXIMA),), -math.inf, dtype=torch.float64, device=device),
            bootstrap_samples,
        )

    def add_(self, other: MismatchSums) -> None:
        """Merge ``other`` in place; associative and commutative up to fp64 rounding."""
        if other.bootstrap_samples != self.bootstrap_samples:
            raise ValueError(
                f"cannot merge sums with {other.bootstrap_samples} and {self.bootstrap_samples} bootstrap samples. "
                "Use one bootstrap_samples on every rank."
            )
        self.additive += other.additive.to(self.additive.device)
        torch.maximum(self.maxima, other.maxima.to(self.maxima.device), out=self.maxima)

    def bump(self, **amounts: float) -> None:
        """Add plain numbers to named sums."""
        for name, amount in amounts.items():
            self.additive[_INDEX[name]] += amount

    @property
    def histogram(self) -> torch.Tensor:
        """Counts of Δ: (2, bins), row 0 for Δ < 0, row 1 for Δ >= 0."""
        return self.additive[len(_SUMS) : len(_SUMS) + 2 * _BINS].view(2, _BINS)

    @property
    def bootstrap(self) -> torch.Tensor:
        """(R, 2): per resample Σ w and Σ tokens."""
        return self.additive[len(_SUMS) + 2 * _BINS :].view(self.bootstrap_samples, 2)


@torch.no_grad()
def measure(batch: ScoredBatch, *, bootstrap_samples: int = 200, first_sequence: int = 0) -> MismatchSums:
    """The sums of one scored batch, on its device, without a device sync.

    ``first_sequence``: the running number of the batch's first sequence, over batches and ranks. Sequences are
    resampled by their number, so different ones need different numbers.
    """
    mask, device = batch.mask, batch.mask.device
    out = MismatchSums.zeros(device, bootstrap_samples)
    out.bump(batches=1, lag=batch.lag)
    if mask.numel() == 0:
        return out
    # few kernels on stacked tensors: on small batches the launches are what costs
    scores = torch.stack([batch.trainer_logprobs, batch.own_logprobs]).double()
    rollout = batch.rollout_logprobs.double()
    deltas = scores - rollout
    valids = torch.isfinite(deltas) & mask
    deltas = torch.where(valids, deltas, 0.0)
    less_1 = torch.expm1(deltas)
    (k3, own_k3), (abs_delta, own_abs) = less_1 - deltas, deltas.abs()
    delta, (valid, own_valid) = deltas[0], valids
    w = less_1[0] + valid
    by_sequence = _stacked(
        valid,
        -delta,
        k3,
        abs_delta,
        w,
        w * w,
        less_1[0].abs() > BAND,
        torch.where(valid, rollout, 0.0),
        torch.where(valid, batch.entropy, 0.0),
        (rollout >= math.log(0.5)) & (delta < -2.0),
        mask,
        own_valid,
        own_k3,
        own_abs,
    ).sum(-1)
    tokens, seq_delta, seq_mean_w = by_sequence[0], -by_sequence[1], by_sequence[4]
    has_tokens = tokens > 0
    seq_w = torch.where(has_tokens, seq_delta.clamp(max=_SEQ_CLAMP).exp(), 0.0)
    per_sequence = _stacked(has_tokens, seq_delta, seq_w, seq_w * seq_w)
    totals = torch.cat([by_sequence, per_sequence]).sum(-1)  # in the order of _SUMS
    out.additive[: len(totals)] = totals
    if batch.log_kept is not None and batch.out_of_support is not None:
        log_kept = torch.where(valid, batch.log_kept.double(), 0.0)
        truncation = _stacked(valid, log_kept.exp() * valid, log_kept, valid & batch.out_of_support)
        out.additive[_INDEX["trunc_tokens"] :][:4] = truncation.sum((1, 2))

    # scatter, not bincount: bincount syncs with the device to learn its size
    position = abs_delta.clamp_min(1e-300).log10() * _PER_DECADE + (1 - _DECADES[0] * _PER_DECADE)
    bins = position.clamp(0, _BINS - 1).long() + _BINS * (delta >= 0)
    out.histogram.view(-1).scatter_add_(0, bins.view(-1), valid.double().view(-1))

    weights = _resample_weights(bootstrap_samples, device)
    rows = (torch.arange(len(tokens), device=device) + first_sequence) % len(weights)
    out.bootstrap.copy_(weights[rows].t() @ torch.stack([seq_mean_w, tokens], dim=-1))

    out.maxima[:3] = torch.stack([abs_delta, delta, -delta]).masked_fill(~valid, -math.inf).amax((1, 2))
    out.maxima[3] = seq_delta.abs().masked_fill(~has_tokens, -math.inf).amax()
    return out


@lru_cache(maxsize=4)
def _resample_weights(samples: int, device: torch.device) -> torch.Tensor:
    """(_POOL, R) fp64 draws from Poisson(1): how often each resample holds each sequence. Made once, from one seed.

    Drawing them anew for every batch would cost more than all its sums. The global random state is not touched.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.poisson(torch.ones(_POOL, samples, dtype=torch.float64), generator).to(device)


def _stacked(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.double() for x in tensors])


@torch.no_grad()
def measure_policy_drift(out: MismatchSums, new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> None:
    """Add k3 of the training policy against the policy that generated, in place. All (B, C); Δ = new - old."""
    delta = new.double() - old.double()
    valid = mask.bool() & torch.isfinite(delta)
    delta = torch.where(valid, delta, delta.new_zeros(()))
    sums = _stacked(valid, torch.expm1(delta) - delta).sum((1, 2))
    out.additive[_INDEX["drift_tokens"] :][:2] += sums.to(out.additive.device)


def compute(sums: MismatchSums) -> MismatchStats:
    """All scalars from (reduced) sums. What was not measured is ``None``. One device sync on accelerators."""
    additive = sums.additive.cpu().numpy()
    maxima = dict(zip(_MAXIMA, sums.maxima.cpu().tolist(), strict=True))
    s = dict(zip(_SUMS, additive[: len(_SUMS)].tolist(), strict=True))
    histogram = additive[len(_SUMS) : len(_SUMS) + 2 * _BINS].reshape(2, _BINS)
    bootstrap = additive[len(_SUMS) + 2 * _BINS :].reshape(-1, 2)
    n, seqs = s["tokens"], s["sequences"]
    values: dict[str, float | None] = dict.fromkeys(SCALARS)

    def put(name: str, total: float, count: float) -> None:
        if count > 0:
            values[name] = total / count

    put("nonfinite_rate", s["compared"] - n, s["compared"])
    put("own_head/kl_k3", s["own_k3"], s["own_tokens"])
    put("own_head/logp_abs_diff/mean", s["own_abs_delta"], s["own_tokens"])
    put("truncation/kept_mass", s["kept_mass"], s["trunc_tokens"])
    put("truncation/log_bias", s["log_kept"], s["trunc_tokens"])
    put("truncation/out_of_support", s["out_of_support"], s["trunc_tokens"])
    put("policy_drift/kl_k3", s["drift_k3"], s["drift_tokens"])
    put("lag", s["lag"], s["batches"])
    put("cost/seconds", s["cost_seconds"], s["batches"])
    put("cost/share", s["cost_seconds"], s["wall_seconds"])
    if n > 0:
        p01, p50, p99 = map(_exp, _quantiles(histogram, (0.01, 0.50, 0.99), maxima))
        values |= {
            "kl_k1": s["neg_delta"] / n,
            "kl_k3": s["k3"] / n,
            "logp_abs_diff/mean": s["abs_delta"] / n,
            "logp_abs_diff/p99": _quantiles_abs(histogram, (0.99,), maxima)[0],
            "logp_abs_diff/max": maxima["abs_delta"],
            "ratio/mean": s["w"] / n,
            "ratio/p01": p01,
            "ratio/p50": p50,
            "ratio/p99": p99,
            "ratio/max": _exp(maxima["delta"]),
            "ratio/out_of_band": s["out_of_band"] / n,
            "ess": s["w"] ** 2 / (n * s["w2"]) if s["w2"] > 0 else 0.0,
            "chi2": s["w2"] / n - 1.0,
            "seq/log_ratio_mean": s["seq_delta"] / seqs,
            "seq/log_ratio_max": maxima["seq_abs_delta"],
            "seq/ess": s["seq_w"] ** 2 / (seqs * s["seq_w2"]) if s["seq_w2"] > 0 else 0.0,
            "entropy/trainer": s["entropy"] / n,
            "entropy/rollout": -s["rollout_logprob"] / n,
            "entropy/drift": (s["entropy"] + s["rollout_logprob"]) / n,
            "honesty": s["w"] / n,
            "confident_disagreement": s["confident"] / n,
        }
        resampled = bootstrap[bootstrap[:, 1] > 0]
        if seqs >= MIN_BOOTSTRAP_SEQUENCES and len(resampled):
            means = np.sort(resampled[:, 0] / resampled[:, 1])
            low, high = float(means[int(0.005 * len(means))]), float(means[-1 - int(0.005 * len(means))])
            gap = max(0.0, low - 1.0, 1.0 - high)
            values |= {"honesty_low": low, "honesty_high": high, "honesty_gap": gap}
    return MismatchStats(int(n), int(seqs), int(s["batches"]), int(s["errors"]), values)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.0 else math.inf


# |Δ| at the middle of each bin on the log scale, 0 for the first; and Δ over all signed bins in ascending order
_CENTERS = np.where(np.arange(_BINS) == 0, 0.0, 10.0 ** (_DECADES[0] + (np.arange(_BINS) - 0.5) / _PER_DECADE))
_SIGNED_CENTERS = np.concatenate([-_CENTERS[::-1], _CENTERS])


def _quantiles_abs(histogram: np.ndarray, qs: Sequence[float], maxima: dict[str, float]) -> list[float]:
    return _pick(histogram.sum(0), _CENTERS, qs, 0.0, maxima["abs_delta"])


def _quantiles(histogram: np.ndarray, qs: Sequence[float], maxima: dict[str, float]) -> list[float]:
    counts = np.concatenate([histogram[0][::-1], histogram[1]])
    return _pick(counts, _SIGNED_CENTERS, qs, -maxima["neg_delta"], maxima["delta"])


def _pick(counts: np.ndarray, values: np.ndarray, qs: Sequence[float], low: float, high: float) -> list[float]:
    """The values at ranks ceil(q n), kept inside the observed range."""
    cumulative = np.cumsum(counts)
    ranks = np.maximum(1.0, np.ceil(np.asarray(qs) * cumulative[-1]))
    return np.clip(values[np.searchsorted(cumulative, ranks)], low, high).tolist()


def log_ratio_histogram(sums: MismatchSums, bins: int = 64) -> tuple[np.ndarray, np.ndarray] | None:
    """Counts and edges of Δ on a linear scale, over the range that holds all but the outermost 0.1 % at each end.

    Rebinned from the log histogram for trackers; tails are counted in the end bins. ``None`` without tokens.
    """
    histogram = sums.histogram.cpu().numpy()
    if histogram.sum() == 0:
        return None
    maxima = dict(zip(_MAXIMA, sums.maxima.cpu().tolist(), strict=True))
    low, high = _quantiles(histogram, (0.001, 0.999), maxima)
    if high - low < 1e-8:
        low, high = low - 1e-8, high + 1e-8
    values = _SIGNED_CENTERS.clip(low, high)
    counts = np.concatenate([histogram[0][::-1], histogram[1]])
    return np.histogram(values, bins=bins, range=(low, high), weights=counts)
