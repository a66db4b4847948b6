"""vLLM's sampling semantics replayed on the trainer's logits: what the engine cut off or penalized, measured.

vLLM's order (0.22 to 0.31, V1 sampler): repetition, frequency, presence penalties; temperature; min-p; top-k; top-p.
The log-prob vLLM reports as processed is the renormalized one over what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..records import SamplingSettings

__all__ = [
    "ReplayScores",
    "candidates",
    "cut",
    "kept_mask",
    "penalize",
    "replay",
    "replay_top",
    "settings_of",
    "turns",
]

# How many of the most likely tokens are looked at, first and where these are too few: sorting a whole vocabulary costs
# as much as many heads, and what a policy in RL samples from is seldom more than a few dozen.
_FEW, _MANY = 64, 1024


class ReplayScores(NamedTuple):
    """Per token, (N,) fp32 and bool."""

    logprobs: torch.Tensor  # log-prob of the target under the processed (penalized, truncated, renormalized) law
    entropy: torch.Tensor  # of that law, nats
    log_kept: torch.Tensor  # log probability of the kept set under the untruncated law; <= 0
    out_of_support: torch.Tensor  # the target is outside the kept set: it was added to it, to keep the log finite


def turns(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a (B, C) mask of engine tokens: which run of them a token is in, and where in that run; (B, C) from 0.

    A run is what one request sampled; everything before it was that request's prompt.
    """
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    start = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    began = torch.where(start, column, 0).cummax(-1).values
    return (start.long().cumsum(-1) - 1).clamp(min=0), column - began


def penalize(
    logits: torch.Tensor, seen: torch.Tensor, output_counts: torch.Tensor, settings: SamplingSettings
) -> torch.Tensor:
    """Logits after vLLM's penalties. ``seen`` (N, V) bool: in prompt or output so far; ``output_counts`` (N, V): how
    often in the output, which is what the request at hand has sampled: turns before it are its prompt."""
    if settings.repetition_penalty != 1.0:
        r = settings.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
    if settings.frequency_penalty != 0.0:
        logits = logits - settings.frequency_penalty * output_counts
    if settings.presence_penalty != 0.0:
        logits = logits - settings.presence_penalty * (output_counts > 0)
    return logits


def kept_mask(scaled: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Which tokens survive min-p, top-k and top-p, (N, V) bool. ``scaled``: logits after penalties and temperature.

    min-p: p >= min_p · max p. top-k: logits >= the k-th largest (ties stay). top-p: of the survivors' renormalized
    law, drop the least likely tokens while their cumulative probability is <= 1 - top_p; the most likely one stays.
    """
    vocab = scaled.shape[-1]
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if settings.min_p > 0.0:
        probs = scaled.softmax(-1)
        kept &= probs >= settings.min_p * probs.amax(-1, keepdim=True)
    if 0 < settings.top_k < vocab:
        survivors = scaled.masked_fill(~kept, -torch.inf)
        kept &= survivors >= survivors.topk(settings.top_k, dim=-1).values[:, -1:]
    if settings.top_p < 1.0:
        ordered, index = scaled.masked_fill(~kept, -torch.inf).sort(-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1.0 - settings.top_p
        drop[:, -1] = False
        kept &= ~torch.zeros_like(kept).scatter_(-1, index, drop)
    return kept


def settings_of(sampling: SamplingSettings, like: torch.Tensor) -> list[torch.Tensor]:
    """top_k, top_p, min_p for ``cut``, (1,) each."""
    # filled there: a tensor of Python numbers would wait for an accelerator
    values = (sampling.top_k, sampling.top_p, sampling.min_p)
    return [torch.full((1,), x, dtype=torch.float64, device=like.device) for x in values]


def cut(gaps: torch.Tensor, mass: torch.Tensor, settings: Sequence[torch.Tensor]) -> torch.Tensor:
    """How many of a row's tokens survive each of G ``settings`` (top_k, top_p, min_p): (r, G), always a prefix.

    ``gaps`` (r, K) ascending: nats below the most likely token. ``mass`` (r, K) fp64: Σ e^-gap up to there.
    See ``kept_mask``; of tied tokens at the edge of top-p, as many as it keeps.
    """
    (top_k, top_p, min_p), width = settings, gaps.shape[-1]
    position = torch.where(top_k > 0, top_k, width).long().clamp(max=width) - 1
    limit = torch.minimum(gaps[:, position], -min_p.log().to(gaps.dtype))
    count = torch.searchsorted(gaps, limit, right=True)
    nucleus = 1 + torch.searchsorted(mass, top_p * mass.gather(-1, count - 1))
    return torch.where(top_p < 1.0, torch.minimum(count, nucleus), count)


def replay(
    logits: torch.Tensor,
    targets: torch.Tensor,
    settings: SamplingSettings,
    temperature: float,
    seen: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
) -> ReplayScores:
    """Score targets under the processed law: log softmax over the kept set.

    ``logits`` (N, V) fp32 before temperature; ``targets`` (N,); ``seen`` and ``output_counts`` (N, V) are needed when
    ``settings.penalizes``. ``temperature`` is the trainer's: an engine at another temperature stays visible as drift.
    """
    if settings.penalizes:
        if seen is None or output_counts is None:
            raise ValueError("settings has penalties but the tokens seen so far were not given; pass both tensors.")
        logits = penalize(logits, seen, output_counts, settings)
    scaled = logits / temperature
    target = targets.unsqueeze(-1)
    kept = kept_mask(scaled, settings)
    outside = ~kept.gather(-1, target).squeeze(-1)
    kept.scatter_(-1, target, True)
    survivors = scaled.masked_fill(~kept, -torch.inf)
    log_kept_sum = survivors.logsumexp(-1)
    log_kept = (log_kept_sum - scaled.logsumexp(-1)).clamp(max=0.0)
    law = survivors - log_kept_sum.unsqueeze(-1)
    entropy = -(law.exp() * law).nansum(-1)  # 0 * -inf where cut off
    return ReplayScores(scaled.gather(-1, target).squeeze(-1) - log_kept_sum, entropy, log_kept, outside)


def candidates(settings: SamplingSettings, vocab: int) -> tuple[int, ...]:
    """How many of the most likely tokens ``replay_top`` should be given, and if these are too few, next."""
    if settings.penalizes:
        return ()
    wanted = (settings.top_k + 1,) if 0 < settings.top_k < vocab else (_FEW, _MANY)  # what top-k keeps is enough
    return tuple(sorted({min(max(_FEW, n), vocab) for n in wanted if n <= _MANY}))


def replay_top(
    top: torch.Tensor, logprobs: torch.Tensor, settings: SamplingSettings, vocab: int
) -> tuple[ReplayScores, torch.Tensor]:
    """``replay`` from the M most likely tokens alone, and for which targets that is the whole truth, (N,) bool.

    ``top`` (N, M) fp32: their log-probs after temperature, before truncation, descending. ``logprobs`` (N,): the
    targets', by the same arithmetic. It is the truth where the kept set ends within the M, and not between equals,
    which vLLM parts by their place in its sort.
    """
    top, target = top.double(), logprobs.double()
    most, best = top.shape[1], top[:, :1]
    gaps = (best - top).nan_to_num_(nan=math.inf, posinf=math.inf)
    gaps[:, 0] = 0.0  # of NaNs, too: there is always one token left
    weight = gaps.neg().exp()
    mass, spread = weight.cumsum(-1), torch.special.entr(weight).cumsum(-1)
    if most < vocab:  # the others together, as one more that nothing is less likely than: top-p takes shares of all
        gaps = torch.cat([gaps, torch.full_like(best, math.inf)], 1)
        mass, spread = torch.cat([mass, best.neg().exp()], 1), torch.cat([spread, spread[:, -1:]], 1)
    top_k, top_p, min_p = settings_of(settings, gaps)
    count = cut(gaps, mass, (top_k, top_p, min_p))
    last = count - 1
    limit = gaps.gather(-1, last)
    known = count < most if most < vocab else torch.ones_like(count, dtype=torch.bool)
    if most < vocab and (settings.min_p > 0.0 or 0 < settings.top_k < vocab):  # all that top-p chose from is here, too
        known &= cut(gaps, mass, (top_k, torch.ones_like(top_p), min_p)) < most
    known &= (count == gaps.shape[-1]) | (gaps.gather(-1, count.clamp(max=gaps.shape[-1] - 1)) > limit)
    gap = best - target[:, None]
    outside = gap > limit
    added = torch.where(outside, gap.neg().exp(), 0.0)
    total = mass.gather(-1, last) + added
    log_kept = total.log() + best
    entropy = total.log() + (spread.gather(-1, last) + torch.special.entr(added)) / total
    scores = [x[:, 0].float() for x in (target[:, None] - log_kept, entropy, log_kept.clamp(max=0.0))]
    return ReplayScores(scores[0], scores[1], scores[2], outside[:, 0]), known[:, 0]
