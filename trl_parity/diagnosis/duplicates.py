"""Whether completions of one prompt are one draw: equal far more often than their probability allows."""

from __future__ import annotations

import math

import torch

from ..records import RolloutBatch

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
    logprobs = torch.where(mask, rollout.rollout_logprobs.double(), 0.0).nan_to_num(0.0).sum(1).cpu()
    probability = logprobs.clamp(max=0.0).exp().tolist()
    ids = torch.where(rollout.completion_mask.bool(), rollout.completion_ids, -1).cpu()
    prompts = torch.where(rollout.prompt_mask.bool(), rollout.prompt_ids, -1).cpu()
    some = mask.any(1).cpu().nonzero().squeeze(-1).tolist()
    pictures = [0] * len(prompts) if rollout.image_keys is None else rollout.image_keys.tolist()
    by_prompt: dict[tuple[bytes, int], list[int]] = {}
    for i in some:
        by_prompt.setdefault((prompts[i].numpy().tobytes(), pictures[i]), []).append(i)
    pairs, equal, chance = 0, 0, 0.0
    for rows in by_prompt.values():
        same: dict[bytes, int] = {}
        for i in rows:
            key = ids[i].numpy().tobytes()
            same[key] = same.get(key, 0) + 1
        pairs += math.comb(len(rows), 2)
        equal += sum(math.comb(n, 2) for n in same.values())
        chance += 0.5 * (len(rows) - 1) * sum(probability[i] for i in rows)
    return pairs, equal, chance


def duplicates_in_words(pairs: int, equal: int, chance: float) -> str:
    """What of it speaks for one draw handed out several times; "" where chance explains it, or there is nothing."""
    if equal < _PAIRS or equal < _EQUAL * pairs or chance > _CHANCE * equal:
        return ""
    return (
        f"{equal} of {pairs} pairs of completions of one prompt are equal, token by token; independent draws of their "
        f"probability would be in {chance:.2g}"
    )
