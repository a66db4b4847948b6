"""Probes of the distribution the engine reports: many readings of one recompute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .. import fitting
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..distribution import Distribution, Tokens, distribution_details
from ..fitting_bias import fit_bias, fit_min_tokens
from .base import (
    Candidate,
    NotPossible,
    Probe,
    independent,
    mean_in_words,
    mean_residual,
    probe,
    recomputed,
    with_distribution,
)

__all__ = ["SAMPLING_PARAMS"]

_TRUNCATION = ("top_k", "top_p", "min_p")

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def raw(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """What an engine reports in one of vLLM's other log-prob modes."""
    ways = [
        with_distribution(current, replace(current.distribution, report=mode))
        for mode in ("raw_logprobs", "raw_logits", "processed_logits")
        if current.distribution.report != mode
    ]
    if not ways:
        return None
    best = min(ways, key=lambda w: mean_residual(batch, w))
    cause, words = _who_samples(batch, current, best, "raw_logprobs")
    if cause != "raw_logprobs":
        return None
    mode = "" if batch.engine is None else f"; logprobs_mode of the live engine: {_mode(batch)}"
    return Candidate(counterfactual=best, finding=batch.words(best.distribution, current.distribution) + words + mode)


def _mode(batch: DiagnosedBatch) -> str:
    return "unknown" if batch.engine is None else str(batch.engine.settings()["logprobs_mode"])


def _who_samples(batch: DiagnosedBatch, current: Counterfactual, other: Counterfactual, cause: str) -> tuple[str, str]:
    """Temperature or raw: do the sampled tokens follow the distribution that is reported, or the trainer's?

    What is reported and what is sampled from are two things. An engine at another temperature says what it samples;
    one in a raw mode samples at the trainer's temperature and says something else.
    """
    reported = 1.0 if other.distribution.report.startswith("raw") else other.distribution.sampling.temperature
    ours = current.distribution.sampling.temperature
    if abs(reported / ours - 1.0) < 1e-3:
        return "raw_logprobs" if other.distribution.report != current.distribution.report else cause, ""
    tokens = batch.fit_tokens(recomputed(current))
    sampled, error = fitting.mle_temperature(tokens, recomputed(current).distribution)
    error = max(error, 1e-6)
    of_reported, of_ours = abs(sampled - reported) / error, abs(sampled - ours) / error
    words = f"; the sampled tokens speak for temperature {sampled:.3g} ± {error:.2g}"
    if abs(of_reported - of_ours) < 1.5 and batch.engine is not None:  # too few tokens to tell: ask the engine
        is_raw = _mode(batch) != "processed_logprobs"
    else:
        is_raw = of_ours < of_reported
    return ("raw_logprobs" if is_raw else "temperature"), words


def temperature(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The temperature at which the trainer would say what the engine says."""
    base = recomputed(current)
    distribution = fitting.fit_temperature(batch.fit_tokens(base), base.distribution)
    if distribution is None:
        return None
    best = replace(base, distribution=distribution)
    cause, words = "temperature", ""
    if abs(distribution.sampling.temperature - 1.0) < 0.02:  # what a raw mode reports, too
        cause, words = _who_samples(batch, current, best, "temperature")
    return Candidate(
        counterfactual=best,
        cause=cause,
        finding=batch.words(distribution, base.distribution) + words,
        details=distribution_details(distribution),
    )


def _requested(names: tuple[str, ...]) -> Callable[[DiagnosedBatch, Counterfactual], Candidate | None]:
    def run(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
        sent, base = batch.rollout.sampling, current.distribution
        changed = {n: getattr(sent, n) for n in names if getattr(sent, n) != getattr(base.sampling, n)}
        if not changed:
            return None
        new = replace(base, sampling=replace(base.sampling, **changed))
        return Candidate(
            counterfactual=with_distribution(current, new),
            finding="as requested: " + batch.words(new, base),
            details=changed,
        )

    return run


def _fitted(
    fit: Callable[[Tokens, Distribution], Distribution | None], *, held_out: bool = False
) -> Callable[[DiagnosedBatch, Counterfactual], Candidate | None]:
    """``held_out``: fit to every other sequence and compare on the rest, since several values can be made to fit.

    Of those that are still compared: an earlier cause may have been held out, too.
    """

    def run(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
        base = recomputed(current)
        rows = batch.row[base.kept].unique()
        rest = torch.isin(batch.row, rows[1::2]) if held_out and len(rows) > 3 else None
        fitted_to = base if rest is None else replace(base, kept=base.kept & ~rest)
        distribution = fit(batch.fit_tokens(fitted_to), base.distribution)
        if distribution is None:
            return None
        added = len(distribution.bias) - len(base.distribution.bias) + (0 if distribution.allowed is None else 4)
        return Candidate(
            counterfactual=replace(
                base, distribution=distribution, kept=base.kept if rest is None else base.kept & rest
            ),
            over=rest,
            finding=batch.words(distribution, base.distribution),
            values=max(1, added),
            details=distribution_details(distribution),
        )

    return run


def constraints(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The tokens the requests themselves rule out or favour."""
    if not batch.capture.requests:
        raise NotPossible("the requests of this batch are not at hand")
    params = batch.capture.requests[-1].params
    get = params.get if isinstance(params, dict) else lambda name: getattr(params, name, None)
    bias = {int(token): float(b) for token, b in (get("logit_bias") or {}).items()}
    banned = [words[0] for words in (get("bad_words_token_ids") or []) if len(words) == 1]
    bias |= dict.fromkeys(banned, float("-inf"))
    allowed = get("allowed_token_ids")
    told = [n for n in batch.rollout.sampling.unreplayed if get(n) or n == "structured_outputs"]
    if not bias and not allowed:
        if told:
            raise NotPossible(f"the requests set {', '.join(told)}, which can't be replayed on the trainer's logits")
        return None
    distribution = replace(
        current.distribution,
        bias=tuple(sorted(bias.items())),
        allowed=frozenset(allowed) if allowed else current.distribution.allowed,
    )
    if distribution == current.distribution:
        return None
    return Candidate(
        counterfactual=with_distribution(current, distribution),
        finding="as requested: " + batch.words(distribution, current.distribution),
        details={"set": told},
    )


def shift(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """Each sequence's log-probs moved by a place or two, where that fitting."""
    base = recomputed(current)
    shape = (batch.sequences, int(batch.column.max()) + 1) if len(batch) else (0, 0)
    if 0 in shape:
        return None
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[batch.row, batch.column] = base.kept & torch.isfinite(base.reported)
    reported, trainer = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    reported[batch.row, batch.column] = base.reported
    trainer[batch.row, batch.column] = batch.log_probs(base)
    by = fitting.fit_shift(reported, trainer, mask)
    if not by.any():
        return None
    source = batch.column + by[batch.row]
    inside = (source >= 0) & (source < shape[1])
    source = source.clamp(0, shape[1] - 1)
    kept = base.kept & inside & mask[batch.row, source]
    moved = {int(s): int((by == s).sum()) for s in by.unique() if s}
    return Candidate(
        counterfactual=replace(base, reported=reported[batch.row, source], kept=kept),
        finding="; ".join(
            f"in {n} of {batch.sequences} sequences the log-probs are {abs(s)} place(s) {'late' if s > 0 else 'early'}"
            for s, n in moved.items()
        ),
        details={"sequences": sum(moved.values()), "shifts": {str(s): n for s, n in moved.items()}},
    )


def logits_precision(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The trainer's logits rounded as a half-precision head would."""
    dtypes = [torch.bfloat16, torch.float16]
    if batch.engine is not None and batch.engine.head_dtype in dtypes:
        dtypes = [batch.engine.head_dtype]
    ways = [with_distribution(current, replace(current.distribution, logits_dtype=dtype)) for dtype in dtypes]
    best = min(ways, key=lambda w: mean_residual(batch, w))
    gap = (batch.own_scored - current.reported)[current.kept]
    gap = gap[torch.isfinite(gap)].abs()
    words = batch.words(best.distribution, current.distribution)
    return Candidate(
        counterfactual=best, finding=f"{words}; with the trainer's own head mean |Δ| is {mean_in_words(gap)}"
    )


def _fit(
    name: str, cause: str, look: Callable[[DiagnosedBatch, Counterfactual], Candidate | None], hypothesis: str
) -> Probe:
    fits = probe(
        name, cause, "fit", independent(look), hypothesis,
        "a fitted value explains the drift, and is not the configured one",
    )  # fmt: skip
    return replace(fits, fitted=True)


SAMPLING_PARAMS: tuple[Probe, ...] = (
    probe("raw", "raw_logprobs", "head", independent(raw),
           "the engine reports another log-prob mode", "raw numbers (T = 1, unprocessed) agree with it"),
    probe("requested temperature", "temperature", "head", independent(_requested(("temperature",))),
           "the requests ask for another temperature than the loss uses", "the trainer at theirs agrees"),
    probe("requested truncation", "truncated_sampling", "head", independent(_requested(_TRUNCATION)),
           "the requests truncate and the comparison does not", "renormalized over the kept set, the trainer agrees"),
    probe("requested penalties", "penalties", "head", independent(_requested(_PENALTIES)),
           "the requests penalize and the comparison does not", "with the penalties, the trainer agrees"),
    probe("requested constraints", "constrained_decoding", "head", independent(constraints),
           "the requests rule tokens out or favour some", "with the same mask or bias, the trainer agrees"),
    _fit("fitted temperature", "temperature", temperature,
           "the engine samples at another temperature or logit scale"),
    _fit("fitted soft cap", "temperature", _fitted(fitting.fit_soft_cap),
           "one side caps its logits softly, the other does not"),
    _fit("fitted truncation", "truncated_sampling", _fitted(fitting.fit_truncation),
           "the engine truncates behind the requests' back"),
    _fit("fitted penalties", "penalties", _fitted(fitting.fit_penalty),
           "the engine penalizes behind the requests' back"),
    _fit("fitted bias", "constrained_decoding", _fitted(fit_bias, held_out=True),
           "the engine rules tokens out or favours some behind the requests' back"),
    _fit("fitted min_tokens", "constrained_decoding", _fitted(fit_min_tokens),
           "the engine rules some tokens out at the beginning of each completion"),
    probe("shift", "token_misalignment", "head", independent(shift),
           "log-probs belong to a neighbouring token", "moved by a place or two, they agree"),
    probe("logits precision", "head_precision", "head", independent(logits_precision),
           "the engine's head rounds its logits", "rounded alike, the trainer's logits agree"),
)  # fmt: skip
