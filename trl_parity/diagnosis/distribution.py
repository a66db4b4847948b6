"""The distribution an engine samples from: what it may do to logits before it samples and reports.

Given the trainer's logits z of a few tokens and the log-probs the engine reported for them, which distribution makes
one the other? Goodness: mean Huber(Δ), Δ = the distribution's log-prob - the reported one, nats. Robust against a
minority of tokens that are off for other reasons, and honest about noise: see ``improves``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..records import SamplingSettings
from ..scoring.dtypes import dtype_name
from ..scoring.sampling import cut, penalize, settings_of

__all__ = [
    "MIN_GAIN",
    "Distribution",
    "DistributionScores",
    "Tokens",
    "describe",
    "distribution_details",
    "huber",
    "improves",
    "log_probs",
]

MIN_GAIN = 0.1  # a fit lowers the objective by this share, or there is none

PROCESSED = "processed_logprobs"

_HUBER_CAP = 30.0

_CHUNK = 1 << 20  # logits processed at once

HEAD, _GROUPS = 1024, 1024  # of a sketch: tokens kept one by one, groups the others are summed in


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """What an engine does to logits z before it samples and reports: rounding, soft cap, bias, bans, ``sampling``."""

    sampling: SamplingSettings
    bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), distinct ids; -inf bans it
    allowed: frozenset[int] | None = None  # only these ids; None: all
    late: tuple[int, ...] = ()  # ids that are banned before ``late_from`` tokens were generated, as by min_tokens
    late_from: int = 0
    report: str = PROCESSED  # vLLM's logprobs_mode: processed_ or raw_, logprobs or logits
    logits_dtype: torch.dtype | None = None  # z is rounded to it first
    curvature: float = 0.0  # 1 / soft cap, negative where one is taken off: see ``curved``


@dataclass(slots=True)
class Tokens:
    """A few sampled tokens with their whole logits."""

    logits: Tensor  # (n, V) fp32, before temperature
    targets: Tensor  # (n,) int64
    reported: Tensor  # (n,) what the engine said
    context: Tensor  # (n, L) int64, the ids before the target; garbage where not real
    real: Tensor  # (n, L) bool
    output: Tensor  # (n, L) bool: a generated token; subset of real
    sequence: Tensor  # (n,) int64: which sequence the token belongs to

    def rows(self, start: int, stop: int) -> Tokens:
        """Views of some of the tokens."""
        return Tokens(*(getattr(self, f.name)[start:stop] for f in fields(self)))


class DistributionScores(NamedTuple):
    """Per token, (n,)."""

    logprobs: Tensor  # fp64: what the engine would report for the target
    outside: Tensor  # bool: the truncation cuts the target off; it was added to the kept set, to keep the log finite


def huber(delta: Tensor) -> Tensor:
    """Δ²/2 up to 1 nat, |Δ| - 1/2 beyond, at most 30 (also for non-finite Δ); elementwise, fp64."""
    d = delta.double().abs().nan_to_num(nan=torch.inf).clamp(max=_HUBER_CAP + 0.5)
    return torch.where(d <= 1.0, 0.5 * d * d, d - 0.5)


def improves(before: Tensor, after: Tensor) -> bool:
    """Whether per-token Hubers (n,) fall by ``MIN_GAIN`` of their sum, not counting the 1 % that gain most (>= 1)."""
    rest = (after - before).argsort()[max(1, len(before) // 100) :]
    return bool(after[rest].sum() <= (1.0 - MIN_GAIN) * before[rest].sum() - 1e-9 * len(rest))


def log_probs(tokens: Tokens, distribution: Distribution) -> DistributionScores:
    """What the engine would report for the targets under ``distribution``; -inf for a banned target.

    A target outside the truncated support is added to it, as ``replay`` does.
    """
    values, outside = [], []
    for part in chunks(tokens):
        scaled, support = supported(part, distribution)
        z = _modelled(part, distribution) if distribution.report.startswith("raw") else scaled
        value = target_values(z, part).double()
        if distribution.report == PROCESSED:
            value = value - support.log_sum
        elif distribution.report == "raw_logprobs":
            value = value - logsumexp(z)
        values.append(value)
        outside.append(support.outside)
    return DistributionScores(torch.cat(values), torch.cat(outside))


# --- scoring ---------------------------------------------------------------------------------------------------------


class Support(NamedTuple):
    """Per row, (r,): the tokens at most ``limit`` nats below the most likely one survive, and the target."""

    top: Tensor  # fp32, the largest scaled logit
    limit: Tensor  # fp32, inf: nothing is cut off
    log_sum: Tensor  # fp64, log Σ e^scaled of the survivors
    outside: Tensor  # bool


def chunks(tokens: Tokens) -> Iterator[Tokens]:
    n, vocab = tokens.logits.shape
    step = max(1, _CHUNK // vocab)
    return (tokens.rows(start, start + step) for start in range(0, n, step))


def target_values(values: Tensor, tokens: Tokens) -> Tensor:
    return values.gather(-1, tokens.targets.unsqueeze(-1)).squeeze(-1)


def logsumexp(values: Tensor) -> Tensor:
    """Over rows, fp64: off by 1e-7 relative to the sum, not to the logits."""
    top = values.amax(-1, keepdim=True)
    return (values - top).exp_().sum(-1).double().log() + top.squeeze(-1).double()


def curved(z: Tensor, curvature: float) -> Tensor:
    """Logits z under a soft cap c = 1 / ``curvature``, c tanh(z / c); with one of -c taken off, c atanh(z / c).

    What a soft cap can't have let through is taken as just inside it.
    """
    if curvature == 0.0:
        return z
    x = z * abs(curvature)
    x = x.tanh() if curvature > 0 else x.clamp(-1.0 + 1e-6, 1.0 - 1e-6).atanh()
    return torch.where(torch.isinf(z), z, x / abs(curvature))


def _modelled(tokens: Tokens, distribution: Distribution) -> Tensor:
    z = tokens.logits
    if distribution.logits_dtype is not None:
        z = z.to(distribution.logits_dtype).to(z.dtype)
    return curved(z, distribution.curvature)


def biased(tokens: Tokens, distribution: Distribution) -> Tensor:
    """A copy of the logits, rounded and capped, with bias and bans."""
    z = _modelled(tokens, distribution).clone()
    if distribution.allowed is not None:
        banned = torch.ones(z.shape[-1], dtype=torch.bool, device=z.device)
        banned[sorted(distribution.allowed)] = False
        z.masked_fill_(banned, -torch.inf)
    if distribution.bias:
        ids, values = zip(*distribution.bias, strict=True)
        z[:, list(ids)] += torch.tensor(values, dtype=z.dtype, device=z.device)
    if distribution.late:
        early = (tokens.output.sum(-1) < distribution.late_from).nonzero()
        z[early, torch.tensor(distribution.late, device=z.device)] = -torch.inf
    return z


def seen_tokens(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct context tokens of all rows, (M,) each, by row: the row, the id, how often it was generated."""
    vocab = tokens.logits.shape[-1]
    key = torch.arange(len(tokens.context), device=tokens.context.device).unsqueeze(-1) * vocab + tokens.context
    distinct, inverse = key[tokens.real].unique(return_inverse=True)
    counts = tokens.logits.new_zeros(len(distinct))
    counts.scatter_add_(0, inverse, tokens.output[tokens.real].to(counts.dtype))
    return distinct // vocab, distinct % vocab, counts


def scaled_logits(tokens: Tokens, distribution: Distribution) -> Tensor:
    """Logits (n, V) after bias, penalties and temperature, before truncation. A copy."""
    z = biased(tokens, distribution)
    if distribution.sampling.penalizes:
        row, token, counts = seen_tokens(tokens)
        z[row, token] = penalize(z[row, token], torch.ones_like(row, dtype=torch.bool), counts, distribution.sampling)
    return z.div_(distribution.sampling.temperature)


def ascending(values: Tensor) -> Tensor:
    """Rows sorted. numpy's vectorized sort takes a twentieth of torch's time on a CPU."""
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort(-1).values


def supported(tokens: Tokens, distribution: Distribution) -> tuple[Tensor, Support]:
    """Scaled logits of a chunk, and what of them survives."""
    scaled = scaled_logits(tokens, distribution)
    if not distribution.sampling.truncates:
        whole = torch.full_like(scaled[:, 0], torch.inf)
        return scaled, Support(scaled.amax(-1), whole, logsumexp(scaled), torch.zeros_like(whole, dtype=torch.bool))
    top = scaled.amax(-1, keepdim=True)
    gaps = ascending(top - scaled)
    mass = gaps.neg().exp_().cumsum(-1, dtype=torch.float64)
    last = cut(gaps, mass, settings_of(distribution.sampling, gaps)) - 1
    limit, kept = gaps.gather(-1, last).squeeze(-1), mass.gather(-1, last).squeeze(-1)
    top = top.squeeze(-1)
    gap = top - target_values(scaled, tokens)
    outside = gap > limit
    log_sum = (kept + outside * gap.double().neg().exp()).log() + top.double()
    return scaled, Support(top, limit, log_sum, outside)


class Sketch(NamedTuple):
    """A distribution in a few thousand numbers a row: the likeliest tokens singly, others in groups of neighbours."""

    gaps: Tensor  # (n, K) fp64 ascending, nats below the most likely token; of a group: of its mean probability
    size: int  # tokens in a group
    target: Tensor  # (n,) fp64, the target's gap
    top: Tensor  # (n,) fp64, the scaled logit of the most likely token

    def mass(self, tau: float = 1.0) -> Tensor:
        """Cumulative Σ e^(-gap/τ), (n, K)."""
        weight = self.gaps.div(-tau).exp_()
        weight[:, HEAD:] *= self.size
        return weight.cumsum_(-1)

    def position(self, top_k: Tensor) -> Tensor:
        """top_k in tokens → in columns."""
        return torch.where(top_k > HEAD, HEAD + ((top_k - HEAD) / self.size).ceil(), top_k)

    def scores(self, settings: Sequence[Tensor], mass: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets under G settings and which are cut off (then added), (n, G) each."""
        gaps = self.gaps if tau == 1.0 else self.gaps / tau
        last = cut(gaps, mass, [self.position(settings[0]), *settings[1:]]) - 1
        target = (self.target / tau).unsqueeze(-1)
        outside = target > gaps.gather(-1, last) + 1e-9
        return -target - (mass.gather(-1, last) + outside * target.neg().exp()).log(), outside


def sketch_of(tokens: Tokens, distribution: Distribution) -> Sketch:
    """Group values are exact at τ = 1 and off by (var of the group's logits) |1/τ - 1| / 2τ elsewhere."""
    vocab = tokens.logits.shape[-1]
    size = max(1, math.ceil((vocab - HEAD) / _GROUPS))
    parts, targets, tops = [], [], []
    for part in chunks(tokens):
        scaled = scaled_logits(part, distribution)
        top = scaled.amax(-1, keepdim=True)
        gaps = top - scaled
        tops.append(top.squeeze(-1).double())
        targets.append(target_values(gaps, part).double())
        gaps = ascending(gaps)
        if size > 1:
            tail = torch.nn.functional.pad(gaps[:, HEAD:], (0, -(vocab - HEAD) % size), value=torch.inf)
            tail = tail.unflatten(-1, (-1, size))
            first = tail[..., :1]
            mean = first.squeeze(-1) - (first - tail).exp_().mean(-1).log_()
            gaps = torch.cat([gaps[:, :HEAD], mean.nan_to_num_(nan=torch.inf)], -1)
        parts.append(gaps.double())
    return Sketch(torch.cat(parts), size, torch.cat(targets), torch.cat(tops))


# --- in words --------------------------------------------------------------------------------------------------------

_FORMATS = {
    "temperature": " {:.3g}",
    "top_p": " {:.2f}",
    "top_k": " {:d}",
    "min_p": " {:.3g}",
    "repetition_penalty": " {:.2f}",
    "presence_penalty": " {:.2f}",
    "frequency_penalty": " {:.2f}",
}

_REPORTS = {
    "processed_logprobs": "log-probs of the law sampled from",
    "raw_logprobs": "raw log-probs (T = 1, unprocessed)",
    "processed_logits": "processed logits, not log-probs",
    "raw_logits": "raw logits, not log-probs",
}


def describe(distribution: Distribution, base: Distribution, *, ids: bool = True) -> str:
    """What of ``distribution`` is not as in ``base``, in words and numbers; empty: nothing. Not ``ids``: no ids."""
    words, none = [], SamplingSettings()
    for name, form in _FORMATS.items():
        value, configured = getattr(distribution.sampling, name), getattr(base.sampling, name)
        if value != configured:
            new = f"no {name}" if value == getattr(none, name) and name != "temperature" else name + form.format(value)
            was = configured != getattr(none, name) or name == "temperature"
            words.append(new + f" (configured{form.format(configured)})" * was)
    before = dict(base.bias)
    changed = {i: b - before.get(i, 0.0) for i, b in distribution.bias if b != before.get(i, 0.0)}
    words += [f"bias {b:+.2f} on " + (f"token {i}" if ids else "a token") for i, b in changed.items() if b > -math.inf]
    if banned := [str(i) for i, b in changed.items() if b == -math.inf]:
        which = f"token{'s' * (len(banned) > 1)} {', '.join(banned)}" if ids else f"{len(banned)} token id(s)"
        words.append(f"{which} never drawn")
    if distribution.allowed is not None and distribution.allowed != base.allowed:
        words.append(f"only {len(distribution.allowed)} token id{'s' * (len(distribution.allowed) > 1)} allowed")
    if distribution.late_from != base.late_from:
        which = f"token{'s' * (len(distribution.late) > 1)} {', '.join(map(str, distribution.late))}"
        count = f"{len(distribution.late)} token id(s)"
        words.append(f"{which if ids else count} never among the first {distribution.late_from}")
    if distribution.logits_dtype is not None and distribution.logits_dtype != base.logits_dtype:
        words.append(f"logits rounded to {dtype_name(distribution.logits_dtype)}")
    if distribution.curvature != base.curvature:
        cap = f"a soft cap of {1 / abs(distribution.curvature - base.curvature):.3g} on the logits"
        words.append(cap if distribution.curvature > base.curvature else f"without {cap}")
    if distribution.report != base.report:
        words.append(_REPORTS[distribution.report])
    return ", ".join(words)


def distribution_details(distribution: Distribution) -> dict[str, Any]:
    """The distribution as JSON; a ban is ``"-inf"``."""
    return {name: getattr(distribution.sampling, name) for name in _FORMATS} | {
        "bias": [[i, b if math.isfinite(b) else str(b)] for i, b in distribution.bias],
        "late": [*distribution.late] and {"ids": [*distribution.late], "from": distribution.late_from},
        "allowed": None if distribution.allowed is None else sorted(distribution.allowed),
        "report": distribution.report,
        "logits_dtype": None if distribution.logits_dtype is None else dtype_name(distribution.logits_dtype),
        "curvature": distribution.curvature,
    }
