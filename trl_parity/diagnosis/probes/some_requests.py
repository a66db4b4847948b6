"""A law that reaches some of a batch's requests: fitted to the sequences that disagree, where the others do not."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import fitting
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..distribution import Distribution, Tokens, distribution_details
from ..fitting_bias import fit_bias
from .base import Candidate, Probe, Unexplained, independent, mean_residual, probe, recomputed

__all__ = ["SOME_REQUESTS", "set_apart"]

_APART = 5.0  # times the drift of the others, or of the floor where that is more

_LEAST = 2  # sequences on either side

_TELLING = 1.5  # standard errors between two temperatures, of the one that the tokens speak for

_LEFT = 0.5  # of the drift of those that stand apart, by raw log-probs, which are others

_EITHER = 0.5  # confidence, where too few tokens tell

_FITS = {
    "temperature": fitting.fit_temperature,
    "truncated_sampling": fitting.fit_truncation,
    "penalties": fitting.fit_penalty,
    "constrained_decoding": fit_bias,
}

_EACH_REQUEST = (
    "one set of sampling parameters for all requests of a batch: find what gives some of them others (a retry, a "
    "router over servers with other defaults, a per-request override) and take that out, or leave their tokens out "
    "of the loss."
)


def some_requests(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """One law for the sequences that stand apart, the trainer's for all others."""
    base = recomputed(current)
    apart = set_apart(batch.residual(base)[0], batch.floor)
    if apart is None:
        return None
    over = apart[batch.row]
    part = replace(base, kept=base.kept & over)
    tokens = batch.fit_tokens(part)
    laws = {cause: law for cause, fit in _FITS.items() if (law := fit(tokens, base.distribution)) is not None}
    if not laws:
        return None
    left = {cause: mean_residual(batch, replace(part, distribution=law)) for cause, law in laws.items()}
    cause = min(left, key=left.__getitem__)
    law, most = laws[cause], 1.0
    if cause == "temperature":
        cause, law, most = _drawn_or_said(batch, part, tokens, law)
    return Candidate(
        counterfactual=replace(part, distribution=law),
        over=over,
        cause=cause,
        values=2,
        most=most,
        finding=f"in {int(apart.sum())} of {len(apart)} sequences, and in no other: "
        f"{batch.words(law, base.distribution)}",
        fix=_EACH_REQUEST if cause != "raw_logprobs" else "",
        details=distribution_details(law) | {"rows": batch.rows.cpu()[apart].tolist()},
    )


def _drawn_or_said(
    batch: DiagnosedBatch, part: Counterfactual, tokens: Tokens, law: Distribution
) -> tuple[str, Distribution, float]:
    """Cause, law and most confidence: whether these tokens were drawn at another temperature, or only reported so.

    An engine that samples at another temperature says so. One that reports raw log-probs has drawn as configured.
    """
    plain, said = part.distribution, law.sampling.temperature
    sampled, error = fitting.mle_temperature(tokens, plain)
    nearer = (abs(sampled - said) - abs(sampled - plain.sampling.temperature)) / max(error, 1e-6)
    if nearer < -_TELLING:
        return "temperature", law, 1.0
    raw = replace(plain, report="raw_logprobs")
    before, after = (mean_residual(batch, replace(part, distribution=d)) for d in (plain, raw))
    if after - batch.floor > _LEFT * (before - batch.floor):  # nor raw ones
        if nearer > _TELLING:
            raise Unexplained(
                f"some sequences report {batch.words(law, plain)}; their tokens speak for {sampled:.3g} ± {error:.2g}"
            )
        return "temperature", law, 1.0
    return ("raw_logprobs", raw, 1.0) if nearer > _TELLING else ("temperature", law, _EITHER)


def set_apart(sums: torch.Tensor, floor: float) -> torch.Tensor | None:
    """(S,) bool: the sequences whose drift is far above that of all others. None where there is no such gap.

    ``sums``: (S, 2) drift and tokens of each. The gap is where the ratio of neighbours in order is the largest.
    """
    means = (sums[:, 0] / sums[:, 1].clamp(min=1.0)).clamp(min=max(floor, 1e-12))
    ordered, _ = means[sums[:, 1] > 0].sort()
    if len(ordered) < 2 * _LEAST:
        return None
    ratios = ordered[_LEAST : len(ordered) - _LEAST + 1] / ordered[_LEAST - 1 : len(ordered) - _LEAST]
    at = int(ratios.argmax())
    if float(ratios[at]) < _APART:
        return None
    return (means >= ordered[_LEAST + at]) & (sums[:, 1] > 0)


SOME_REQUESTS: tuple[Probe, ...] = (
    replace(
        probe("fitted to some requests", "temperature", "fit", independent(some_requests),
              "some of the requests were sampled with other parameters than the rest",
              "a fitted law explains the sequences that disagree, and the others agree as they are"),
        fitted=True,
    ),
)  # fmt: skip
