"""Counterfactuals: each probe undoes one cause, as if it were the only difference, and says what it saw.

A probe takes the scene and the world explained so far, and returns the :class:`Candidate` in which its cause is undone
(or None: looked, found nothing to undo). It knows mechanisms, never the run's history. What it can't ask raises
:class:`NotPossible`. Probes are listed cheapest first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import fits, laws
from .engine.weights import policy_tensors, read_back
from .laws import Law
from .lint import largest_dropout
from .scene import FEW, Scene, Variant, World

__all__ = ["COSTS", "PROBES", "Candidate", "NotPossible", "Probe", "make_probe", "redone"]

COSTS = (
    "none",
    "repeat",
    "head",
    "weights",
    "forward",
    "engine",
    "singles",
    "last",
)  # cheapest first; last: by elimination
_TRUNCATION = ("top_k", "top_p", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_ARRIVED = 20  # elements that would differ, had a tensor not arrived, from which on "none does" means it did


class NotPossible(Exception):
    """This setup can't be asked; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The world with one cause undone. ``over``: tokens (N,) on which it is compared; None: all that are kept."""

    world: World
    finding: str
    cause: str = ""  # where the probe itself tells several apart
    over: torch.Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A hypothesis, what it predicts, and the counterfactual that tests it."""

    name: str
    cause: str
    hypothesis: str
    prediction: str
    cost: str
    run: Callable[[Scene, World], Candidate | None]
    exact: bool = False  # a fitted law: the true one leaves next to nothing, one that leaves much is not it


def redone(world: World) -> World:
    """The world with the trainer's numbers from a forward pass of ours, where they are still as scored."""
    return world if world.variant is not None else replace(world, variant=Variant())


def _with_law(world: World, law: Law) -> World:
    return replace(redone(world), law=law)


def _with_variant(world: World, **changes: Any) -> World:
    world = redone(world)
    assert world.variant is not None
    return replace(world, variant=replace(world.variant, **changes))


def _mean(scene: Scene, world: World) -> float:
    sums, _ = scene.residual(world)
    return float(sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1))


# ---- what arrived ---------------------------------------------------------------------------------------------------


def finite(scene: Scene, world: World) -> Candidate | None:
    """Leave out tokens without a finite number on either side."""
    good = torch.isfinite(scene.as_scored) & torch.isfinite(world.reported)
    bad = int((world.kept & ~good).sum())
    if not bad:
        return None
    engine = int((world.kept & ~torch.isfinite(world.reported)).sum())
    return Candidate(
        world=replace(world, kept=world.kept & good),
        finding=f"{bad} of {int(world.kept.sum())} tokens have no finite log-prob ({engine} of them the engine's)",
        details={"nonfinite": bad, "engine": engine},
    )


def handover(scene: Scene, world: World) -> Candidate | None:
    """The engine's own numbers and ids, as it returned them, in place of those that arrived."""
    answers = _answers(scene)
    reported, kept = world.reported.clone(), world.kept.clone()
    moved, foreign = 0, 0
    for i, at in enumerate(scene.rows.tolist()):
        ids, numbers = list(answers[at].token_ids), answers[at].logprobs
        prompt = list(answers[at].prompt)
        ours = scene.rollout.prompt_ids[at][scene.rollout.prompt_mask[at].bool()].tolist()
        if prompt != ours:
            scene.engine_prompts[at] = prompt
        own = scene.rollout.completion_ids[at].tolist()
        for n in (scene.row == i).nonzero().squeeze(-1).tolist():
            t = int(scene.column[n])
            if t >= len(ids) or ids[t] != own[t]:
                kept[n], foreign = False, foreign + 1
                continue
            true = float(numbers[t][ids[t]].logprob)
            moved += abs(true - float(world.reported[n])) > 1e-6 or bool(torch.isnan(world.reported[n]))
            reported[n] = true
    if not moved and not foreign:
        return None
    total = int(world.kept.sum())
    words = [f"{moved} of {total} log-probs that arrived are not those the engine returned for their token"] * (
        moved > 0
    )
    words += [f"{foreign} tokens are not those the engine generated"] * (foreign > 0)
    return Candidate(
        world=replace(world, reported=reported, kept=kept),
        finding="; ".join(words),
        details={"moved": moved, "foreign": foreign, "compared": total},
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    prompt: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Any


def _answers(scene: Scene) -> list[_Answer]:
    """What the engine returned, by row of the batch."""
    requests = scene.capture.requests
    if len(requests) != 1 or requests[0].outputs is None:
        raise NotPossible(
            "what the engine itself returned is not at hand (a server, several calls a batch, or a batch gone by)"
        )
    flat = [
        _Answer(output.prompt_token_ids, one.token_ids, one.logprobs)
        for output in requests[0].outputs
        for one in output.outputs
    ]
    if len(flat) != len(scene.rollout.completion_ids):
        raise NotPossible(f"the engine returned {len(flat)} completions for {len(scene.rollout.completion_ids)} rows")
    return flat


def context(scene: Scene, world: World) -> Candidate | None:
    """The trainer scores the prompts the engine was really given."""
    answers = _answers(scene)
    for at in scene.rows.tolist():
        ours = scene.rollout.prompt_ids[at][scene.rollout.prompt_mask[at].bool()].tolist()
        if list(answers[at].prompt) != ours:
            scene.engine_prompts[at] = list(answers[at].prompt)
    if not scene.engine_prompts:
        return None
    at, theirs = next(iter(scene.engine_prompts.items()))
    ours = scene.rollout.prompt_ids[at][scene.rollout.prompt_mask[at].bool()].tolist()
    first = next(
        (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
    )
    some = scene.row < FEW
    other = _with_variant(world, batch="unpadded", contexts="engine", few=True)
    return Candidate(
        world=replace(other, kept=world.kept & some),
        over=some,
        finding=f"{len(scene.engine_prompts)} of {scene.sequences} prompts are not the ids the engine was given: the "
        f"first differs from position {first} on ({len(theirs)} tokens at the engine, {len(ours)} here)",
        details={"prompts": len(scene.engine_prompts), "first_difference": first,
                 "lengths": [len(theirs), len(ours)]},
    )  # fmt: skip


# ---- laws: one recompute, many readings -------------------------------------------------------------------------


def repeat(scene: Scene, world: World) -> Candidate | None:
    """The trainer again, every layer in eval mode."""
    if world.variant is not None:
        return None
    again = redone(world)
    gap = scene.log_probs(again) - scene.as_scored
    gap = gap[torch.isfinite(gap)].abs()
    dropped = largest_dropout(scene.model)
    return Candidate(
        world=again,
        finding=f"a second pass in eval mode differs by {_number(gap)} nats on average"
        + (f"; dropout {dropped:g} is on while the policy is scored" if dropped else ""),
        details={"dropout": dropped},
    )


def raw(scene: Scene, world: World) -> Candidate | None:
    """What an engine reports in one of vLLM's other log-prob modes."""
    worlds = [
        _with_law(world, replace(world.law, report=mode))
        for mode in ("raw_logprobs", "raw_logits", "processed_logits")
        if world.law.report != mode
    ]
    if not worlds:
        return None
    best = min(worlds, key=lambda w: _mean(scene, w))
    cause, words = _who_samples(scene, world, best, "raw_logprobs")
    if cause != "raw_logprobs":
        return None
    mode = "" if scene.engine is None else f"; logprobs_mode of the live engine: {_mode(scene)}"
    return Candidate(world=best, finding=laws.describe(best.law, world.law) + words + mode)


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
    sampled, error = fits.mle_temperature(tokens, redone(world).law)
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
    law = fits.fit_temperature(scene.fit_tokens(base), base.law)
    if law is None:
        return None
    best = replace(base, law=law)
    cause, words = "temperature", ""
    if abs(law.sampling.temperature - 1.0) < 0.02:  # what a raw mode reports, too
        cause, words = _who_samples(scene, world, best, "temperature")
    return Candidate(
        world=best, cause=cause, finding=laws.describe(law, base.law) + words, details=laws.law_details(law)
    )


def _requested(names: tuple[str, ...]) -> Callable[[Scene, World], Candidate | None]:
    def run(scene: Scene, world: World) -> Candidate | None:
        asked, law = scene.rollout.sampling, world.law
        changed = {n: getattr(asked, n) for n in names if getattr(asked, n) != getattr(law.sampling, n)}
        if not changed:
            return None
        new = replace(law, sampling=replace(law.sampling, **changed))
        return Candidate(
            world=_with_law(world, new), finding="as requested: " + laws.describe(new, law), details=changed
        )

    return run


def _fitted(fit: Callable[[laws.Tokens, Law], Law | None]) -> Callable[[Scene, World], Candidate | None]:
    def run(scene: Scene, world: World) -> Candidate | None:
        base = redone(world)
        law = fit(scene.fit_tokens(base), base.law)
        if law is None:
            return None
        return Candidate(
            world=replace(base, law=law), finding=laws.describe(law, base.law), details=laws.law_details(law)
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
        world=_with_law(world, law), finding="as requested: " + laws.describe(law, world.law), details={"set": told}
    )


def shift(scene: Scene, world: World) -> Candidate | None:
    """Each sequence's log-probs moved by a place or two, where that fits."""
    base = redone(world)
    shape = (scene.sequences, int(scene.column.max()) + 1) if len(scene) else (0, 0)
    if 0 in shape:
        return None
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[scene.row, scene.column] = base.kept & torch.isfinite(base.reported)
    reported, trainer = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    reported[scene.row, scene.column] = base.reported
    trainer[scene.row, scene.column] = scene.log_probs(base)
    by = fits.fit_shift(reported, trainer, mask)
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
    worlds = [_with_law(world, replace(world.law, logits_dtype=dtype)) for dtype in dtypes]
    best = min(worlds, key=lambda w: _mean(scene, w))
    gap = (scene.own_scored - world.reported)[world.kept]
    gap = gap[torch.isfinite(gap)].abs()
    return Candidate(
        world=best,
        finding=f"{laws.describe(best.law, world.law)}; with the trainer's own head mean |Δ| is {_number(gap)}",
    )


# ---- other forward passes -------------------------------------------------------------------------------------------


def alone(scene: Scene, world: World) -> Candidate | None:
    """One sequence at a time, padded as before."""
    return _few(scene, world, "single", "in a pass of its own")


def unpadded(scene: Scene, world: World) -> Candidate | None:
    """One sequence at a time, without padding."""
    return _few(scene, world, "unpadded", "alone, its positions from 0, no padding")


def _few(scene: Scene, world: World, batch: str, words: str) -> Candidate:
    some = scene.row < FEW
    other = _with_variant(world, batch=batch, few=True)
    return Candidate(
        world=replace(other, kept=world.kept & some),
        over=some,
        finding=f"{min(FEW, scene.sequences)} sequences, each {words}",
    )


_NOT_THE_MODEL = {
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "head_dtype",
    "_attn_implementation", "_attn_implementation_internal", "return_dict", "output_attentions",
    "output_hidden_states", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    "is_encoder_decoder", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def engine_config(scene: Scene, world: World) -> Candidate | None:
    """The trainer's weights in a model built anew from the engine's config."""
    if scene.engine is None:
        raise NotPossible("a server does not tell the config of the model it built")
    if scene.sharded or hasattr(scene.model, "peft_config"):
        raise NotPossible("the policy is sharded or has adapters: no second model is built on its weights")
    ours = {k: v for k, v in scene.model.config.to_dict().items() if k not in _NOT_THE_MODEL}
    theirs = {k: v for k, v in scene.engine.hf_config.to_dict().items() if k not in _NOT_THE_MODEL}
    changed = {k: [ours.get(k), theirs.get(k)] for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    words = ", ".join(f"{k}: trainer {a}, engine {b}" for k, (a, b) in sorted(changed.items()))
    return Candidate(
        world=_with_variant(world, model="engine_config"),
        finding=f"configs differ in {words}"
        if changed
        else "both sides have one config, which the live trainer model does not follow if this explains the drift",
        details={"config": {k: [str(a), str(b)] for k, (a, b) in changed.items()}},
    )


def kv_cache(scene: Scene, world: World) -> Candidate | None:
    """The trainer attends to keys and values rounded as in the engine's cache."""
    if scene.engine is None:
        raise NotPossible("a server does not tell the dtype of its cache")
    name = scene.engine.settings()["kv_cache_dtype"]
    dtypes = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "bfloat16": "bfloat16",
              "float16": "float16"}  # fmt: skip
    if name not in dtypes:
        return None
    return Candidate(
        world=_with_variant(world, kv_dtype=getattr(torch, dtypes[name])),
        finding=f"kv_cache_dtype of the live engine is {name}",
        details={"kv_cache_dtype": name},
    )


# ---- the engine's weights -------------------------------------------------------------------------------------------


def engine_weights(scene: Scene, world: World) -> Candidate | None:
    """The trainer scores with the weights the engine holds, read tensor by tensor."""
    if scene.engine is None:
        raise NotPossible("a server does not hand out its weights")
    named = list(policy_tensors(scene.model))
    model = scene.engine.model
    held = read_back(model.load_weights, model, ((name, tensor) for name, tensor, _ in named))
    deaf = {h.name for h in held if not h.written}  # to the loader as it is now; the class's own may know them
    known = read_back(
        functools.partial(type(model).load_weights, model), model, ((n, t) for n, t, _ in named if n in deaf)
    )
    held = [h for h in held if h.written] + known
    parameters = {name: parameter for name, _, parameter in named}
    trained = [h for h in held if parameters[h.name].requires_grad or hasattr(scene.model, "peft_config")]
    differing = [h for h in held if h.differing]
    ignored = [h for h in trained if h.name in deaf]
    scene.engine_values = {h.name: (parameters[h.name], h.values) for h in differing if h.values is not None}
    if not differing:
        if ignored:
            scene.notes["ignored"] = [h.name for h in ignored]
        return None
    wide = [h for h in differing if h.numel >= 1024] or differing
    rate = sum(h.differing for h in wide) / sum(h.written for h in wide)
    arrived = [h for h in trained if h.written and not h.differing and 0.25 * rate * h.numel >= _ARRIVED]
    partial = bool(arrived) or 0 < len(ignored) < len(trained)
    missing = [*ignored, *(h for h in differing if h.name not in deaf)]
    words = f"{len(differing)} of {len(held)} tensors are not the trainer's in the engine's {_dtype(scene)}"
    if arrived:
        words += f", {len(arrived)} arrived"
    if ignored:
        words += f", {len(ignored)} are ignored by its load_weights"
    if partial:
        words += ": " + ", ".join(h.name for h in missing[:8]) + (" …" if len(missing) > 8 else "")
    if scene.sharded or hasattr(scene.model, "peft_config") or len(scene.engine_values) < len(differing):
        raise NotPossible(f"{words}; the policy's weights can't be swapped here to see what that does")
    return Candidate(
        world=_with_variant(world, weights="engine"),
        cause="partial_sync" if partial else "stale_weights",
        finding=words,
        details={
            "tensors": {h.name: {"differing": h.differing / max(1, h.written), "gap": h.gap} for h in differing},
            "ignored": [h.name for h in ignored],
            "arrived": len(arrived),
        },
    )


def rounded_weights(scene: Scene, world: World) -> Candidate | None:
    """The trainer scores with its own weights rounded to the engine's dtype."""
    if scene.sharded:
        raise NotPossible("the policy is sharded: its weights can't be swapped here")
    dtype = scene.engine.dtype if scene.engine is not None else torch.bfloat16
    finer = [p for p in scene.model.parameters() if p.is_floating_point() and _bits(p.dtype) > _bits(dtype)]
    if not finer:
        return None
    return Candidate(
        world=_with_variant(world, weights="rounded"),
        finding=f"{len(finer)} tensors are {_name(finer[0].dtype)} here and {_name(dtype)} in the engine",
    )


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _dtype(scene: Scene) -> str:
    return "dtype" if scene.engine is None else _name(scene.engine.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(x: torch.Tensor) -> str:
    return f"{float(x.mean()):.3g}" if len(x) else "-"


def make_probe(
    name: str, cause: str, cost: str, run: Callable[[Scene, World], Candidate | None], hypothesis: str, prediction: str
) -> Probe:
    """A probe, its fields in reading order."""
    exact = prediction == _FITS
    return Probe(name=name, cause=cause, cost=cost, run=run, hypothesis=hypothesis, prediction=prediction, exact=exact)


_FITS = "a fitted value explains the drift, and is not the configured one"
PROBES: tuple[Probe, ...] = (
    make_probe("finite", "nonfinite_logprobs", "none", finite,
           "some log-probs are not finite", "without these tokens the drift is gone"),
    make_probe("handover", "token_misalignment", "none", handover,
           "what arrived is not what the engine returned", "with the engine's own answer the drift is gone"),
    make_probe("repeat", "trainer_numerics", "repeat", repeat,
           "the trainer disagrees with itself", "a second pass, every layer in eval mode, agrees with the engine"),
    make_probe("raw", "raw_logprobs", "head", raw,
           "the engine reports another log-prob mode", "raw numbers (T = 1, unprocessed) agree with it"),
    make_probe("requested temperature", "temperature", "head", _requested(("temperature",)),
           "the requests ask for another temperature than the loss uses", "the trainer at theirs agrees"),
    make_probe("requested truncation", "truncated_sampling", "head", _requested(_TRUNCATION),
           "the requests truncate and the comparison does not", "renormalized over the kept set, the trainer agrees"),
    make_probe("requested penalties", "penalties", "head", _requested(_PENALTIES),
           "the requests penalize and the comparison does not", "with the penalties, the trainer agrees"),
    make_probe("requested constraints", "constrained_decoding", "head", constraints,
           "the requests rule tokens out or favour some", "with the same mask or bias, the trainer agrees"),
    make_probe("fitted temperature", "temperature", "head", temperature,
           "the engine samples at another temperature or logit scale", _FITS),
    make_probe("fitted truncation", "truncated_sampling", "head", _fitted(fits.fit_truncation),
           "the engine truncates behind the requests' back", _FITS),
    make_probe("fitted penalties", "penalties", "head", _fitted(fits.fit_penalty),
           "the engine penalizes behind the requests' back", _FITS),
    make_probe("fitted bias", "constrained_decoding", "head", _fitted(fits.fit_bias),
           "the engine rules tokens out or favours some behind the requests' back", _FITS),
    make_probe("shift", "token_misalignment", "head", shift,
           "log-probs belong to a neighbouring token", "moved by a place or two, they agree"),
    make_probe("logits precision", "head_precision", "head", logits_precision,
           "the engine's head rounds its logits", "rounded alike, the trainer's logits agree"),
    make_probe("context", "token_misalignment", "singles", context,
           "the engine was given other prompt ids", "on the engine's own ids the trainer agrees"),
    make_probe("alone", "trainer_numerics", "singles", alone,
           "the trainer's numbers depend on the batch", "one sequence at a time, it agrees"),
    make_probe("unpadded", "model_definition", "singles", unpadded,
           "padding or positions differ", "unpadded and alone, the trainer agrees"),
    make_probe("engine's config", "model_definition", "forward", engine_config,
           "the two sides run different models on one set of weights",
           "a model built from the engine's config on the trainer's weights agrees"),
    make_probe("cache precision", "kv_cache_precision", "forward", kv_cache,
           "the engine's KV cache is quantized", "with keys and values rounded alike, the trainer agrees"),
    make_probe("engine's weights", "stale_weights", "weights", engine_weights,
           "the engine holds other weights", "with the weights it holds, the trainer agrees"),
    make_probe("rounded weights", "dtype_gap", "weights", rounded_weights,
           "the trainer's weights are finer than the engine's", "rounded to its dtype, they agree"),
)  # fmt: skip
