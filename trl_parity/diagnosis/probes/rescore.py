"""Probes that ask the engine again: the ladder from what was sampled, over its own re-score, to the trainer.

Sampled is not re-scored: sampler, cache, decode path or weight version. Re-scored is not the trainer: weights,
precision, or model. Requests of ours draw from generators of their own, and what they cache lies under a name that no
request of the run reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...engine.base import Capability, Engine, in_process
from ...records import SamplingSettings
from ..counterfactual import Scene, World
from ..distribution import Law, huber
from .base import Candidate, NotPossible, Probe, probe, redone, require_engine

__all__ = ["LADDER"]

_TOKENS = 96  # asked for again, one request each

_SEQUENCES = 4  # scored by prefill at temperature 1

_SAME_LAW = 0.05  # a true scale of the logits left up to 0.045 of the drift (or 3 floors), a soft cap read as one 0.11

_REPRODUCED = 0.3  # asked again, the engine gives its number back: up to this share of the drift

_STEP = 3.0  # a change within sequences: this much more drift on one side of it

_SIDE = 0.15  # and at least this share of the tokens on either side


@dataclass(frozen=True, slots=True)
class _Again:
    picked: torch.Tensor  # (M,) of the scene's tokens
    anew: torch.Tensor  # (M,) asked again, every context computed anew
    cached: torch.Tensor | None  # (M,) asked again, reading the prefix cache; None: there is none
    tokens_read: int  # from the cache


def _askable(scene: Scene) -> Engine:
    require_engine(scene)
    if scene.engine is None:
        raise NotPossible("no engine to ask: the server does not answer /server_info, or another rank talks to it")
    if Capability.RESCORE not in scene.engine.capabilities:
        raise NotPossible("with tensor parallelism or sleep mode one rank can't ask the engine alone")
    return scene.engine


def _ask_again(scene: Scene, world: World) -> _Again:
    """The engine's numbers for some of the tokens, asked for one by one at the trainer's temperature."""
    engine = _askable(scene)
    if scene.again is None:
        usable = (world.kept & torch.isfinite(world.reported)).nonzero().squeeze(-1)
        picked = usable[torch.linspace(0, len(usable) - 1, min(_TOKENS, len(usable))).long().unique()]
        contexts, targets, kept = [], [], []
        for n in picked.tolist():
            at, t = int(scene.rows[scene.row[n]]), int(scene.column[n])
            ids = scene.prompt(at) + scene.rollout.completion_ids[at, :t].tolist()
            if len(ids) < engine.max_model_len:
                contexts.append(ids)
                targets.append(int(scene.targets[n]))
                kept.append(n)
        if not kept:
            raise NotPossible("no context fits the engine's max_model_len")
        cached, read = None, torch.zeros(1)
        if engine.caches_prefixes:  # first, while the cache is as the run left it
            cached, read = engine.next_token(contexts, targets, scene.temperature, cached=True)
        anew, _ = engine.next_token(contexts, targets, scene.temperature, cached=False)
        scene.again = _Again(
            torch.tensor(kept), anew.double(), None if cached is None else cached.double(), int(read.sum())
        )
    again: _Again = scene.again
    return again


def _size(delta: torch.Tensor) -> float:
    return float(huber(delta[torch.isfinite(delta)]).mean()) if len(delta) else 0.0


def _answered(scene: Scene, world: World, again: _Again) -> Candidate:
    """The world in which the engine had said what it says now."""
    base = redone(world)
    reported, over = base.reported.clone(), torch.zeros(len(scene), dtype=torch.bool)
    reported[again.picked], over[again.picked] = again.anew, True
    plain = Law(sampling=SamplingSettings(temperature=scene.temperature))
    return Candidate(world=replace(base, law=plain, reported=reported, kept=over), over=over, finding="")


def _reproduced(scene: Scene, world: World, again: _Again, answers: torch.Tensor) -> tuple[bool, str]:
    """Whether the engine gives its number back, and by how much it misses."""
    sampled = world.reported[again.picked]
    drift = _size(scene.log_probs(world)[again.picked] - sampled)
    gap = answers - sampled
    return _size(gap) <= _REPRODUCED * drift, f"mean |gap| {float(gap[torch.isfinite(gap)].abs().mean()):.3g} nats"


def prefix_cache(scene: Scene, world: World) -> Candidate | None:
    """One-token requests, reading the prefix cache and not."""
    again = _ask_again(scene, world)
    if again.cached is None:
        raise NotPossible("the engine keeps no prefix cache")
    if not again.tokens_read:
        return None
    same, gap = _reproduced(scene, world, again, again.cached)
    apart = (again.cached - again.anew).abs()
    words = (
        f"read from the cache ({again.tokens_read:,} tokens), the engine's numbers differ from those computed anew by "
        f"{float(apart.mean()):.3g} nats on average; those sampled differ from the cached ones: {gap}"
    )
    if not same:
        return None
    return replace(_answered(scene, world, again), finding=words)


def within_sequences(scene: Scene, world: World) -> Candidate | None:
    """Whether the engine, asked again, still says what it said; if not, where in the sequences it changed."""
    again = _ask_again(scene, world)
    same, gap = _reproduced(scene, world, again, again.anew if again.cached is None else again.cached)
    if same:
        return None
    words = f"asked again, the engine does not give back what it reported: {gap}"
    at, sides = _change(scene, world)
    if told := scene.rollout.sampling.unreplayed:
        cause = "constrained_decoding"
        words += f"; the requests set {', '.join(told)}, which was left out when asking again"
    elif not scene.has_answers and (turn := _turn_of_change(scene, world)) is not None:  # else it would be known
        cause = "token_misalignment"
        words += (
            f"; the drift begins with turn {turn + 1}: what the engine was given before it are other ids than here"
        )
    elif at is not None:
        cause = "in_flight_update"
        words += f"; the drift changes at completion token {at}: {sides[0]:.3g} before, {sides[1]:.3g} after (Huber)"
    else:
        cause = "engine_numerics"
        words += "; it does not change at one point of the sequences"
    return replace(_answered(scene, world, again), cause=cause, finding=words)


def _turn_of_change(scene: Scene, world: World) -> int | None:
    """The turn from which on there is drift, when the ones before have little and it does not grow within turns."""
    delta = (scene.log_probs(world) - world.reported).nan_to_num(0.0)
    size = huber(delta)
    for turn in range(1, int(scene.turn.max()) + 1):
        before, after = (size[world.kept & side] for side in (scene.turn < turn, scene.turn >= turn))
        if min(len(before), len(after)) < _SIDE * int(world.kept.sum()):
            continue
        if after.mean() > _STEP * before.mean() and _size(delta[world.kept & (scene.turn < turn)]) <= 3 * scene.floor:
            return turn
    return None


def _change(scene: Scene, world: World) -> tuple[int | None, tuple[float, float]]:
    """The completion position at which the drift steps up or down, if it does."""
    delta = (scene.log_probs(world) - world.reported)[world.kept]
    column = scene.column[world.kept]
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


@dataclass(frozen=True, slots=True)
class _Prefill:
    tokens: torch.Tensor  # (M,) of the scene's tokens
    scores: torch.Tensor  # (M,) by the engine's prefill at T = 1, before any processing


def _prefilled(scene: Scene) -> _Prefill:
    """The engine's own scores of a few sequences."""
    engine = _askable(scene)
    if scene.prefilled is None:
        sequences, tokens, starts = [], [], []
        for i, at in enumerate(scene.rows[:_SEQUENCES].tolist()):
            mine = (scene.row == i).nonzero().squeeze(-1)
            prompt = scene.prompt(at)
            if len(mine):
                ids = prompt + scene.rollout.completion_ids[at, : int(scene.column[mine].max()) + 1].tolist()
                if len(ids) < engine.max_model_len:
                    sequences.append(ids)
                    tokens.append(mine)
                    starts.append(len(prompt) - 1)
        if not sequences:
            raise NotPossible("no sequence fits the engine's max_model_len")
        scores = [
            x.double()[start + scene.column[mine]]
            for x, start, mine in zip(engine.rescore(sequences), starts, tokens, strict=True)
        ]
        scene.prefilled = _Prefill(torch.cat(tokens), torch.cat(scores))
    known: _Prefill = scene.prefilled
    return known


def prefill_drift(scene: Scene, world: World, law: Law) -> torch.Tensor:
    """Δ (M,) of the trainer against the engine's prefill, both at T = 1: without what is done to sample.

    ``law``: what of it a model itself may do (scale, bias, rounding) is taken over.
    """
    known = _prefilled(scene)
    scale = law.sampling.temperature / scene.temperature
    at_one = replace(law, sampling=SamplingSettings(temperature=scale), report="processed_logprobs")
    return scene.log_probs(replace(redone(world), law=at_one))[known.tokens] - known.scores


def sampling_alone(scene: Scene, world: World, law: Law) -> bool:
    """Whether a fitted law can be what the engine does to its logits, in its sampler or at the end of its model.

    In the sampler: then at T = 1, by prefill, the two models agree, or differ by a third at most of what they do when
    sampled. In the model: then what they differ by there is this law, to the last twentieth; of a model that computes
    something else it is only a likeness. Where the engine's weights are known to be others, these may leave a third.
    """
    base = redone(world)
    delta = scene.log_probs(base) - base.reported
    good = base.kept & torch.isfinite(delta)
    plain = _size(prefill_drift(scene, world, Law(sampling=SamplingSettings(temperature=scene.temperature))))
    flatter = min(1.0, scene.temperature) ** 2  # drift in logits shows less at T = 1 than at a lower temperature
    if plain <= max(3.0 * scene.floor, flatter * _size(delta[good]) / 3.0):
        return True
    share = 1.0 / 3.0 if scene.engine_values else _SAME_LAW
    return _size(prefill_drift(scene, world, law)) <= max(3.0 * scene.floor, share * plain)


def prefill(scene: Scene, world: World) -> Candidate | None:
    """The engine's own scores of the same tokens in place of the trainer's: what is left is not the model's."""
    again = _ask_again(scene, world)
    engine = scene.engine
    assert engine is not None
    same, gap = _reproduced(scene, world, again, again.anew)
    plain = Law(sampling=SamplingSettings(temperature=scene.temperature))
    delta = prefill_drift(scene, world, plain)
    base = redone(world)
    words = (
        f"at temperature 1, by prefill alone, engine and trainer differ by {float(delta.abs().mean()):.3g} nats on "
        f"average; asked again, the engine misses what it reported by {gap}"
    )
    scene.notes["ladder"] = {"prefill_at_1": _size(delta), "reproduced": same}
    if not same or _size(delta) <= 3 * scene.floor or scene.engine_values:
        return None
    theirs, over = base.reported.clone(), torch.zeros(len(scene), dtype=torch.bool)
    ours = scene.log_probs(base)
    theirs[again.picked] = ours[again.picked] - (again.anew - base.reported[again.picked])
    over[again.picked] = True
    drift = float((base.reported - ours).nan_to_num(0.0).abs().mean())
    settings = engine.settings()
    if "ignored" in scene.notes:
        cause, why = "partial_sync", f"its load_weights takes no notice of {', '.join(scene.notes['ignored'][:8])}"
    elif settings["quantization"] is not None:
        cause, why = "kv_cache_precision", f"the engine is quantized ({settings['quantization']})"
    elif 3 * scene.notes.get("cache_moved", 0.0) > drift:
        cause, why = "kv_cache_precision", "a cache as coarse as the engine's moves the trainer as much as it drifts"
    elif scene.began_healthy:
        cause = "stale_weights"
        why = f"{_parameters(engine)}, and the run began healthy: it serves an older copy of them"
    elif in_process(engine):
        cause, why = "model_definition", f"{_parameters(engine)}: it computes another function of them"
    else:
        cause, why = "model_definition", f"{_parameters(engine)}: other ones, or another function of them"
    return Candidate(
        world=replace(base, reported=theirs, kept=over), cause=cause, over=over, finding=f"{words}; {why}"
    )


def _parameters(engine: Engine) -> str:
    return "its parameters are the trainer's" if in_process(engine) else "a server's parameters can't be read"


LADDER: tuple[Probe, ...] = (
    probe("prefix cache", "stale_prefix_cache", "engine", prefix_cache,
               "keys and values of older weights are read from the prefix cache",
               "computed anew, the engine agrees with the trainer, and from the cache with what it sampled"),
    probe("asked again", "engine_numerics", "last", within_sequences,
               "the engine disagrees with itself, or its weights changed on the way",
               "asked again, it agrees with the trainer and not with what it sampled"),
    probe("engine's prefill", "model_definition", "last", prefill,
               "on the same weights the engine computes another function",
               "its own prefill, not the trainer, agrees with what it sampled"),
)  # fmt: skip
