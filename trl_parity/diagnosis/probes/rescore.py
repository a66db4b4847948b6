"""Probes that ask the engine again: from what was sampled, over its own re-score, to the trainer.

Sampled is not re-scored: sampler, cache, decode path or weight version. Re-scored is not the trainer: weights,
precision, or model.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ...engine.base import Engine, in_process
from ...engine.built_anew import as_built_anew, built_anew, parted
from ...engine.weight_readback import policy_tensors
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..distribution import Distribution
from ..findings import NOTHING, AskedAgain, EngineWeights, Findings, Prefill, Rescored
from ..profiles import onset_in_words
from .asking import (
    answered,
    askable,
    asked_again,
    on_trainers_weights,
    others,
    prefill_drift,
    prefill_of,
    requests_for,
    size_of,
    whole_sequences,
)
from .base import Candidate, NothingThere, NotPossible, Probe, Unexplained, probe, recomputed
from .other_prompts import under_another_prompt
from .parted_layers import where_parted
from .what_changed import NEWER, NO_LAW, OneUpdate, by_one_update, dishonest, what_changed

__all__ = ["RESCORE", "sampling_alone"]

logger = logging.getLogger(__name__)

_SAME = 0.05  # a true scale of the logits left up to 0.045 of the drift (or 3 floors), a soft cap read as one 0.11

_REPRODUCED = 0.3  # asked again, the engine gives its number back: up to this share of the drift

_ASKED = 8  # times, where two answers differ: their mean has an eighth of the variance of one

_TWO_IMPLEMENTATIONS = (
    "no setting of these two sides: weights and config agree, and the engine holds what both make. The two "
    "implementations of this model compute different functions, or a patch replaced a part of one: `trl-parity check` "
    "shows on what they part. Another attn_implementation on the trainer's side, or other versions of vLLM or "
    "transformers."
)

_HIDDEN_COPY = (
    "the engine computes with a copy of the weights that it does not show (packed for a kernel, compiled in, "
    "quantized): find what makes it after load, and what keeps it over a sync; callback.diagnose(heal=True) delivers "
    "the weights once more. An engine built anew (a restart) serves the right ones."
)

# where nothing the engine holds beside its weights differs
_UNNAMED = {"model_definition": _TWO_IMPLEMENTATIONS, "engine_state": _HIDDEN_COPY}

_CONTINUED = 24  # tokens sampled anew, after each of the few prompts

_NOT_OLDER = 0.9  # of the drift, left by the weights before the last update: many updates ago, or no weights at all

_OF_OLDER_WEIGHTS = ("in_flight_update", "stale_weights")

_ONE_OF_TWO = 0.5  # confidence in a cause, where what was seen has another one as well


def _reproduced(
    batch: DiagnosedBatch, current: Counterfactual, again: AskedAgain, answers: torch.Tensor
) -> tuple[bool, str]:
    """Whether the engine gives its number back, and by how much it misses."""
    sampled = current.reported[again.picked]
    drift = size_of(batch.log_probs(current)[again.picked] - sampled)
    gap = answers - sampled
    return size_of(gap) <= _REPRODUCED * drift, f"mean |gap| {float(gap[torch.isfinite(gap)].abs().mean()):.3g} nats"


def prefix_cache(
    batch: DiagnosedBatch, current: Counterfactual, findings: Findings
) -> tuple[Candidate | None, Findings]:
    """One-token requests, reading the prefix cache, or the features of pictures that are kept, and not."""
    again = asked_again(batch, current, findings)
    found = Findings(asked_again=again)
    pictures = batch.rollout.image_keys is not None
    if again.cached is None:
        raise NothingThere("the engine keeps no prefix cache", found)
    if not again.tokens_read and not pictures:
        return None, found
    same, gap = _reproduced(batch, current, again, again.cached)
    if not same:
        return None, found
    what, cause = f"the cache ({again.tokens_read:,} tokens)", ""
    engine = askable(batch)
    if pictures and in_process(engine) and not _reproduced(batch, current, again, again.anew)[0]:
        requests = requests_for(batch, again.picked.tolist(), findings.engine_prompts)
        kept, _ = engine.next_token(*requests, batch.temperature, cached=False, features=True)
        if _reproduced(batch, current, again, kept.double())[0]:
            what, cause = "features of pictures that it keeps", "stale_encoder_cache"
    apart = (again.cached - again.anew).abs()
    words = (
        f"read from {what}, the engine's numbers differ from those computed anew by {float(apart.mean()):.3g} nats on "
        f"average; those sampled differ from the cached ones: {gap}"
    )
    return answered(batch, current, again, words, cause), found


def within_sequences(
    batch: DiagnosedBatch, current: Counterfactual, findings: Findings
) -> tuple[Candidate | None, Findings]:
    """Whether the engine, asked again, still says what it said; if not, where in the sequences it changed."""
    again = asked_again(batch, current, findings)
    found = Findings(asked_again=again)
    same, gap = _reproduced(batch, current, again, again.as_sampled)
    if same:
        return None, found
    if (random := _random(batch, current, again, findings)) is not None:
        return random, found
    if (crossed := under_another_prompt(batch, current)) is not None:
        return crossed, found
    cause, why = what_changed(batch, current)
    update = by_one_update(batch, current) if cause in _OF_OLDER_WEIGHTS else None
    if update is not None:
        cause, why = _of_which_update(cause, why, update)
    words = f"asked again, the engine does not give back what it reported: {gap}; {why}"
    if not cause and not (decoding := _decoding(batch, current, again, findings)):
        raise Unexplained(words, found)
    if not cause:
        words, cause = f"{words}; {decoding}", "engine_numerics"
        return replace(answered(batch, current, again, words, cause), most=_ONE_OF_TWO), found
    most = 1.0 if update is None or update.left <= _REPRODUCED else _ONE_OF_TWO
    return replace(answered(batch, current, again, words, cause), most=most), found


def _of_which_update(cause: str, why: str, update: OneUpdate) -> tuple[str, str]:
    """The cause, by what the weights before the last update leave, and in words; none where they leave all."""
    words = f"of the drift, the weights before the last update leave {update.left:.0%}"
    if update.left > _NOT_OLDER:
        return "", words
    if update.left > _REPRODUCED or update.newer is None:
        return cause, f"{why}; {words}"
    if update.newer >= NEWER:
        return "in_flight_update", f"{words} and {update.newer:.0%} of the tokens are of the weights it holds now"
    return "stale_weights", f"{words}: it had these when it was asked to sample, and has the trainer's now"


def _random(batch: DiagnosedBatch, current: Counterfactual, again: AskedAgain, findings: Findings) -> Candidate | None:
    """The mean of several answers, where one engine in one state gives a different one each time."""
    engine, requests = askable(batch), requests_for(batch, again.picked.tolist(), findings.engine_prompts)
    answers = [again.anew]
    for _ in range(_ASKED - 1):
        told, _ = engine.next_token(*requests, batch.temperature, cached=False)
        answers.append(told.double())
        apart = size_of(answers[1] - answers[0])
        if apart < _REPRODUCED * size_of(again.anew - current.reported[again.picked]):
            return None  # it does say the same now
    spread = float(torch.stack(answers).std(0).nan_to_num(0.0).mean())
    words = (
        f"asked {_ASKED} times, one request after the other, the engine gives {_ASKED} answers, {spread:.3g} nats "
        f"apart (standard deviation); their mean is compared here"
    )
    mean_of = replace(again, anew=torch.stack(answers).mean(0))
    return answered(batch, current, mean_of, words, "engine_numerics")


def _decoding(batch: DiagnosedBatch, current: Counterfactual, again: AskedAgain, findings: Findings) -> str:
    """Whether what the engine reports as it samples anew is not what its prefill says of the same tokens; in words.

    What was asked for with the run's requests has no part in it, nor have weights: both are of now.
    """
    engine = askable(batch)
    if not in_process(engine):
        return ""
    rows = [int(batch.rows[i]) for i in batch.few.tolist()]
    prompts = [batch.prompt(at, findings.engine_prompts) for at in rows]
    prompts = [ids for ids in prompts if len(ids) + _CONTINUED < engine.max_model_len]
    if not prompts:
        return ""
    answers = engine.continued(prompts, _CONTINUED, batch.temperature)
    contexts = [p + ids[:t] for p, (ids, _) in zip(prompts, answers, strict=True) for t in range(len(ids))]
    told, _ = engine.next_token(contexts, [t for ids, _ in answers for t in ids], batch.temperature, cached=False)
    gap = torch.cat([numbers for _, numbers in answers]).double() - told.double()
    drift = size_of(batch.log_probs(current)[again.picked] - current.reported[again.picked])
    if size_of(gap) <= max(3.0 * batch.floor, _REPRODUCED * drift):
        return ""
    return (
        f"as it samples anew, it reports numbers {float(gap.abs().mean()):.3g} nats from those of its own prefill of "
        "the same tokens: kernels of decoding, or what a processor in the engine makes of what was generated"
    )


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
    plain = size_of(prefill_drift(batch, current, batch.plain, known))
    flatter = min(1.0, batch.temperature) ** 2  # drift in logits shows less at T = 1 than at a lower temperature
    if plain <= max(3.0 * batch.floor, flatter * size_of(delta[good]) / 3.0):
        return True
    share = 1.0 / 3.0 if others(weights) else _SAME
    return size_of(prefill_drift(batch, current, distribution, known)) <= max(3.0 * batch.floor, share * plain)


def prefill(batch: DiagnosedBatch, current: Counterfactual, findings: Findings) -> tuple[Candidate | None, Findings]:
    """The engine's own scores of the same tokens in place of the trainer's: what is left is not the model's."""
    engine, again = askable(batch), findings.asked_again
    assert again is not None
    same, gap = _reproduced(batch, current, again, again.anew)
    known = prefill_of(batch, findings)
    delta = prefill_drift(batch, current, batch.plain, known)
    found = Findings(prefill=known, rescored=Rescored(drift=size_of(delta), reproduced=same))
    if not same or size_of(delta) <= 3 * batch.floor or others(findings.engine_weights):
        return None, found
    if (off := _no_logprobs(batch, engine, findings, known, delta)) is not None:
        raise Unexplained(
            f"what it reports is not the log-softmax of its own logits: mean |gap| {off:.3g} nats", found
        )
    if (ratio := dishonest(batch, current)) is not None:
        raise Unexplained(f"{NO_LAW.format(ratio)}: its numbers are no log-probs of what it samples from", found)
    base = recomputed(current)
    theirs, over = base.reported.clone(), torch.zeros(len(batch), dtype=torch.bool)
    ours = batch.log_probs(base)
    theirs[again.picked] = ours[again.picked] - (again.anew - base.reported[again.picked])
    over[again.picked] = True
    drift = float((base.reported - ours).nan_to_num(0.0).abs().mean())
    cause, why = _another_model(engine, findings, drift, batch.began_healthy)
    nothing_seen = cause in _UNNAMED and findings.engine_parts == ()
    words = (
        f"at temperature 1, by prefill alone, engine and trainer differ by {float(delta.abs().mean()):.3g} nats on "
        f"average{onset_in_words(batch, current)}; asked again, the engine misses what it reported by {gap}; {why}"
    )
    candidate = Candidate(
        counterfactual=replace(base, reported=theirs, kept=over), cause=cause, over=over,
        finding=words + (_layers_parted(batch, engine, findings) if nothing_seen else ""),
        fix=_UNNAMED[cause] if nothing_seen else "", most=_ONE_OF_TWO if nothing_seen else 1.0,
    )  # fmt: skip
    return candidate, found


def _layers_parted(batch: DiagnosedBatch, engine: Engine, findings: Findings) -> str:
    if not in_process(engine):
        return ""
    try:
        return where_parted(batch, engine, whole_sequences(batch, engine, findings.engine_prompts)[0])
    except Exception as e:  # a word more or less, of layers that are called otherwise
        logger.debug("the two sides' layers could not be compared: %s", e)
        return ""


def _no_logprobs(
    batch: DiagnosedBatch, engine: Engine, findings: Findings, known: Prefill, delta: torch.Tensor
) -> float | None:
    """Mean |gap| of the engine's prefill to the log-softmax of its own logits, where that is a share of the drift.

    None: they agree, or the logits can't be asked for.
    """
    if not in_process(engine):
        return None
    reported = {int(n): float(x) for n, x in zip(known.picked, known.logprobs, strict=True)}
    gaps = []
    for whole in whole_sequences(batch, engine, findings.engine_prompts):
        _, logits = engine.last_states(whole.ids, (whole.start + batch.column[whole.tokens]).tolist())
        law = logits.double().cpu().log_softmax(-1)
        own = law.gather(1, batch.targets[whole.tokens].cpu()[:, None])[:, 0]
        gaps.append(torch.tensor([reported[int(n)] for n in whole.tokens]) - own)
    gap = torch.cat(gaps)
    return float(gap.abs().mean()) if size_of(gap) > _REPRODUCED * size_of(delta) else None


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
        if findings.engine_parts:
            return "engine_state", f"{parameters}; {_parts(findings.engine_parts)} are not as in an engine built anew"
        if findings.engine_parts is not None:
            parameters += ", and it holds what an engine built anew from its config on them does"
    elif in_process(engine):
        parameters = "its parameters were not read" if weights is None else "its parameters could not all be read"
    else:
        parameters = "a server's parameters can't be read"
    if began_healthy and alike:
        return "engine_state", f"{parameters}, and the run began healthy: it serves a copy of them that is not theirs"
    if began_healthy:
        return "stale_weights", f"{parameters}, and the run began healthy: it serves an older copy of them"
    if alike:
        return "model_definition", f"{parameters}: it computes another function of them"
    return "model_definition", f"{parameters}: other ones, or another function of them"


def _parts(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def engine_state(
    batch: DiagnosedBatch, current: Counterfactual, findings: Findings
) -> tuple[Candidate | None, Findings]:
    """The engine answers once more, holding what one built anew from its config on the trainer's weights does."""
    engine = on_trainers_weights(batch, findings)
    if engine is None:
        return None, NOTHING
    known = prefill_of(batch, findings)
    found = Findings(prefill=known)
    if size_of(prefill_drift(batch, current, batch.plain, known)) <= 3 * batch.floor:
        return None, found  # before anything is sampled the two agree
    if batch.sharded:
        raise NotPossible("the policy is sharded over ranks: no engine is built anew on its weights", found)
    anew, unreached = built_anew(engine, ((t.name, t.tensor) for t in policy_tensors(batch.model)))
    parts = parted(engine.model, anew, unreached)
    names = tuple(part.name for part in parts)
    again = asked_again(batch, current, findings)
    found = Findings(prefill=known, asked_again=again, engine_parts=names)
    if not any(part.fits for part in parts):
        return None, found
    with as_built_anew(parts):
        told, _ = engine.next_token(*requests_for(batch, again.picked.tolist(), findings.engine_prompts),
                                    batch.temperature, cached=False)  # fmt: skip
    gap = told.double() - again.anew
    if size_of(gap) <= batch.floor:  # what its answers do not depend on: a counter, a name
        names = tuple(part.name for part in parts if not part.fits)
        return None, replace(found, engine_parts=names)
    moved = float(gap.abs().mean())
    words = (
        f"its parameters are the trainer's, and {_parts(names)} are not as in an engine built anew from its config on "
        f"them; with these as built anew, its answers move by {moved:.3g} nats{onset_in_words(batch, current)}"
    )
    now = replace(again, anew=told.double())
    law = all(".logits_processor." in f".{name}" for name in names)  # a scale or soft cap at the model's end
    candidate = answered(batch, current, now, words, "temperature" if law else "")
    return replace(candidate, details={"parts": list(names)}), found


RESCORE: tuple[Probe, ...] = (
    probe("prefix cache", "stale_prefix_cache", "engine", prefix_cache,
          "keys and values of older weights are read from the prefix cache, or features of pictures are",
          "computed anew, the engine agrees with the trainer, and from the cache with what it sampled",
          uses=("engine_prompts", "asked_again"), gives=("asked_again",)),
    probe("engine's state", "engine_state", "engine", engine_state,
          "beside its parameters the engine holds something that is not what they and its config make",
          "holding what an engine built anew does, it agrees with the trainer",
          uses=("engine_prompts", "engine_weights", "asked_again", "prefill"),
          gives=("asked_again", "prefill", "engine_parts")),
    probe("asked again", "engine_numerics", "last", within_sequences,
          "the engine disagrees with itself, or its weights changed on the way",
          "asked again, it agrees with the trainer and not with what it sampled",
          uses=("engine_prompts", "asked_again"), gives=("asked_again",)),
    probe("engine's prefill", "model_definition", "last", prefill,
          "on the same weights the engine computes another function",
          "its own prefill, not the trainer, agrees with what it sampled",
          needs=("asked_again",), uses=("engine_prompts", "engine_weights", "engine_parts", "cache_moved", "prefill"),
          gives=("prefill", "rescored")),
)  # fmt: skip
