"""Which rows of a batch are the same prompt with the same completion, whatever their padding, batch or rank."""

from __future__ import annotations

import torch

from ..records import RolloutBatch

__all__ = ["row_keys"]


def row_keys(rollout: RolloutBatch) -> torch.Tensor:
    """(B,) int64: equal for rows of equal tokens, and for others by chance of 2^-46 at most.

    Σ (id + 1) m_j modulo 2^64 over a row's tokens, m_j a mixed number of the place, counted from where prompt and
    completion meet.
    """
    parts = (
        (rollout.prompt_ids, rollout.prompt_mask, lambda n: -torch.arange(n, 0, -1)),
        (rollout.completion_ids, rollout.completion_mask, torch.arange),
    )
    key = torch.zeros(len(rollout.prompt_ids), dtype=torch.int64, device=rollout.prompt_ids.device)
    for ids, mask, places in parts:
        multipliers = _mixed(places(ids.shape[1])).to(ids.device, non_blocking=True)
        key += ((ids + 1) * mask.long() * multipliers).sum(-1)
    return _mixed(key)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Splitmix64's finalizer (Steele, Lea and Flood 2014), on shifts that keep the sign."""
    x = (x + 1) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)
