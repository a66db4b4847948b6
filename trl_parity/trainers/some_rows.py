"""Which rows of a ``Capture``'s batch are looked at where all would cost too much."""

from __future__ import annotations

from typing import Any

import torch

from ..records import RolloutBatch
from .row_keys import row_keys

__all__ = ["rows_of_tokens", "rows_within", "spread"]

_WIDEST = 16  # times the completion tokens wanted, prompts and padding included


def rows_within(capture: Any, rollout: RolloutBatch, token_budget: int) -> torch.Tensor:
    """Rows of the batch, evenly spaced, that fit the budget (at least one); another set from step to step.

    Rows with a token to compare; others only where a sharded model wants as many rows of every rank.
    """
    width = rollout.prompt_ids.shape[1] + rollout.completion_ids.shape[1]
    some = rollout.engine_mask.any(1)
    count = min(max(1, int(some.sum())), max(1, token_budget // width))
    return _evenly(capture, rollout, some, count)


def rows_of_tokens(capture: Any, rollout: RolloutBatch, tokens: int, least: int) -> torch.Tensor:
    """As ``rows_within``: different rows with about so many completion tokens; none where none has any.

    At least ``least`` rows over all ranks, as far as there are; no more than are 16 times as many tokens wide,
    prompts and padding included.
    """
    compared = rollout.engine_mask.sum(1)
    _, kind = row_keys(rollout).unique(return_inverse=True)
    places = torch.arange(len(kind), device=kind.device)
    first = torch.full_like(kind, len(kind)).scatter_reduce_(0, kind, places, "amin")
    some = (compared > 0) & (first[kind] == places)
    have = int(some.sum())
    width = rollout.prompt_ids.shape[1] + rollout.completion_ids.shape[1]
    wanted = -(-tokens * have // max(1, int(compared[some].sum())))
    needed = -(-least // capture.trainer.accelerator.num_processes)
    return _evenly(capture, rollout, some, min(have, max(needed, min(wanted, _WIDEST * tokens // width))))


def _evenly(capture: Any, rollout: RolloutBatch, some: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` rows of ``some`` (B,) bool, evenly spaced, from another one on at each step."""
    device, total = rollout.prompt_ids.device, len(rollout.prompt_ids)
    if capture.sharded:  # a sharded model's forward is a collective: every rank must run as many rows
        counts = capture.trainer.accelerator.gather(torch.tensor([count], device=device))
        count = min(int(counts[counts > 0].min()), total) if bool((counts > 0).any()) else 0
    rows = some.nonzero()[:, 0]
    if len(rows) < count:
        rows = torch.cat([rows, (~some).nonzero()[:, 0]])[:count]
    return rows[(torch.arange(count, device=device) * len(rows) // max(count, 1) + capture.step) % max(len(rows), 1)]


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` of the rows, evenly spaced."""
    return rows[torch.arange(count, device=rows.device) * len(rows) // max(1, count)]
