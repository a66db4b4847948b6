"""Probes that ask the engine again: from what was sampled, over its own re-score, to the trainer.

Sampled is not re-scored: sampler, cache, decode path or weight version. Re-scored is not the trainer: weights,
precision, or model. Requests of ours draw from generators of their own, and what they cache lies under a name that no
request of the run reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...engine.base import Capability, Engine, in_process
from ...records import SamplingSettings
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..distribution import PROCESSED, Distribution, huber
from ..findings import AskedAgain, EnginePrompts, EngineWeights, Findings, Prefill, Rescored
from .base import Candidate, NotPossible, Probe, probe, recomputed, require_engine

__all__ = ["RESCORE", "prefill_of", "sampling_alone"]

_TOKENS = 96  # asked for again, one request each

_SEQUENCES = 4  # scored by prefill at temperature 1

_SAME = 0.05  # a true scale of the logits left up to 0.045 of the drift (or 3 floors), a soft cap read as one 0.11

_REPRODUCED = 0.3  # asked again, the engine gives its number back: up to this share of the drift

_STEP = 3.0  # a change within sequences: this much more drift on one side of it

_SIDE = 0.15  # and at least this share of the tokens on either side


def _askable(batch: DiagnosedBatch) -> Engine:
    require_engine(batch)
    if batch.engine is None:
        raise NotPossible("no engine to ask: the server does not answer /server_info, or another rank talks to it")
    if Capability.RESCORE not in batch.engine.capabilities:
        raise NotPossible("with tensor parallelism or sleep mode one rank can't ask the engine alone")
    return batch.engine


def _asked_again(batch: DiagnosedBatch, current: Counterfactual, findings: Findings) -> AskedAgain:
    """The engine's numbers for some of the tokens, asked for now where they were not before."""
    engine = _askable(batch)
    return findings.asked_again or _ask_again(batch, current, engine, findings.engine_prompts)


def _ask_again(
    batch: DiagnosedBatch, current: Counterfactual, engine: Engine, prompts: EnginePrompts | None
) -> AskedAgain:
    """One by one at the trainer's temperature."""
    usable = (current.kept & torch.isfinite(current.reported)).nonzero().squeeze(-1)
    picked = usable[torch.linspace(0, len(usable) - 1, min(_TOKENS, len(usable))).long().unique()]
    contexts, targets, kept = [], [], []
    for n in picked.tolist():
        at, t = int(batch.rows[batch.row[n]]), int(batch.column[n])
        ids = batch.prompt(at, prompts) + batch.rollout.completion_ids[at, :t].tolist()
        if len(ids) < engine.max_model_len:
            contexts.append(ids)
            targets.append(int(batch.targets[n]))
            kept.append(n)
    if not kept:
        raise NotPossible("no context fits the engine's max_model_len")
    cached, read = None, torch.zeros(1)
    if engine.caches_prefixes:  # first, while the cache is as the run left it
        cached, read = engine.next_token(contexts, targets, batch.temperature, cached=True)
    anew, _ = engine.next_token(contexts, targets, batch.temperature, cached=False)
    return AskedAgain(
        picked=torch.tensor(kept),
        anew=anew.double(),
        cached=None if cached is None else cached.double(),
        tokens_read=int(read.sum()),
    )


def _size(delta: torch.Tensor) -> float:
    return float(huber(delta[torch.isfinite(delta)]).mean()) if len(delta) else 0.0


def _answered(
    batch: DiagnosedBatch, current: Counterfactual, again: AskedAgain, finding: str, cause: str = ""
) -> Candidate:
    """As if the engine had said what it says now."""
    base = recomputed(current)
    reported, over = base.reported.clone(), torch.zeros(len(batch), dtype=torch.bool)
    reported[again.picked], over[again.picked] = again.anew, True
    return Candidate(
        counterfactual=replace(base, distribution=batch.plain, reported=reported, kept=over),
        over=over,
        cause=cause,
        finding=finding,
    )


def _reproduced(
    batch: DiagnosedBatch, current: Counterfactual, again: AskedAgain, answers: torch.Tensor
) -> tuple[bool, str]:
    """Whether the engine gives its number back, and by how much it misses."""
    sampled = current.reported[again.picked]
    drift = _size(batch.log_probs(current)[again.picked] - sampled)
    gap = answers - sampled
    return _size(gap) <= _REPRODUCED * drift, f"mean |gap| {float(gap[torch.isfinite(gap)].abs().mean()):.3g} nats"


def prefix_cache(
    batch: DiagnosedBatch, current: Counterfactual, findings: Findings
) -> tuple[Candidate | None, Findings]:
    """One-token requests, reading the prefix cache and not."""
    again = _asked_again(batch, current, findings)
    found = Findings(asked_again=again)
    if again.cached is None:
        raise NotPossible("the engine keeps no prefix cache", found)
    if not again.tokens_read:
        return None, found
    same, gap = _reproduced(batch, current, again, again.cached)
    if not same:
        return None, found
    apart = (again.cached - again.anew).abs()
    words = (
        f"read from the cache ({again.tokens_read:,} tokens), the engine's numbers differ from those computed anew by "
        f"{float(apart.mean()):.3g} nats on average; those sampled differ from the cached ones: {gap}"
    )
    return _answered(batch, current, again, words), found


def within_sequences(
    batch: DiagnosedBatch, current: Counterfactual, findings: Findings
) -> tuple[Candidate | None, Findings]:
    """Whether the engine, asked again, still says what it said; if not, where in the sequences it changed."""
    again = _asked_again(batch, current, findings)
    found = Findings(asked_again=again)
    same, gap = _reproduced(batch, current, again, again.as_sampled)
    if same:
        return None, found
    cause, why = _what_changed(batch, current)
    words = f"asked again, the engine does not give back what it reported: {gap}; {why}"
    return _answered(batch, current, again, words, cause), found


def _what_changed(batch: DiagnosedBatch, current: Counterfactual) -> tuple[str, str]:
    """Why an engine may not give back what it said: the cause, and what speaks for it."""
    if told := batch.rollout.sampling.unreplayed:
        return (
            "constrained_decoding",
            f"the requests set {', '.join(told)}, which was left out when asking again",
        )
    if not batch.has_answers and (turn := _turn_of_change(batch, current)) is not None:  # else it would be known
        return (
            "token_misalignment",
            f"the drift begins with turn {turn + 1}: what the engine was given before it are other ids than here",
        )
    at, (before, after) = _change(batch, current)
    if at is not None:
        return (
            "in_flight_update",
            f"the drift changes at completion token {at}: {before:.3g} before, {after:.3g} after (Huber)",
        )
    return "engine_numerics", "it does not change at one point of the sequences"


def _turn_of_change(batch: DiagnosedBatch, current: Counterfactual) -> int | None:
    """The turn from which on there is drift, when the ones before have little and it does not grow within turns."""
    delta = (batch.log_probs(current) - current.reported).nan_to_num(0.0)
    size = huber(delta)
    for turn in range(1, int(batch.turn.max()) + 1):
        before, after = (size[current.kept & side] for side in (batch.turn < turn, batch.turn >= turn))
        if min(len(before), len(after)) < _SIDE * int(current.kept.sum()):
            continue
        if (
            after.mean() > _STEP * before.mean()
            and _size(delta[current.kept & (batch.turn < turn)]) <= 3 * batch.floor
        ):
            return turn
    return None


def _change(batch: DiagnosedBatch, current: Counterfactual) -> tuple[int | None, tuple[float, float]]:
    """The completion position at which the drift steps up or down, if it does."""
    delta = (batch.log_probs(current) - current.reported)[current.kept]
    column = batch.column[current.kept]
    good = torch.isfinite(delta)
    size, column = huber(delta[good]).double(), column[good]
    width = int(column.max()) + 1 if len(column) else 0
    counts = torch.zeros(width, dtype=torch.float64).scatter_add(0, column, torch.ones_like(size))
    sums = torch.zeros(width, dtype=torch.float64).scatter_add(0, column, size)
    best: tuple[float, int, float, float] | None = None
    for at in range(2, width - 1):
        left, right = counts[:at].sum(), counts[at:].sum()
        if min(left, right) < _SIDE * counts.sum():
            continue
        before, after = float(sums[:at].sum() / left), float(sums[at:].sum() / right)
        between = float(left * right / (left + right)) * (before - after) ** 2
        if best is None or between > best[0]:
            best = between, at, before, after
    if best is None:
        return None, (0.0, 0.0)
    _, at, before, after = best
    high, low = max(before, after), min(before, after)
    return (at if high > _STEP * low else None), (before, after)


def prefill_of(batch: DiagnosedBatch, findings: Findings) -> Prefill:
    """The engine's own scores of a few sequences, asked for now where they were not before."""
    engine = _askable(batch)
    return findings.prefill or _ask_prefill(batch, engine, findings.engine_prompts)


def _ask_prefill(batch: DiagnosedBatch, engine: Engine, prompts: EnginePrompts | None) -> Prefill:
    sequences, tokens, starts = [], [], []
    for i, at in enumerate(batch.rows[:_SEQUENCES].tolist()):
        mine = (batch.row == i).nonzero().squeeze(-1)
        prompt = batch.prompt(at, prompts)
        if len(mine):
            ids = prompt + batch.rollout.completion_ids[at, : int(batch.column[mine].max()) + 1].tolist()
            if len(ids) < engine.max_model_len:
                sequences.append(ids)
                tokens.append(mine)
                starts.append(len(prompt) - 1)
    if not sequences:
        raise NotPossible("no sequence fits the engine's max_model_len")
    scores = [
        x.double()[start + batch.column[mine]]
        for x, start, mine in zip(engine.rescore(sequences), starts, tokens, strict=True)
    ]
    return Prefill(picked=torch.cat(tokens), logprobs=torch.cat(scores))


def _prefill_drift(
    batch: DiagnosedBatch, current: Counterfactual, distribution: Distribution, known: Prefill
) -> torch.Tensor:
    """Δ (M,) of the trainer against the engine's prefill, both at T = 1: without what is done to sample.

    ``distribution``: what of it a model itself may do (scale, bias, rounding) is taken over.
    """
    scale = distribution.sampling.temperature / batch.temperature
    at_one = replace(distribution, sampling=SamplingSettings(temperature=scale), report=PROCESSED)
    ours = batch.log_probs(replace(recomputed(current), distribution=at_one))
    return ours[known.picked] - known.logprobs


def sampling_alone(
    batch: DiagnosedBatch,
    current: Counterfactual,
    distribution: Distribution,
    known: Prefill,
    weights: EngineWeights | None,
) -> bool:
    """Whether a fitted distribution can be what the engine does to its logits, in its sampler or at its model's end.

    In the sampler: then at T = 1, by prefill, the two models agree, or differ by a third at most of what they do when
    sampled. In the model: then what they differ by there is this one, to the last twentieth; of a model that computes
    something else it is only a likeness. Where the engine's weights are known to be others, these may leave a third.
    """
    base = recomputed(current)
    delta = batch.log_probs(base) - base.reported
    good = base.kept & torch.isfinite(delta)
    plain = _size(_prefill_drift(batch, current, batch.plain, known))
    flatter = min(1.0, batch.temperature) ** 2  # drift in logits shows less at T = 1 than at a lower temperature
    if plain <= max(3.0 * batch.floor, flatter * _size(delta[good]) / 3.0):
        return True
    share = 1.0 / 3.0 if _others(weights) else _SAME
    return _size(_prefill_drift(batch, current, distribution, known)) <= max(3.0 * batch.floor, share * plain)


def _others(weights: EngineWeights | None) -> bool:
    """Whether the engine's weights were read, and are not the trainer's."""
    return weights is not None and bool(weights.values)


def prefill(batch: DiagnosedBatch, current: Counterfactual, findings: Findings) -> tuple[Candidate | None, Findings]:
    """The engine's own scores of the same tokens in place of the trainer's: what is left is not the model's."""
    engine, again = _askable(batch), findings.asked_again
    assert again is not None
    same, gap = _reproduced(batch, current, again, again.anew)
    known = prefill_of(batch, findings)
    delta = _prefill_drift(batch, current, batch.plain, known)
    found = Findings(prefill=known, rescored=Rescored(drift=_size(delta), reproduced=same))
    if not same or _size(delta) <= 3 * batch.floor or _others(findings.engine_weights):
        return None, found
    base = recomputed(current)
    theirs, over = base.reported.clone(), torch.zeros(len(batch), dtype=torch.bool)
    ours = batch.log_probs(base)
    theirs[again.picked] = ours[again.picked] - (again.anew - base.reported[again.picked])
    over[again.picked] = True
    drift = float((base.reported - ours).nan_to_num(0.0).abs().mean())
    cause, why = _another_model(engine, findings, drift, batch.began_healthy)
    words = (
        f"at temperature 1, by prefill alone, engine and trainer differ by {float(delta.abs().mean()):.3g} nats on "
        f"average; asked again, the engine misses what it reported by {gap}; {why}"
    )
    candidate = Candidate(
        counterfactual=replace(base, reported=theirs, kept=over), cause=cause, over=over, finding=words
    )
    return candidate, found


def _another_model(engine: Engine, findings: Findings, drift: float, began_healthy: bool | None) -> tuple[str, str]:
    """Why an engine's own model may differ where its sampler does not: the cause, and what speaks for it."""
    weights = findings.engine_weights
    if weights is not None and weights.unheard:
        return "partial_sync", f"its load_weights takes no notice of {', '.join(weights.unheard[:8])}"
    if (quantization := engine.settings()["quantization"]) is not None:
        return "kv_cache_precision", f"the engine is quantized ({quantization})"
    if 3 * (findings.cache_moved or 0.0) > drift:
        return (
            "kv_cache_precision",
            "a cache as coarse as the engine's moves the trainer as much as it drifts",
        )
    alike = weights is not None and not weights.differing
    if alike:
        parameters = "its parameters are the trainer's"
    elif in_process(engine):
        parameters = "its parameters were not read" if weights is None else "its parameters could not all be read"
    else:
        parameters = "a server's parameters can't be read"
    if began_healthy:
        return "stale_weights", f"{parameters}, and the run began healthy: it serves an older copy of them"
    if alike:
        return "model_definition", f"{parameters}: it computes another function of them"
    return "model_definition", f"{parameters}: other ones, or another function of them"


RESCORE: tuple[Probe, ...] = (
    probe("prefix cache", "stale_prefix_cache", "engine", prefix_cache,
          "keys and values of older weights are read from the prefix cache",
          "computed anew, the engine agrees with the trainer, and from the cache with what it sampled",
          uses=("engine_prompts", "asked_again"), gives=("asked_again",)),
    probe("asked again", "engine_numerics", "last", within_sequences,
          "the engine disagrees with itself, or its weights changed on the way",
          "asked again, it agrees with the trainer and not with what it sampled",
          uses=("engine_prompts", "asked_again"), gives=("asked_again",)),
    probe("engine's prefill", "model_definition", "last", prefill,
          "on the same weights the engine computes another function",
          "its own prefill, not the trainer, agrees with what it sampled",
          needs=("asked_again",), uses=("engine_prompts", "engine_weights", "cache_moved", "prefill"),
          gives=("prefill", "rescored")),
)  # fmt: skip
