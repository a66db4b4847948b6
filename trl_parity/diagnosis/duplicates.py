"""Whether completions of one prompt are one draw: equal far more often than their probability allows."""

from __future__ import annotations

import torch

from ..metrics.equal_rows import equal_pairs
from ..records import RolloutBatch
from ..trainers.row_keys import keys_of

__all__ = ["collisions", "duplicates_in_words"]

_EQUAL = 0.1  # share of pairs of one prompt that are equal, from which on: of eight, each twice, it is a seventh

_PAIRS = 3  # so many equal pairs at least

_CHANCE = 0.1  # of the share that is equal: what their probability accounts for at most


def collisions(rollout: RolloutBatch) -> tuple[int, int, float]:
    """Pairs of completions of one prompt in a rank's batch: all of them, equal ones, and how many would be by chance.

    Two independent draws of a law p are equal with probability E[p(x)]: of a pair, the mean of the two probabilities
    that the engine reported for its sequences. Rows without an engine's token count for nothing.
    """
    mask = rollout.engine_mask
    some = mask.any(1)
    logprobs = torch.where(mask, rollout.rollout_logprobs.double(), 0.0).nan_to_num(0.0).sum(1)
    draws, prompts = (keys[some].unique(return_inverse=True)[1] for keys in keys_of(rollout))
    return equal_pairs(*(x.cpu().numpy() for x in (draws, prompts, logprobs[some])))


def duplicates_in_words(pairs: int, equal: int, chance: float) -> str:
    """What of it speaks for one draw handed out several times; "" where chance explains it, or there is nothing."""
    if equal < _PAIRS or equal < _EQUAL * pairs or chance > _CHANCE * equal:
        return ""
    return (
        f"{equal} of {pairs} pairs of completions of one prompt are equal, token by token; independent draws of their "
        f"probability would be in {chance:.2g}"
    )
