"""Mismatch statistics as mergeable sums, maxima and histograms: pure tensor maths.

``measure(batch)`` turns a scored batch into ``MismatchSums``; sums of batches, windows and ranks merge by
adding; ``compute(sums)`` turns them into ``MismatchStats``. Nothing is ever averaged before
it is summed. Formulas: ``SCALARS``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..records import ScoredBatch
from ..verdict import MismatchStats
from .concentration import concentration
from .correction import correction_rows, correction_scalars
from .equal_rows import equal_scalars
from .histogram import log_ratio_histogram, monotone, quantiles, quantiles_abs
from .intervals import intervals
from .pareto import khat
from .scalars import LAG_BUCKETS, SCALARS
from .sequences import KEYS, POOL, SCALE, TOKEN_ROWS, add_sampled_sequences, add_sequences
from .standard_errors import evidence_inputs
from .sums import BINS, DECADES, PER_DECADE, REPLAYED, SCALES, MismatchSums
from .trimmed import EXTREME, trimmed

if TYPE_CHECKING:
    import torch

__all__ = ["compute", "log_ratio_histogram", "measure", "measure_policy_drift"]

_HALF = math.log(0.5)

_EXP_CLAMP = 300.0  # Δ in e^Δ of tokens: e^600 still fits a double

CLIP = 2.0  # ratios count up to it in the test of honesty

BAND = 0.1  # a ratio outside [1 - BAND, 1 + BAND] counts as out_of_band (the band of TRL issue 6789)

_BLOCK = 1 << 17  # tokens summed at once: temporaries of about 40 MiB, whatever the batch

_LAG_EDGES = (0, 1, 2, 4)  # the last lag of each bucket but the open one


def measure(batch: ScoredBatch, *, bootstrap_samples: int = 200, first_sequence: int = 0) -> MismatchSums:
    """The sums of one scored batch, on its device; without a device sync where all tokens were scored.

    Sequences are resampled by ``batch.keys``, so that equal ones are one piece of evidence, whatever batch or rank
    they are in; without keys by their number. ``first_sequence``: that of the batch's first sequence, over batches and
    ranks. Of a sample of tokens the sums are estimates (``_readings``).
    """
    import torch

    mask = batch.mask
    out = MismatchSums.zeros(mask.device, bootstrap_samples)
    if mask.numel():
        rows = min(POOL, max(1, _BLOCK // mask.shape[1]))
        with torch.no_grad():
            for low in range(0, len(mask), rows):
                part = batch if len(mask) <= rows else _part(batch, slice(low, low + rows))
                _add_sequences(out, part, first_sequence + low)
    out.bump(batches=1)
    if batch.weights is not None:
        out.bump(unscored=int((mask & (batch.weights == 0)).sum()))
    if batch.lags is None and not batch.probe:
        out.bump(lag=batch.lag, lags=1)
    return out


def _part(batch: ScoredBatch, rows: slice, columns: slice = slice(None)) -> ScoredBatch:
    """Some sequences of a batch, or some positions of all."""
    import torch

    tensors = {f.name: x for f in fields(batch) if isinstance(x := getattr(batch, f.name), torch.Tensor)}
    part: dict[str, Any] = {name: x[rows] if x.dim() == 1 else x[rows, columns] for name, x in tensors.items()}
    return replace(batch, **part)


def _add_sequences(out: MismatchSums, batch: ScoredBatch, first_sequence: int) -> None:
    """Add what a batch's sequences say, in place."""
    import torch

    mask = batch.mask
    blocks = [slice(low, low + _BLOCK) for low in range(0, mask.shape[1], _BLOCK)]
    parts = [batch] if len(blocks) == 1 else (_part(batch, slice(None), block) for block in blocks)
    by_sequence = [_add_tokens(out, *reading) for part in parts for reading in _readings(part)]
    last = mask.cumsum(-1).argmax(-1, keepdim=True)  # the first of equal ones
    last_delta = batch.trainer_logprobs.gather(1, last) - batch.rollout_logprobs.gather(1, last)
    numbers = torch.arange(first_sequence, first_sequence + len(mask)) if batch.keys is None else batch.keys
    prompts = torch.full_like(numbers, -1) if batch.prompts is None else batch.prompts & KEYS
    numbers = torch.stack([numbers & KEYS, prompts]).to(mask.device)
    rows = [sum(by_sequence[1:], by_sequence[0]), last_delta.t(), numbers]
    if batch.correction_weights is not None:
        rows.append(correction_rows(batch.correction_weights.to(mask.device), mask))
    out.wait(add_sequences if batch.weights is None else add_sampled_sequences, torch.cat(rows))
    if batch.probe:
        out.span("probe_tokens").add_(rows[0][TOKEN_ROWS.index("tokens")].sum())
    if batch.lags is not None:
        _by_lag(out, batch, batch.lags.to(mask.device))


def _readings(batch: ScoredBatch) -> list[tuple[ScoredBatch, torch.Tensor | None]]:
    """What of a batch is summed up, and with which weight (B, C) of each token; None: 1.

    Of a sample of tokens, Σ f(own) + Σ weight x (f(fp32) - f(own)): the fp32 head's numbers with their weights, and
    the own head's with the rest to 1. Its expectation is Σ f(fp32).
    """
    if batch.weights is None:
        return [(batch, None)]
    own = replace(
        batch, trainer_logprobs=batch.own_logprobs, entropy=None, law_entropy=None, log_kept=None, out_of_support=None,
        replayed_logprobs=None,
    )  # fmt: skip
    weights = batch.weights.double()
    return [(batch, weights), (own, 1.0 - weights)]


def _add_tokens(out: MismatchSums, batch: ScoredBatch, weights: torch.Tensor | None) -> torch.Tensor:
    """(rows, B): ``TOKEN_ROWS`` and ``entropy_nonfinite``. What is no sum over sequences is added in place."""
    import torch

    # few kernels, few kinds of kernels, on stacked tensors: on small batches the launches are what costs
    mask = batch.mask
    entropy = torch.zeros_like(batch.trainer_logprobs) if batch.entropy is None else batch.entropy
    law_entropy = entropy if batch.law_entropy is None else batch.law_entropy
    scores = [batch.trainer_logprobs, batch.own_logprobs, batch.rollout_logprobs, entropy, law_entropy]
    given = torch.stack(scores).double()
    given[:2].sub_(given[2])
    finite = (given.abs() < math.inf) & mask  # NaN is not
    finite[2:].logical_and_(finite[0])
    valid, known = finite[0], finite[3] & finite[4]

    plain = torch.where(finite, given, 0.0)
    deltas, delta = plain[:2], plain[0]
    less_1 = torch.expm1(deltas.clamp(max=_EXP_CLAMP))  # so that sums of w² still fit a double
    sizes, counts = deltas.abs(), valid.double()
    w = less_1[:1] + counts
    out_of_band, confident = less_1[0].abs() > BAND, (plain[2] >= _HALF) & (delta < -2.0)
    unknown = valid ^ known
    if batch.entropy is None:
        known = unknown  # nobody asked: neither
    flags = torch.stack([valid, finite[1], out_of_band, confident, mask, known, unknown])
    # bets want numbers of one head: of a sample, of the own
    clipped = less_1[:1].clamp(max=CLIP - 1.0) if weights is None else less_1[1:].clamp(max=CLIP - 1.0)
    squares, plainly = clipped * clipped, torch.cat([plain, less_1 - deltas, sizes, w, w * w])
    if weights is not None:
        flags, clipped, squares, plainly = (x * weights for x in (flags, clipped, squares, plainly))
        counts = counts * weights
    by_sequence = torch.cat([x.sum(-1) for x in (plainly, flags, clipped, squares)])
    if batch.log_kept is not None and batch.out_of_support is not None:
        log_kept = torch.where(valid, batch.log_kept.double(), 0.0)
        truncation = _stacked(valid, log_kept.exp() * valid, log_kept, valid & batch.out_of_support)
        truncation = truncation if weights is None else truncation * weights
        out.span("trunc_tokens", "kept_mass", "log_kept", "out_of_support").add_(truncation.sum((1, 2)))
    if batch.replayed_logprobs is not None:
        _add_k3(out.span(*REPLAYED), batch.replayed_logprobs, batch.rollout_logprobs, mask, weights)

    # scatter, not bincount: bincount syncs with the device to learn its size. log10(0) = -inf ends in bin 0
    bins = sizes[0].log10().mul_(PER_DECADE).add_(1 - DECADES[0] * PER_DECADE).clamp_(0, BINS - 1)
    bins.add_(delta >= 0, alpha=BINS)
    out.histogram.view(-1).scatter_add_(0, bins.view(-1).long(), counts.view(-1))

    seen = valid if weights is None else valid & (weights > 0)  # each token with the number that is known of it
    largest = torch.where(seen, torch.stack([delta, -delta]), -math.inf).amax((1, 2))
    peaks = out.peak_span("delta", "neg_delta")
    torch.maximum(peaks, largest, out=peaks)
    return by_sequence


def _by_lag(out: MismatchSums, batch: ScoredBatch, lags: torch.Tensor) -> None:
    """Add tokens and k3 of all sequences by how far their weights lag, in place."""
    import torch

    assert batch.stale is not None
    mask = batch.mask | batch.stale
    delta = batch.trainer_logprobs.double() - batch.rollout_logprobs.double()
    valid = mask & torch.isfinite(delta)
    delta = torch.where(valid, delta, 0.0)
    k3 = torch.expm1(delta.clamp(max=_EXP_CLAMP)) - delta
    by_sequence = torch.stack([valid.double(), k3], dim=-1).sum(1)  # (B, 2)
    bucket = torch.bucketize(lags, _lag_edges(lags.device))
    sums = by_sequence.new_zeros(len(LAG_BUCKETS), 2).index_add_(0, bucket, by_sequence)
    names = (f"{what}/{name}" for name in LAG_BUCKETS for what in ("lag_tokens", "lag_k3"))
    out.span(*names).add_(sums.flatten())
    in_flight = torch.full_like(lags, -1) if batch.in_flight is None else batch.in_flight.to(lags.device)
    stale, tokens = batch.stale, mask.sum(-1)
    counts = _stacked(
        stale.sum(), (stale & ~valid).sum(), (tokens * (in_flight >= 0)).sum(), (tokens * (in_flight == 1)).sum()
    )
    out.span("stale_compared", "stale_nonfinite", "flight_tokens", "in_flight_tokens").add_(counts)
    out.span("lag").add_(lags.sum())
    out.span("lags").add_(len(lags))


@lru_cache(maxsize=4)
def _lag_edges(device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(_LAG_EDGES, device=device)  # waits for the device: once


def _stacked(*tensors: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.stack([x.double() for x in tensors])


def measure_policy_drift(out: MismatchSums, new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> None:
    """Add k3 of the training policy against the policy that generated, in place. All (B, C); Δ = new - old."""
    import torch

    with torch.no_grad():
        _add_k3(out.span("drift_tokens", "drift_k3"), new, old, mask)


def _add_k3(
    sums: torch.Tensor, new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None = None
) -> None:
    """Add tokens, Σ k3 and, where there is a third place, Σ |Δ| to ``sums``, in place. Δ = new - old."""
    import torch

    delta = new.double() - old.double()
    valid = (delta.abs() < math.inf) & mask.bool()
    delta = torch.where(valid, delta, 0.0)
    k3 = torch.expm1(delta.clamp(max=_EXP_CLAMP)) - delta
    terms = _stacked(valid, k3, *([delta.abs()] if len(sums) == 3 else []))
    sums += (terms if weights is None else terms * weights).sum((1, 2)).to(sums.device)


_OF_TEACHER = {"mass_max": "mass", "temperature_gap": "temperature_gap"}

# scalars that are one sum over another
_SHARES = {
    "nonfinite_rate": ("nonfinite", "compared"),
    "own_head/kl_k3": ("own_k3", "own_tokens"),
    "own_head/logp_abs_diff/mean": ("own_abs_delta", "own_tokens"),
    "kl_k3": ("k3", "tokens"),
    "logp_abs_diff/mean": ("abs_delta", "tokens"),
    "ratio/mean": ("w", "tokens"),
    "ratio/out_of_band": ("out_of_band", "tokens"),
    "honesty": ("w", "tokens"),
    "confident_disagreement": ("confident", "tokens"),
    "seq/log_ratio_mean": ("delta", "sequences"),
    "truncation/kept_mass": ("kept_mass", "trunc_tokens"),
    "truncation/log_bias": ("log_kept", "trunc_tokens"),
    "truncation/out_of_support": ("out_of_support", "trunc_tokens"),
    "last_token/logp_abs_diff/mean": ("last_abs_delta", "last_tokens"),
    "last_token/disagreement": ("last_apart", "last_tokens"),
    "policy_drift/kl_k3": ("drift_k3", "drift_tokens"),
    "replayed/kl_k3": ("replayed_k3", "replayed_tokens"),
    "replayed/logp_abs_diff/mean": ("replayed_abs_delta", "replayed_tokens"),
    "lag": ("lag", "lags"),
    "lag/nonfinite_rate": ("stale_nonfinite", "stale_compared"),
    "lag/in_flight_share": ("in_flight_tokens", "flight_tokens"),
    **{f"lag/{name}/kl_k3": (f"lag_k3/{name}", f"lag_tokens/{name}") for name in LAG_BUCKETS},
    "cost/seconds": ("cost_seconds", "batches"),
    "cost/share": ("cost_seconds", "wall_seconds"),
    "cost/coverage": ("scored", "compared"),
    "temperature/engine": ("temperature_engine", "requests"),
    "temperature/trainer": ("temperature_trainer", "requests"),
    "reward/mean": ("reward_sum", "rewards"),
    "completions/stopped_but_masked": ("stopped_masked", "stopped"),
    "reference/start_kl_k3": ("reference_k3", "reference_tokens"),
    "reference/base_moved": ("frozen_moved", "frozen_size"),
    "reference/merged": ("merged_layers", "adapter_layers"),
    "teacher/logprob": ("teacher_logprob", "teacher_known"),
    "teacher/missing": ("teacher_missing", "teacher_tokens"),
    "teacher/mass": ("teacher_mass", "teacher_places"),
    "teacher/foreign": ("teacher_foreign", "teacher_ids"),
    "engine/prefix_cache_hit_rate": ("cached_tokens", "looked_up_tokens"),
}


def _copies(s: Mapping[str, float], values: Mapping[str, float | None]) -> float:
    """Rows that a draw has, on average over the tokens: Σ n_c² over Σ n_i²."""
    effective = values["effective_sequences"]
    return 1.0 if effective is None else max(1.0, s["tokens"] ** 2 / effective / s["row_tokens_square"])


def compute(sums: MismatchSums) -> MismatchStats:
    """All scalars from (reduced) sums. What was not measured is ``None``. Accelerators are waited for."""
    sums = sums.cpu()
    s, maxima = sums.totals(), sums.peaks()
    s["nonfinite"] = s["compared"] - s["tokens"]
    s["scored"] = s["compared"] - s["unscored"]
    values: dict[str, float | None] = dict.fromkeys(SCALARS)
    values |= {name: s[part] / s[whole] for name, (part, whole) in _SHARES.items() if s[whole] > 0}
    by_lag = {f"lag/{name}/tokens": s[f"lag_tokens/{name}"] for name in LAG_BUCKETS}
    if s["probe_tokens"] or s["stale_compared"] or any(by_lag.values()):
        values |= by_lag | {"lag/probe_tokens": s["probe_tokens"]}
    if math.isfinite(maxima["kv_cache_usage"]):
        values["engine/kv_cache_usage"] = maxima["kv_cache_usage"]
    if s["requests"]:
        values["temperature/gap"] = maxima["temperature_gap"]
    if s["teacher_tokens"]:
        values |= {f"teacher/{name}": maxima[f"teacher_{part}"] for name, part in _OF_TEACHER.items()}
    if s["tokens"] > 0:
        parts = sums.parts()
        histogram, moments = monotone(parts["histogram"]), parts["added"][:9].reshape(3, 3).tolist()
        cumulative = histogram.sum(0).cumsum()  # both signs side by side, |Δ| ascending
        values |= _ratios(s, maxima, histogram, cumulative) | _entropies(s)
        values |= intervals(s, parts["bootstrap"], moments) | trimmed(histogram, cumulative, s)
        values |= correction_scalars(s, parts["correction_weights"])
        if parts["sequence_weights"].size:  # of a noise floor nobody asks for these
            values |= _of_sequences(s, parts["sequence_weights"], values["honesty_gap"])
            values |= concentration(s, parts["carried"], histogram) | khat(parts["log_ratios"])
        values |= evidence_inputs(s, maxima["copies"], parts["bootstrap"])
        values |= equal_scalars(parts["equal_rows"], _copies(s, values), maxima["group"])
        if s["entropy_nonfinite"]:
            unknown = ("entropy/trainer", "entropy/drift", "entropy/drift_gap", "kl_over_entropy")
            values |= dict.fromkeys(unknown, math.nan)
    return MismatchStats(int(s["tokens"]), int(s["sequences"]), int(s["batches"]), int(s["errors"]), values)


def _ratios(
    s: dict[str, float], maxima: dict[str, float], histogram: np.ndarray, cumulative: np.ndarray
) -> dict[str, float | None]:
    """Of Δ and w beyond plain means; there is a token."""
    n = s["tokens"]
    p01, p50, p99 = map(_exp, quantiles(histogram, (0.01, 0.50, 0.99), maxima))
    return {
        "kl_k1": -s["delta"] / n,
        "logp_abs_diff/p99": quantiles_abs(cumulative, (0.99,), maxima)[0],
        "logp_abs_diff/max": maxima["abs_delta"],
        "ratio/p01": p01,
        "ratio/p50": p50,
        "ratio/p99": p99,
        "ratio/max": _exp(maxima["delta"]),
        "ess": s["w"] ** 2 / (n * s["w2"]) if s["w2"] > 0 else 0.0,
        "ratio/extreme": (n - float(cumulative[EXTREME - 1])) / n,
        "chi2": max(0.0, (s["w2"] - 2.0 * s["w"]) / n + 1.0),  # of rounding: a mean of squares
        "seq/log_ratio_max": maxima["seq_abs_delta"],
    }


def _of_sequences(s: dict[str, float], weights: np.ndarray, honesty_gap: float | None) -> dict[str, float | None]:
    """``weights``: (2, SCALES) of sequences by scale."""
    weights = weights.copy()
    weights[:, SCALES // 2] += s["seq_w"], s["seq_w2"]
    # of the largest scale that has any, and the one below: the others are e^-600 of it
    top = int(weights[1].nonzero()[0].max(initial=0))
    step = math.exp(-SCALE)
    seq_w, seq_w2 = weights[:, top] + weights[:, top - 1] * step * (1.0, step)
    found: dict[str, float | None] = {"seq/ess": float(seq_w**2 / (s["sequences"] * seq_w2)) if seq_w2 else 0.0}
    if honesty_gap is not None:
        found["seq/bias_gap"] = honesty_gap * s["tokens"] / s["sequences"]
    return found


def _entropies(s: dict[str, float]) -> dict[str, float | None]:
    n = s["tokens"]
    found: dict[str, float | None] = {"entropy/rollout": -s["rollout_logprob"] / n}
    if s["entropy_tokens"] or s["entropy_nonfinite"]:
        found["entropy/nonfinite_rate"] = s["entropy_nonfinite"] / (s["entropy_tokens"] + s["entropy_nonfinite"])
    if s["entropy_tokens"] == n:
        found["entropy/trainer"] = s["entropy"] / n
        found["entropy/drift"] = (s["law_entropy"] + s["rollout_logprob"]) / n
        if s["entropy"] > 0:
            found["kl_over_entropy"] = s["k3"] / s["entropy"]
    return found


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.0 else math.inf
