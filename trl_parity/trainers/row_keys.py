"""Which rows of a batch are the same prompt with the same completion, whatever their padding, batch or rank."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..records import RolloutBatch

__all__ = ["picture_key", "prompt_keys", "row_keys"]

_PIXELS = 65_536  # numbers of a prompt's pictures that are looked at


def row_keys(rollout: RolloutBatch) -> torch.Tensor:
    """(B,) int64: equal for rows of equal tokens, and for others by chance of 2^-46 at most.

    Σ (id + 1) m_j modulo 2^64 over a row's tokens, m_j a mixed number of the place, counted from where prompt and
    completion meet.
    """
    before, after = rollout.prompt_ids, rollout.completion_ids
    wide = 1 << max(before.shape[1], after.shape[1]).bit_length()
    places = _multipliers(wide, before.device)
    ids = torch.cat([before, after], dim=1) + 1
    mask = torch.cat([rollout.prompt_mask.long(), rollout.completion_mask.long()], dim=1)
    return _of(rollout, (ids * mask * places[wide - before.shape[1] : wide + after.shape[1]]).sum(-1))


def prompt_keys(rollout: RolloutBatch) -> torch.Tensor:
    """(B,) int64: the same of prompts alone."""
    ids, mask = rollout.prompt_ids + 1, rollout.prompt_mask.long()
    wide = 1 << ids.shape[1].bit_length()
    return _of(rollout, (ids * mask * _multipliers(wide, ids.device)[wide - ids.shape[1] : wide]).sum(-1))


def picture_key(pixels: torch.Tensor) -> torch.Tensor:
    """() int64: of the pictures of a prompt, by their numbers' bits, evenly spaced ones where there are many."""
    some = pixels.flatten()[:: max(1, pixels.numel() // _PIXELS)].float().view(torch.int32).long()
    wide = 1 << len(some).bit_length()
    return _mixed((some * _multipliers(wide, some.device)[: len(some)]).sum() + pixels.numel())


def _of(rollout: RolloutBatch, sums: torch.Tensor) -> torch.Tensor:
    return _mixed(sums if rollout.image_keys is None else sums + rollout.image_keys)


@lru_cache(maxsize=16)
def _multipliers(wide: int, device: torch.device) -> torch.Tensor:
    """(2 ``wide``,) of the places -wide to wide - 1: the same of a place whatever ``wide`` is."""
    return _mixed(torch.arange(-wide, wide)).to(device)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Splitmix64's finalizer (Steele, Lea and Flood 2014), on shifts that keep the sign."""
    x = (x + 1) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)
