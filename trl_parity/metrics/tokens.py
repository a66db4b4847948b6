"""Tokens of a batch as rows of tables: those on which engine and trainer disagree most, and a uniform sample."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..collectives import gather_rows
from ..records import RolloutBatch, ScoredBatch

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

__all__ = ["sample_tokens", "tokens_of_all", "worst_tokens"]

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def worst_tokens(
    rollout: RolloutBatch, scored: ScoredBatch, count: int, decode: Callable[[list[int]], str] | None
) -> Rows:
    """The ``count`` compared tokens of largest finite |Δ|, worst first; ids and text only with ``decode``.

    ``sequence`` is the row of the rollout batch, also where only a sample of its rows was scored.
    """
    import torch

    delta = scored.trainer_logprobs - scored.rollout_logprobs
    size = torch.where(scored.mask & torch.isfinite(delta), delta.abs(), -1.0).flatten()
    picked = size.topk(min(count, size.numel()))
    flat = picked.indices[picked.values >= 0]
    row, position = flat // delta.shape[1], flat % delta.shape[1]
    sequence = row if scored.rows is None else scored.rows.to(row.device)[row]
    places = torch.stack([sequence, position])
    rows: Rows = [{"sequence": at, "position": t} for at, t in places.T.tolist()]
    if decode is not None:
        for found, token_id in zip(
            rows, rollout.completion_ids[tuple(places.to(rollout.completion_ids.device))].tolist(), strict=True
        ):
            found |= {"token_id": token_id, "token": decode([token_id])}
    return [found | numbers for found, numbers in zip(rows, _numbers(scored, flat), strict=True)]


def sample_tokens(scored: ScoredBatch, count: int, seed: int) -> Rows:
    """``count`` scored tokens with a finite Δ, drawn uniformly without replacement: numbers only, no ids, no text.

    The global random state is not touched.
    """
    import torch

    delta = scored.trainer_logprobs - scored.rollout_logprobs
    known = scored.mask if scored.weights is None else scored.mask & (scored.weights > 0)
    found = (known & torch.isfinite(delta)).flatten().nonzero().flatten().cpu()
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    flat = found[order]
    positions = (flat % delta.shape[1]).tolist()
    numbers = _numbers(scored, flat.to(delta.device), entropy=True)
    return [{"position": t, **row} for t, row in zip(positions, numbers, strict=True)]


def tokens_of_all(
    last: tuple[RolloutBatch, ScoredBatch] | None,
    step: int,
    worst: int,
    sample: int,
    decode: Callable[[list[int]], str] | None,
    accelerator: Accelerator,
) -> tuple[Rows, Rows]:
    """Over all ranks: ``worst_tokens``, with ``step`` and ``rank``, and ``sample_tokens``.

    A collective: every rank calls it, with its batch or None.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine: dict[str, Rows] = {"worst": [], "sample": []}
    try:
        if last is not None:
            mine["sample"] = sample_tokens(last[1], -(-sample // ranks), seed=step * ranks + rank)
            mine["worst"] = [{"step": step, "rank": rank, **row} for row in worst_tokens(*last, worst, decode)]
    except Exception as e:  # a tokenizer that can't decode one token must not end a run
        logger.warning("the tokens of step %d cannot be shown: %s: %s", step, type(e).__name__, e)
    parts = gather_rows([mine]) if ranks > 1 else [mine]
    ordered = sorted((row for part in parts for row in part["worst"]), key=lambda row: -abs(row["log_ratio"]))
    return ordered[:worst], [row for part in parts for row in part["sample"]][:sample]


def scored_rows(scored: ScoredBatch) -> list[int]:
    """The row of the rollout batch behind each row of the scores."""
    return list(range(len(scored.mask))) if scored.rows is None else scored.rows.tolist()


def _numbers(scored: ScoredBatch, flat: torch.Tensor, *, entropy: bool = False) -> Rows:
    """Log-probs and log-ratio of the tokens at these places of the flattened batch, in one transfer."""
    import torch

    rollout, trainer = scored.rollout_logprobs, scored.trainer_logprobs
    columns = {"rollout_logprob": rollout, "trainer_logprob": trainer, "log_ratio": trainer - rollout}
    if entropy and scored.entropy is not None:
        columns["entropy"] = scored.entropy
    values = torch.stack([x.flatten()[flat].double() for x in columns.values()], dim=-1).tolist()
    missing = {"entropy": None} if entropy and scored.entropy is None else {}
    return [missing | dict(zip(columns, row, strict=True)) for row in values]
