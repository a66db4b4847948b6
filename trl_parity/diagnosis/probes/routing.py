"""A probe of a mixture of experts: do both sides take the same experts for one hidden state?

Routers flip for any reason there is: whatever moves hidden states moves some across a border. So each layer's router
is asked alone, on the engine's own hidden states; only where it takes others there, or other weights, is it a cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...engine.routing import Routed
from ...scoring.dtypes import dtype_name
from ...scoring.experts import ExpertLayer, Forced, expert_layers
from ...scoring.model_head import causal_lm
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..findings import NOTHING, Findings
from ..forward_passes import ForcedRouting
from .asking import on_trainers_weights, whole_sequences
from .base import Candidate, NothingThere, NotPossible, Probe, probe, with_forward

__all__ = ["ROUTING", "apart"]

_NARROW = (torch.bfloat16, torch.float16)

_WEIGHT = 0.02  # of a token's weights together: bf16 rounds them by .004

_LISTED = 4


def moe_routing(
    batch: DiagnosedBatch, current: Counterfactual, findings: Findings
) -> tuple[Candidate | None, Findings]:
    """As if the trainer's routers took what the engine's do, where they part on the engine's own hidden states."""
    layers = expert_layers(causal_lm(batch.model))
    if not layers:
        raise NothingThere("the policy has no experts")
    engine = on_trainers_weights(batch, findings)
    if engine is None:
        return None, NOTHING
    if batch.sharded:
        raise NotPossible("the policy is sharded over ranks: no router of it is asked alone")
    prompts = findings.engine_prompts
    by_row: dict[int, list[Forced]] = {}
    over = torch.zeros(len(batch), dtype=torch.bool)
    shares = torch.zeros(len(layers), 2)  # of tokens: other experts, other weights
    tokens, why = 0, ""
    for whole in whole_sequences(batch, engine, prompts):
        theirs = engine.routing(whole.ids)
        if len(theirs) != len(layers):
            raise NotPossible(f"the engine routes in {len(theirs)} layers, the policy has experts in {len(layers)}")
        by_row[whole.at] = []
        for i, (layer, routed) in enumerate(zip(layers, theirs, strict=True)):
            forced, kinds = apart(*layer.choice(routed.hidden), routed)
            by_row[whole.at].append(forced)
            shares[i] += kinds
            why = why or (_why(layer, routed) if kinds.any() else "")
        tokens += len(whole.ids)
        over[whole.tokens] = True
    shares /= tokens
    if not shares.any():
        return None, NOTHING
    routing = ForcedRouting(by_row, tuple(layers))
    other = with_forward(current, layout="unpadded", few=True, routing=routing, prompts=prompts)
    candidate = Candidate(
        counterfactual=replace(other, kept=current.kept & over),
        over=over,
        finding=_in_words([layer.name for layer in layers], shares) + why,
        fix=_BIAS if "correction bias" in why else "",
        details={"routing": {layer.name: share.tolist() for layer, share in zip(layers, shares, strict=True)}},
    )
    return candidate, NOTHING


_BIAS = (
    "the routers' correction bias is a buffer, and a weight sync delivers parameters: deliver it too "
    "(llm_model.load_weights of the policy's named_buffers() after each sync), or keep it fixed in training."
)


def apart(experts: torch.Tensor, weights: torch.Tensor, routed: Routed) -> tuple[Forced, torch.Tensor]:
    """Where the trainer's choice (n, k) and the engine's part; and how many tokens take other experts, other weights.

    The engine may scale a layer's weights at another place: they are compared up to the factor of the tokens in which
    both take the same experts.
    """
    if experts.shape != routed.experts.shape:
        raise NotPossible(
            f"the engine takes {routed.experts.shape[-1]} experts a token, the trainer {experts.shape[-1]}"
        )
    ours, at = experts.cpu().sort(-1)
    own = weights.float().cpu().gather(1, at)
    other, at = routed.experts.cpu().sort(-1)
    same, given = (ours == other).all(-1), routed.weights.cpu()
    factor = (own.sum(-1) / given.sum(-1))[same].median() if same.any() else torch.tensor(1.0)
    given = given * factor
    gap = (given.gather(1, at) - own).abs().amax(-1) / own.sum(-1).abs().clamp(min=1e-9)
    reweighed = same & (gap > _WEIGHT)
    forced = Forced(tokens=~same | reweighed, experts=routed.experts.cpu(), weights=given)
    return forced, torch.stack([(~same).sum(), reweighed.sum()]).float()


def _why(layer: ExpertLayer, routed: Routed) -> str:
    """What of the two routers is not alike, where it can be seen."""
    held = {name: b for name, b in layer.block.named_buffers() if name.endswith("correction_bias")}
    held |= {name: b for name, b in layer.block.named_parameters() if name.endswith("correction_bias")}
    for name, bias in held.items():
        if routed.bias is not None and bias.shape == routed.bias.shape:
            gap = bias.detach().float().cpu() - routed.bias.cpu()
            if float(gap.max() - gap.min()) > 1e-6:  # one number on all changes no choice
                return f"; its correction bias ({name}) is not the engine's, by {float(gap.abs().max()):.3g} at most"
    logits = routed.logits
    for narrow in _NARROW:
        if narrow.itemsize < logits.dtype.itemsize and torch.equal(logits.to(narrow).to(logits.dtype), logits):
            return f"; the engine's router logits are {dtype_name(narrow)} numbers"
    return ""


def _in_words(names: Sequence[str], shares: torch.Tensor) -> str:
    parts = [
        f"{name} {words} for {share:.1%} of tokens"
        for name, row in zip(names, shares.tolist(), strict=True)
        for words, share in zip(("others", "the same with other weights"), row, strict=True)
        if share
    ]
    more = f" and {len(parts) - _LISTED} more" if len(parts) > _LISTED else ""
    listed = ", ".join(parts[:_LISTED]) + more
    return f"on the engine's own hidden states the trainer's routers take other experts: {listed}"


ROUTING: tuple[Probe, ...] = (
    probe("routing", "moe_routing", "engine", moe_routing,
          "the two sides take other experts for the same hidden states",
          "where its routers take the engine's experts, the trainer agrees",
          uses=("engine_prompts", "engine_weights")),
)  # fmt: skip
