"""The tokens of a batch on which engine and trainer disagree most, as rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .records import RolloutBatch, ScoredBatch

__all__ = ["worst_tokens"]


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
