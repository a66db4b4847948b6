"""The tokens of a batch on which engine and trainer disagree most, as rows of a table."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .distributed import gather_rows
from .records import RolloutBatch, ScoredBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["worst_tokens", "worst_tokens_of_all"]

logger = logging.getLogger(__name__)


def worst_tokens(
    rollout: RolloutBatch, scored: ScoredBatch, count: int, decode: Callable[[list[int]], str] | None
) -> list[dict[str, Any]]:
    """The ``count`` compared tokens of largest finite |Δ|, worst first; ids and text only with ``decode``."""
    if count == 0 or scored.mask.shape != rollout.completion_ids.shape:  # a sample was scored: rows don't line up
        return []
    delta = scored.trainer_logprobs - scored.rollout_logprobs
    size = torch.where(scored.mask & torch.isfinite(delta), delta.abs(), -1.0).flatten()
    picked = size.topk(min(count, size.numel()))
    rows: list[dict[str, Any]] = []
    for value, flat in zip(picked.values.tolist(), picked.indices.tolist(), strict=True):
        if value < 0:
            break
        b, t = divmod(flat, delta.shape[1])
        row: dict[str, Any] = {"sequence": b, "position": t}
        if decode is not None:
            token_id = int(rollout.completion_ids[b, t])
            row |= {"token_id": token_id, "token": decode([token_id])}
        rows.append(
            row
            | {
                "rollout_logprob": float(scored.rollout_logprobs[b, t]),
                "trainer_logprob": float(scored.trainer_logprobs[b, t]),
                "log_ratio": float(delta[b, t]),
            }
        )
    return rows


def worst_tokens_of_all(
    last: tuple[RolloutBatch, ScoredBatch] | None,
    step: int,
    count: int,
    decode: Callable[[list[int]], str] | None,
    accelerator: Accelerator,
) -> list[dict[str, Any]]:
    """:func:`worst_tokens` over all ranks, with ``step`` and ``rank``; every rank calls it, with its batch or None."""
    rows: list[dict[str, Any]] = []
    try:
        if last is not None:
            found = worst_tokens(*last, count, decode)
            rows = [{"step": step, "rank": accelerator.process_index, **row} for row in found]
    except Exception as e:  # a tokenizer that can't decode one token must not end a run
        logger.warning("the worst tokens of step %d cannot be shown: %s: %s", step, type(e).__name__, e)
    if accelerator.num_processes > 1:
        rows = gather_rows(rows)
    return sorted(rows, key=lambda row: -abs(row["log_ratio"]))[:count]
