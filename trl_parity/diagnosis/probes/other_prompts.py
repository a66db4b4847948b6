"""Answers that came back under another prompt of their batch: a few are scored under their neighbours' prompts."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...trainers.row_keys import prompt_keys
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..findings import EnginePrompts
from .base import Candidate, recomputed, with_forward

__all__ = ["under_another_prompt"]

_PROMPTS = 8  # of the batch, tried for each of the few; the nearest ones

_FITS = 0.1  # of the drift under its own prompt: what a sequence's true one leaves

_BY_REQUEST = (
    "match answers to prompts by the request's id, not by their order, in whatever stands between the engine's "
    "requests and the trainer (a queue, a router, a cache of answers)."
)


def under_another_prompt(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The few sequences under the prompts whose answers they are, where some are not their own's."""
    if batch.sharded or batch.rollout.image_keys is not None:
        return None
    few = batch.few.tolist()
    others = {at: _nearest(batch, at) for at in (int(batch.rows[i]) for i in few)}
    kept = current.kept & batch.of_few
    own, _ = batch.residual(replace(recomputed(current), kept=kept))
    least, prompts, whose = own[:, 0].clone(), {}, {}
    for n in range(max(map(len, others.values()), default=0)):
        tried = {at: batch.prompt(rows[n], None) for at, rows in others.items() if n < len(rows)}
        other = with_forward(current, layout="unpadded", prompts=EnginePrompts(tried), few=True)
        left, _ = batch.residual(replace(other, kept=kept))
        for i in few:
            at = int(batch.rows[i])
            if at in tried and left[i, 0] < min(_FITS * own[i, 0], least[i]):
                least[i], prompts[at], whose[at] = left[i, 0], tried[at], others[at][n]
    if not prompts:
        return None
    found = with_forward(current, layout="unpadded", prompts=EnginePrompts(prompts), few=True)
    pairs = ", ".join(f"row {at} to the prompt of row {row}" for at, row in sorted(whose.items()))
    return Candidate(
        counterfactual=replace(found, kept=kept),
        cause="token_misalignment",
        over=batch.of_few,
        finding=f"{len(prompts)} of {len(few)} sequences looked at answer another prompt of the batch: {pairs}",
        fix=_BY_REQUEST,
        details={"answers_of": {str(at): row for at, row in whose.items()}},
    )


def _nearest(batch: DiagnosedBatch, at: int) -> list[int]:
    """Rows of the rollout batch, one of each of the nearest other prompts."""
    keys = prompt_keys(batch.rollout).cpu()
    order = (torch.arange(len(keys)) - at).abs().argsort(stable=True).tolist()
    first: dict[int, int] = {int(keys[at]): at}
    for row in order:
        first.setdefault(int(keys[row]), row)
    return [row for row in first.values() if row != at][:_PROMPTS]
