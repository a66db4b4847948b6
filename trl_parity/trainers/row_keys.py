"""Which rows of a batch are the same prompt with the same completion, whatever their padding, batch or rank."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..records import RolloutBatch

__all__ = ["keys_of", "picture_key", "prompt_keys", "row_keys"]

_PIXELS = 65_536  # numbers of a prompt's pictures that are looked at


def row_keys(rollout: RolloutBatch) -> torch.Tensor:
    """(B,) int64: equal for rows of equal tokens, and for others by chance of 2^-46 at most.

    Σ (id + 1) m_j modulo 2^64 over a row's tokens, m_j a mixed number of the place, counted from where prompt and
    completion meet.
    """
    return keys_of(rollout)[0]


def prompt_keys(rollout: RolloutBatch) -> torch.Tensor:
    """(B,) int64: the same of prompts alone."""
    return _of(rollout, _prompt_sums(rollout))


def keys_of(rollout: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Both: of rows, and of their prompts."""
    before, ids = _prompt_sums(rollout), rollout.completion_ids
    wide = 1 << ids.shape[1].bit_length()
    after = _sums(ids, rollout.completion_mask, _multipliers(wide, ids.device)[wide : wide + ids.shape[1]])
    return _of(rollout, before + after), _of(rollout, before)


def _prompt_sums(rollout: RolloutBatch) -> torch.Tensor:
    ids = rollout.prompt_ids
    wide = 1 << ids.shape[1].bit_length()
    return _sums(ids, rollout.prompt_mask, _multipliers(wide, ids.device)[wide - ids.shape[1] : wide])


def _sums(ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return ((ids + 1) * mask.long() * places).sum(-1)


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
    return _mixed(2 * torch.arange(-wide, wide)).to(device)  # even, so that none is 0


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """Splitmix64's finalizer (Steele, Lea and Flood 2014), on shifts that keep the sign."""
    x = (x + 1) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)
