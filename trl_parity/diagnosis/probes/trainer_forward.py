"""Probes that score the tokens in another forward pass of the policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...engine.base import in_process
from ...engine.built_anew import parted
from ...scoring.experts import expert_layers
from ...scoring.head import score_tokens
from ...scoring.model_head import causal_lm
from ...scoring.perturb import config_differences, eval_mode, largest_dropout
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..fitting import fit_temperature
from ..forward_passes import FEW
from ..profiles import drift_profiles
from .asking import size_of, whole_sequences
from .base import (
    Candidate,
    NotPossible,
    Probe,
    independent,
    mean_in_words,
    probe,
    recomputed,
    require_engine,
    with_forward,
)
from .same_states import SameStates, on_same_states

__all__ = ["TRAINER_FORWARD"]

_NOT_AS_BUILT = (
    "the configs agree; the trainer's live model is not what they make: something changed its buffers or attributes "
    "after it was built (those listed here). Build it from its config, or change the config of both sides."
)

_HIDDEN = 64  # states that routers are asked with

_CALLED_OTHERWISE = (
    "the configs agree, and what the trainer's live model holds is what they make: a forward pass in it was replaced, "
    "or it is called otherwise (an attention mask or position ids of one's own, a replaced "
    "_get_per_token_logps_and_entropies). Take that off."
)

_NO_POSITIONS = (
    "the trainer's forward pass is given left-padded prompts and no position_ids, so its positions (or what it "
    "chooses by padded width) begin at the padding: let the model's forward make them of the mask "
    "(attention_mask.cumsum(-1) - 1), use a model with rotary positions, or prompts of one length in a batch."
)

_OWN_LOGITS = (
    "the engine serves the model's own logits; TRL's loss (a fused head since 1.15) multiplies the last hidden states "
    "by lm_head and applies what constants the config has under the names it knows. Give the constant such a name in "
    "the model's config, leave out what else the model does to its logits, or train with a TRL that uses the model's."
)

_OWN = 1e-3  # nats from which on the model's own logits are others

_ROUNDED = 4.0  # times what rounding to their dtype does: less is that

_FEW_TOKENS = 16  # fewer show nothing by chance

_NO_DROPOUT = (
    "no dropout is on: a layer computes something else in train mode (a router that draws at random, statistics of "
    "the batch), or what scores the batch is not this model's forward pass (a replaced "
    "_get_per_token_logps_and_entropies, another copy of the weights, another mask). Switch that off"
)

_ITS_TEMPERATURE = (
    "one temperature on the trainer's side: set it in GRPOConfig before the trainer is built (TRL's fused head keeps "
    "the one it was built with), and let nothing score with another."
)

_ITS_PLACES = (
    "score a token with the logits of the token before it: logits[:, :-1] belong to input_ids[:, 1:], and log-probs "
    "keep the order of their tokens."
)

_LEFT = 0.1  # of the gap: what is left of it by what made it


def repeat(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The trainer again, every layer in eval mode."""
    if current.forward is not None:
        return None
    again = recomputed(current)
    gap = batch.log_probs(again) - batch.as_scored
    words = f"a second pass in eval mode differs by {mean_in_words(gap[torch.isfinite(gap)].abs())} nats on average"
    dropped, jitter = largest_dropout(batch.model), _jitter(batch.model)
    cause, fix = "", ""
    if dropped:
        words += f"; dropout {dropped:g} is on while the policy is scored"
    elif jitter:
        words += f"; its config has {', '.join(jitter)}"
        cause, fix = "moe_routing", f"{_NO_DROPOUT} ({', '.join(jitter)} to 0)."
    elif (temperature := _scored_at(batch, again, size_of(gap))) is not None:
        words += f"; the run's are of temperature {temperature:.3g}, the loss divides by {batch.temperature:g}"
        cause, fix = "temperature", _ITS_TEMPERATURE
    elif words_of_place := _scored_elsewhere(batch, again, gap):
        words += f"; {words_of_place}"
        cause, fix = "token_misalignment", _ITS_PLACES
    else:
        fix = f"{_NO_DROPOUT}."
    return Candidate(counterfactual=again, finding=words, cause=cause, details={"dropout": dropped}, fix=fix)


def _scored_at(batch: DiagnosedBatch, again: Counterfactual, gap: float) -> float | None:
    """The temperature at which a second pass gives the numbers the run scored; None where there is none."""
    if gap <= 3.0 * batch.floor or batch.sharded:  # a head in shards is gathered by all ranks or none
        return None
    theirs = replace(again, reported=batch.as_scored)
    fitted = fit_temperature(batch.fit_tokens(theirs), again.distribution)
    if fitted is None:
        return None
    left = size_of(batch.log_probs(replace(again, distribution=fitted)) - batch.as_scored)
    return fitted.sampling.temperature if left <= max(3.0 * batch.floor, _LEFT * gap) else None


def _scored_elsewhere(batch: DiagnosedBatch, again: Counterfactual, gap: torch.Tensor) -> str:
    """In words: that the numbers the run scored are those of a neighbour's logits, id or log-prob; empty: they aren't.

    ``gap``: (N,) of a second pass from them.
    """
    if size_of(gap) <= 3.0 * batch.floor or batch.sharded or again.forward is None or not len(batch):
        return ""
    places = torch.full((batch.sequences, int(batch.column.max()) + 3), -1)
    places[batch.row, batch.column + 1] = torch.arange(len(batch))
    right = batch.log_probs(again)
    with batch.passes.head(again.forward, batch.temperature) as head:
        states, ids = (x.to(head.weight.device) for x in (batch.passes.states(again.forward), batch.targets))
        for by, where in ((1, "after"), (-1, "before")):
            at = places[batch.row, batch.column + 1 + by]
            here = (at >= 0).nonzero().squeeze(-1)
            at, theirs = at[here], batch.as_scored[here]
            if len(here) < _FEW_TOKENS:
                continue
            allowed = max(3.0 * batch.floor, _LEFT * size_of(gap[here]))
            made = (
                ("logits", score_tokens(states[at], ids[here], head).logprobs),
                ("id", score_tokens(states[here], ids[at], head).logprobs),
                ("log-prob", right[at]),
            )
            for what, said in made:
                if size_of(said.double().cpu() - theirs) <= allowed:
                    return f"the run's are of the {what} of the token {where} each"
    return ""


def _jitter(model: Any) -> list[str]:
    """Entries of the config that make a router draw at random in train mode."""
    config = getattr(model.config, "get_text_config", lambda: model.config)().to_dict()
    return sorted(f"{k}={v}" for k, v in config.items() if "jitter" in k and isinstance(v, float) and v > 0.0)


def alone(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """One sequence at a time, padded as before."""
    return _few(batch, current, "single", "in a pass of its own")


def unpadded(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """One sequence at a time, without padding."""
    found = _few(batch, current, "unpadded", "alone, its positions from 0, no padding")
    parts = drift_profiles(batch, current).get("by_padding", [])
    if not parts:
        return found
    words = ", ".join(f"from {part['from']:.0f} {part['residual']:.3g}" for part in parts)
    return replace(found, finding=f"{found.finding}; drift by tokens of padding (Huber): {words}", fix=_NO_POSITIONS)


def _few(batch: DiagnosedBatch, current: Counterfactual, layout: str, words: str) -> Candidate:
    some = batch.of_few
    other = with_forward(current, layout=layout, few=True)
    return Candidate(
        counterfactual=replace(other, kept=current.kept & some),
        over=some,
        finding=f"{min(FEW, batch.sequences)} sequences, each {words}",
    )


def engine_config(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The trainer's weights in a model built anew from the engine's config."""
    require_engine(batch)
    if not in_process(batch.engine):
        raise NotPossible("a server does not tell the config of the model it built")
    if batch.sharded or hasattr(batch.model, "peft_config"):
        raise NotPossible("the policy is sharded or has adapters: no second model is built on its weights")
    changed = config_differences(batch.model.config, batch.engine.hf_config)
    words = "configs differ in " + ", ".join(f"{k}: trainer {a}, engine {b}" for k, (a, b) in sorted(changed.items()))
    parts: list[str] = []
    routers: list[str] = []
    if not changed:
        parts = [part.name for part in parted(causal_lm(batch.model), batch.passes.engine_config_model)]
        words = "both sides have one config, which the live trainer model does not follow if this explains the drift"
        words += f": {', '.join(parts[:4])} of it are not as built from it" if parts else ""
        words += "" if parts else "; what it holds is as built from it"
        routers = [] if parts else _other_routers(causal_lm(batch.model), batch.passes.engine_config_model)
        words += f", but what {', '.join(routers[:4])} are given is not what its routers choose" if routers else ""
    return Candidate(
        counterfactual=with_forward(current, model="engine_config"),
        cause="moe_routing" if routers else "",
        finding=words,
        fix="" if changed else _NOT_AS_BUILT if parts else _CALLED_OTHERWISE,
        details={"config": {k: [str(a), str(b)] for k, (a, b) in changed.items()}, "parts": parts},
    )


def _other_routers(live: Any, built: Any) -> list[str]:
    """Layers that are given other experts in one model than in the other, for the same hidden states."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_HIDDEN, live.config.get_text_config().hidden_size, generator=generator)
    found = []
    try:
        with eval_mode(live):
            for ours, theirs in zip(expert_layers(live), expert_layers(built), strict=True):
                (experts, _), (others, _) = ours.choice(hidden), theirs.choice(hidden)
                if not torch.equal(experts.sort(-1).values, others.sort(-1).values):
                    found.append(ours.name)
    except ValueError:  # of layers that hand their choice on in another form
        return []
    return found


def own_logits(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """As if the loss were of the logits that the model itself makes, not of its head and the config's constants."""
    if batch.sharded:
        raise NotPossible("the policy is sharded over ranks: its own logits are not asked of one rank")
    found = on_same_states(
        batch, current, whole_sequences(batch, None, None),
        lambda whole, places: batch.passes.own_logits(torch.tensor(whole.ids), places, whole.at, whole.start),
    )  # fmt: skip
    if (scored := _scored_otherwise(batch, current, found)) is not None:
        return scored
    apart = (found.others.float() - found.heads).abs().mean()
    rounding = (found.heads.to(found.others.dtype).float() - found.heads).abs().mean()
    gap = float(found.gap.abs().mean())
    if gap < _OWN or apart < _ROUNDED * rounding:
        return None
    return Candidate(
        counterfactual=found.counterfactual,
        over=found.over,
        finding="the model's own forward pass makes other logits than its lm_head with the constants that TRL's loss "
        f"reads from the config (logit_scale, final_logit_softcapping, ...): {gap:.3g} nats on average",
        fix=_OWN_LOGITS,
    )


def _scored_otherwise(batch: DiagnosedBatch, current: Counterfactual, found: SameStates) -> Candidate | None:
    """The policy's own forward pass in place of what the trainer scores with, where it gives other numbers.

    Both on one sequence at a time, unpadded.
    """
    trainers = batch.log_probs(with_forward(current, layout="unpadded", few=True))[found.picked]
    gap = found.by_head - trainers
    if size_of(gap) <= 3.0 * batch.floor:
        return None
    base = recomputed(current)
    reported = base.reported.clone()
    reported[found.picked] -= found.by_head - batch.log_probs(base)[found.picked]
    return Candidate(
        counterfactual=replace(base, distribution=batch.plain, reported=reported, kept=base.kept & found.over),
        over=found.over,
        cause="trainer_numerics",
        finding=f"the policy's own forward pass differs from what scores the batch by {mean_in_words(gap.abs())} nats",
        fix=f"{_NO_DROPOUT}.",
    )


TRAINER_FORWARD: tuple[Probe, ...] = (
    probe("repeat", "trainer_numerics", "repeat", independent(repeat),
           "the trainer disagrees with itself", "a second pass, every layer in eval mode, agrees with the engine"),
    probe("alone", "trainer_numerics", "singles", independent(alone),
           "the trainer's numbers depend on the batch", "one sequence at a time, it agrees"),
    probe("unpadded", "model_definition", "singles", independent(unpadded),
           "padding or positions differ", "unpadded and alone, the trainer agrees"),
    probe("engine's config", "model_definition", "forward", independent(engine_config),
           "the two sides run different models on one set of weights",
           "a model built from the engine's config on the trainer's weights agrees"),
    probe("own logits", "model_definition", "forward", independent(own_logits),
           "the loss is not of the logits that the model makes",
           "with the log-probs of the model's own logits the trainer agrees"),
)  # fmt: skip
