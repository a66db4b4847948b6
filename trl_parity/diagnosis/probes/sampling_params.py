"""Probes of the law the engine reports: many readings of one recompute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .. import distribution, fitting
from ..counterfactual import Scene, World
from ..distribution import Law
from ..fitting_bias import fit_bias
from .base import FITS, Candidate, NotPossible, Probe, mean, number, probe, redone, with_law

__all__ = ["LAWS"]

_TRUNCATION = ("top_k", "top_p", "min_p")

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def raw(scene: Scene, world: World) -> Candidate | None:
    """What an engine reports in one of vLLM's other log-prob modes."""
    worlds = [
        with_law(world, replace(world.law, report=mode))
        for mode in ("raw_logprobs", "raw_logits", "processed_logits")
        if world.law.report != mode
    ]
    if not worlds:
        return None
    best = min(worlds, key=lambda w: mean(scene, w))
    cause, words = _who_samples(scene, world, best, "raw_logprobs")
    if cause != "raw_logprobs":
        return None
    mode = "" if scene.engine is None else f"; logprobs_mode of the live engine: {_mode(scene)}"
    return Candidate(world=best, finding=scene.words(best.law, world.law) + words + mode)


def _mode(scene: Scene) -> str:
    return "unknown" if scene.engine is None else str(scene.engine.settings()["logprobs_mode"])


def _who_samples(scene: Scene, world: World, other: World, cause: str) -> tuple[str, str]:
    """Temperature or raw: do the sampled tokens follow the law that is reported, or the trainer's?

    The law that is reported and the law sampled from are two things. An engine at another temperature says what it
    samples; one in a raw mode samples at the trainer's temperature and says something else.
    """
    reported = 1.0 if other.law.report.startswith("raw") else other.law.sampling.temperature
    ours = world.law.sampling.temperature
    if abs(reported / ours - 1.0) < 1e-3:
        return "raw_logprobs" if other.law.report != world.law.report else cause, ""
    tokens = scene.fit_tokens(redone(world))
    sampled, error = fitting.mle_temperature(tokens, redone(world).law)
    error = max(error, 1e-6)
    of_reported, of_ours = abs(sampled - reported) / error, abs(sampled - ours) / error
    words = f"; the sampled tokens speak for temperature {sampled:.3g} ± {error:.2g}"
    if abs(of_reported - of_ours) < 1.5 and scene.engine is not None:  # too few tokens to tell: ask the engine
        is_raw = _mode(scene) != "processed_logprobs"
    else:
        is_raw = of_ours < of_reported
    return ("raw_logprobs" if is_raw else "temperature"), words


def temperature(scene: Scene, world: World) -> Candidate | None:
    """The temperature at which the trainer would say what the engine says."""
    base = redone(world)
    law = fitting.fit_temperature(scene.fit_tokens(base), base.law)
    if law is None:
        return None
    best = replace(base, law=law)
    cause, words = "temperature", ""
    if abs(law.sampling.temperature - 1.0) < 0.02:  # what a raw mode reports, too
        cause, words = _who_samples(scene, world, best, "temperature")
    return Candidate(
        world=best, cause=cause, finding=scene.words(law, base.law) + words, details=distribution.law_details(law)
    )


def _requested(names: tuple[str, ...]) -> Callable[[Scene, World], Candidate | None]:
    def run(scene: Scene, world: World) -> Candidate | None:
        asked, law = scene.rollout.sampling, world.law
        changed = {n: getattr(asked, n) for n in names if getattr(asked, n) != getattr(law.sampling, n)}
        if not changed:
            return None
        new = replace(law, sampling=replace(law.sampling, **changed))
        return Candidate(world=with_law(world, new), finding="as requested: " + scene.words(new, law), details=changed)

    return run


def _fitted(
    fit: Callable[[distribution.Tokens, Law], Law | None], *, held_out: bool = False
) -> Callable[[Scene, World], Candidate | None]:
    """``held_out``: fit to every other sequence and compare on the rest, since several values can be made to fit."""

    def run(scene: Scene, world: World) -> Candidate | None:
        base = redone(world)
        rest = scene.row % 2 == 1 if held_out and scene.sequences > 3 else None
        fitted_to = base if rest is None else replace(base, kept=base.kept & ~rest)
        law = fit(scene.fit_tokens(fitted_to), base.law)
        if law is None:
            return None
        added = len(law.bias) - len(base.law.bias) + (0 if law.allowed is None else 4)
        return Candidate(
            world=replace(base, law=law, kept=base.kept if rest is None else base.kept & rest),
            over=rest,
            finding=scene.words(law, base.law),
            values=max(1, added),
            details=distribution.law_details(law),
        )

    return run


def constraints(scene: Scene, world: World) -> Candidate | None:
    """The tokens the requests themselves rule out or favour."""
    if not scene.capture.requests:
        raise NotPossible("the requests of this batch are not at hand")
    params = scene.capture.requests[-1].params
    get = params.get if isinstance(params, dict) else lambda name: getattr(params, name, None)
    bias = {int(token): float(b) for token, b in (get("logit_bias") or {}).items()}
    banned = [words[0] for words in (get("bad_words_token_ids") or []) if len(words) == 1]
    bias |= dict.fromkeys(banned, float("-inf"))
    allowed = get("allowed_token_ids")
    told = [n for n in scene.rollout.sampling.unreplayed if get(n) or n == "structured_outputs"]
    if not bias and not allowed:
        if told:
            raise NotPossible(f"the requests set {', '.join(told)}, which can't be replayed on the trainer's logits")
        return None
    law = replace(
        world.law, bias=tuple(sorted(bias.items())), allowed=frozenset(allowed) if allowed else world.law.allowed
    )
    if law == world.law:
        return None
    return Candidate(
        world=with_law(world, law), finding="as requested: " + scene.words(law, world.law), details={"set": told}
    )


def shift(scene: Scene, world: World) -> Candidate | None:
    """Each sequence's log-probs moved by a place or two, where that fitting."""
    base = redone(world)
    shape = (scene.sequences, int(scene.column.max()) + 1) if len(scene) else (0, 0)
    if 0 in shape:
        return None
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[scene.row, scene.column] = base.kept & torch.isfinite(base.reported)
    reported, trainer = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    reported[scene.row, scene.column] = base.reported
    trainer[scene.row, scene.column] = scene.log_probs(base)
    by = fitting.fit_shift(reported, trainer, mask)
    if not by.any():
        return None
    source = scene.column + by[scene.row]
    inside = (source >= 0) & (source < shape[1])
    source = source.clamp(0, shape[1] - 1)
    kept = base.kept & inside & mask[scene.row, source]
    moved = {int(s): int((by == s).sum()) for s in by.unique() if s}
    return Candidate(
        world=replace(base, reported=reported[scene.row, source], kept=kept),
        finding="; ".join(
            f"in {n} of {scene.sequences} sequences the log-probs are {abs(s)} place(s) {'late' if s > 0 else 'early'}"
            for s, n in moved.items()
        ),
        details={"sequences": sum(moved.values()), "shifts": {str(s): n for s, n in moved.items()}},
    )


def logits_precision(scene: Scene, world: World) -> Candidate | None:
    """The trainer's logits rounded as a half-precision head would."""
    dtypes = [torch.bfloat16, torch.float16]
    if scene.engine is not None and scene.engine.head_dtype in dtypes:
        dtypes = [scene.engine.head_dtype]
    worlds = [with_law(world, replace(world.law, logits_dtype=dtype)) for dtype in dtypes]
    best = min(worlds, key=lambda w: mean(scene, w))
    gap = (scene.own_scored - world.reported)[world.kept]
    gap = gap[torch.isfinite(gap)].abs()
    return Candidate(
        world=best,
        finding=f"{scene.words(best.law, world.law)}; with the trainer's own head mean |Δ| is {number(gap)}",
    )


LAWS: tuple[Probe, ...] = (
    probe("raw", "raw_logprobs", "head", raw,
           "the engine reports another log-prob mode", "raw numbers (T = 1, unprocessed) agree with it"),
    probe("requested temperature", "temperature", "head", _requested(("temperature",)),
           "the requests ask for another temperature than the loss uses", "the trainer at theirs agrees"),
    probe("requested truncation", "truncated_sampling", "head", _requested(_TRUNCATION),
           "the requests truncate and the comparison does not", "renormalized over the kept set, the trainer agrees"),
    probe("requested penalties", "penalties", "head", _requested(_PENALTIES),
           "the requests penalize and the comparison does not", "with the penalties, the trainer agrees"),
    probe("requested constraints", "constrained_decoding", "head", constraints,
           "the requests rule tokens out or favour some", "with the same mask or bias, the trainer agrees"),
    probe("fitted temperature", "temperature", "fit", temperature,
           "the engine samples at another temperature or logit scale", FITS),
    probe("fitted soft cap", "temperature", "fit", _fitted(fitting.fit_soft_cap),
           "one side caps its logits softly, the other does not", FITS),
    probe("fitted truncation", "truncated_sampling", "fit", _fitted(fitting.fit_truncation),
           "the engine truncates behind the requests' back", FITS),
    probe("fitted penalties", "penalties", "fit", _fitted(fitting.fit_penalty),
           "the engine penalizes behind the requests' back", FITS),
    probe("fitted bias", "constrained_decoding", "fit", _fitted(fit_bias, held_out=True),
           "the engine rules tokens out or favours some behind the requests' back", FITS),
    probe("shift", "token_misalignment", "head", shift,
           "log-probs belong to a neighbouring token", "moved by a place or two, they agree"),
    probe("logits precision", "head_precision", "head", logits_precision,
           "the engine's head rounds its logits", "rounded alike, the trainer's logits agree"),
)  # fmt: skip
