"""What the engine's numbers mean, asked of the engine alone: no reference is needed, so no drift gets in the way.

Prompt log-probs are the model's own law whatever a request sets. From them follows what any request should report
(``trl_parity.scoring.sampling``) and what it should sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...engine.offline import BenchEngine
from ...records import SamplingSettings
from ...report.format import number
from ...scoring.sampling import kept_mask, penalize
from .rows import Limits, Row, RowVerdict
from .statistics import (
    SCALES,
    fitted_scale,
    kolmogorov_smirnov,
    normalized,
    pit,
    scale_curve,
    surprisal,
    total_variation,
)

__all__ = ["expected_law", "meaning_row", "sampling_row"]

_CONTEXTS = 12

_SAMPLES = 2048

_SHORT = 1

_ALPHA = 1e-4  # a check asks once: one false alarm in ten thousand


def expected_law(
    own: torch.Tensor, settings: SamplingSettings, contexts: Sequence[Sequence[int]] | None = None
) -> torch.Tensor:
    """(n, V) log-probs a request with these settings samples from, given the model's law after each context.

    A repetition penalty needs logits, which a law is not: it must be 1. Nothing was sampled yet, so presence and
    frequency penalties touch nothing.
    """
    logits = normalized(own)
    if settings.repetition_penalty != 1.0:
        raise ValueError("a repetition penalty acts on logits; a law does not tell them")
    if settings.penalizes and contexts is not None:
        blank = torch.zeros_like(logits)
        logits = penalize(logits, blank.bool(), blank, settings)
    scaled = logits / settings.temperature
    return normalized(scaled.masked_fill(~kept_mask(scaled, settings), -torch.inf))


def own_laws(engine: BenchEngine, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
    """(n, V): the model's law after the whole of each context, by prefill."""
    laws = engine.prefill_laws([[*ids, ids[-1]] for ids in contexts])  # a last token, so that one follows each
    return torch.stack([law[-1] for law in laws])


def probe_settings(temperature: float) -> list[SamplingSettings]:
    """Requests whose reported law differs from the model's own, each in another way."""
    told = [temperature] if temperature not in (0.7, 1.0) else []
    out = [SamplingSettings(temperature=t) for t in (*told, 0.7, 1.0, 1.4)]
    return [
        *out,
        SamplingSettings(temperature=0.8, top_p=0.7),
        SamplingSettings(temperature=1.0, top_k=3),
        SamplingSettings(temperature=1.2, min_p=0.2),
    ]


def meaning_row(
    engine: BenchEngine, contexts: Sequence[Sequence[int]], temperature: float, floor: float, limits: Limits
) -> Row:
    """Whether a request's log-probs are those of the law it asks to sample from."""
    contexts = contexts[:_CONTEXTS]
    own = own_laws(engine, contexts)
    most = max(1e-4, math.sqrt(limits.k * floor / 2))  # Pinsker: TV <= sqrt(KL / 2)
    wrong, worst, words, asked = [], 0.0, [], probe_settings(temperature)
    for settings in asked:
        sampled = engine.sample(
            contexts, settings, max_tokens=1, seeds=range(len(contexts)), whole=True, ignore_eos=True
        )
        told = torch.cat([one.laws for one in sampled if one.laws is not None])
        meant = expected_law(own, settings)
        # a token on the edge of a truncated set may fall on either side of it: the median does not mind a few
        gap = float(total_variation(told, meant).nan_to_num(1.0).median())
        worst = max(worst, gap)
        # a tail that is cut off unasked is wrong however little was in it
        cut = not settings.truncates and bool((told == -torch.inf).any())
        if gap > most or cut:
            wrong.append(settings)
            words.append(f"{_asked(settings)}: off by {number(gap)}, {_guess(told, own, settings, most)}")
    evidence = "; ".join(words) if words else f"{len(asked)} kinds of requests on {len(contexts)} contexts"
    return Row(
        id="logprob_meaning", group="mechanisms", title="log-probs are those of the law sampled from",
        statistic="total variation, median of contexts", value=worst, limit=most, tokens=len(asked) * len(contexts),
        trials=len(contexts), verdict=RowVerdict.FAIL if wrong else RowVerdict.PASS, evidence=evidence,
        fix="logprobs_mode: processed_logprobs; and nothing between the request and the sampler that changes it"
        if wrong else "",
    )  # fmt: skip


def _asked(settings: SamplingSettings) -> str:
    plain = SamplingSettings()
    names = ("temperature", "top_k", "top_p", "min_p")
    told = {n: getattr(settings, n) for n in names if getattr(settings, n) != getattr(plain, n)}
    return ", ".join(f"{n} {v:g}" for n, v in told.items()) or "temperature 1"


def _guess(told: torch.Tensor, own: torch.Tensor, settings: SamplingSettings, most: float) -> str:
    """What the reported law is instead, if it is something that is known to happen."""
    if float(total_variation(told, own).median()) <= most:
        return "it is the law before temperature and truncation (raw_logprobs)"
    if not torch.allclose(told.double().exp().sum(-1), torch.ones(len(told)).double(), atol=1e-2):
        return "it is no law: its probabilities do not add up to 1"
    for other in (replace(settings, top_p=1.0), replace(settings, top_k=0), replace(settings, min_p=0.0)):
        if other != settings and float(total_variation(told, expected_law(own, other)).median()) <= most:
            return f"it is the law of {_asked(other)}"
    kept = torch.isfinite(told).sum(-1)
    if not settings.truncates and bool((kept < told.shape[1]).any()):
        return f"it is cut off: {int(kept.float().median())} of {told.shape[1]} tokens are left"
    curve = scale_curve(told, expected_law(own, settings).clamp(min=-100.0)).tolist()
    factor, share = fitted_scale(curve)
    if share > 0.9 and SCALES[0] < factor < SCALES[-1]:
        return f"it is the law at temperature {settings.temperature / factor:.3g}"
    return "it is none of the laws known"


def sampling_row(
    engine: BenchEngine, contexts: Sequence[Sequence[int]], temperature: float, seed: int, samples: int = _SAMPLES
) -> Row:
    """Whether sampled tokens are drawn from the law asked for: their surprisal, and their place in it."""
    contexts = [ids[:_SHORT] for ids in contexts[:_CONTEXTS]]  # thousands of requests: each is prefilled anew
    settings = SamplingSettings(temperature=temperature)
    laws = expected_law(own_laws(engine, contexts), settings)
    many = torch.arange(samples) % len(contexts)
    drawn = engine.sample(
        [contexts[i] for i in many.tolist()],
        settings,
        max_tokens=1,
        seeds=[seed * 1_000_003 + i for i in range(samples)],
    )
    tokens = torch.tensor([one.token_ids[0] for one in drawn])
    excess, variance = surprisal(laws, tokens, many)
    z = float(excess.sum() / variance.sum().sqrt()) if float(variance.sum()) > 0 else 0.0
    rng = random.Random(seed)
    place = pit(laws, tokens, many, torch.tensor([rng.random() for _ in range(samples)]))
    distance, p_place = kolmogorov_smirnov(place)
    p = min(1.0, 2.0 * min(p_place, math.erfc(abs(z) / math.sqrt(2.0))))  # of two tests
    fails = not p >= _ALPHA
    words = (
        f"{samples:,} tokens after {len(contexts)} contexts: surprisal {z:+.1f} standard errors from the law's "
        f"entropy, Kolmogorov distance {distance:.3f} of their places in the law"
    )
    if fails:
        words += "; " + (
            "likelier tokens than asked for: a lower temperature, or a truncation, that the request did not set"
            if z < 0 else "unlikelier tokens than asked for: a higher temperature than the request's"
        )  # fmt: skip
    return Row(
        id="sampling", group="mechanisms", title="tokens are drawn from the law asked for",
        statistic="p-value", value=p, limit=_ALPHA, at_least=True, tokens=samples, trials=len(contexts),
        verdict=RowVerdict.FAIL if fails else RowVerdict.PASS, evidence=words,
        fix="generation_config: vllm, and no default sampling settings on the engine's side" if fails else "",
    )  # fmt: skip
