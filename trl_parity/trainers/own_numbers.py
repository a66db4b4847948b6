"""Whether the trainer's own log-probs can have come from its head on the hidden states that were scored."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakSet

import torch

from ..errors import InterceptionError
from ..scoring.own_head import OwnHeadRounding
from ..scoring.scorer import CompletionScores

__all__ = ["behind"]

logger = logging.getLogger(__name__)

# The own head's log-probs differ from the fp32 head's by rounding alone: by no more nats a token, in the mean, than a
# rule would look at, and a few times what rounding logits to its dtype does (TRL before 1.16 rounds more than logits).
_SAME, _SAME_ROUNDINGS = 0.003, 3.0

_told: WeakSet[Any] = WeakSet()  # trainers whose own numbers are not those of the pass that was watched


def behind(
    trainer: Any, policy: Any, scores: CompletionScores | None, own: torch.Tensor, mask: torch.Tensor, *, replays: bool
) -> CompletionScores | None:
    """The scores, if the own head on the same hidden states can have given the trainer's numbers; else None.

    Raises InterceptionError where the engine's sampling ``replays`` on the trainer's side, which needs them.
    """
    if scores is None:
        seen = "come from no forward of the policy's backbone"
    elif scores.plain.shape != own.shape:
        seen = f"are {tuple(own.shape)} where the policy's passes give {tuple(scores.plain.shape)}"
    else:
        theirs = own.to(scores.plain)
        both = mask if scores.weights is None else mask & (scores.weights > 0)
        gaps = (theirs - scores.plain)[both & (theirs.isfinite() | scores.plain.isfinite())]
        gap = float(gaps.double().abs().mean()) if len(gaps) else 0.0  # waits for the device
        rounding = OwnHeadRounding.of(policy).nats
        if gap <= _SAME + _SAME_ROUNDINGS * rounding:  # a number that one side alone has is no agreement
            return scores
        seen = (
            f"are {gap:.3g} nats a token from what its head makes of the hidden states of the same pass (rounding "
            f"explains {rounding:.1g})"
        )
    text = (
        f"the trainer's own log-probs (old_per_token_logps) {seen}. Expected TRL's method. Is "
        "_get_per_token_logps_and_entropies replaced by a subclass or a library, or is there an adapter on the LM "
        "head that TRL's fused head leaves out?"
    )
    if replays:
        raise InterceptionError(
            f"{text} The engine's truncation can't be replayed on such numbers: use TRL's method, or "
            "truncation='ignore', the default."
        )
    if trainer not in _told:
        _told.add(trainer)
        logger.warning("%s The verdict is about these numbers, without entropy and the fp32 head's share.", text)
    return None
