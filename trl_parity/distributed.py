"""One reduction per window: after it every rank holds the same numbers, and so reaches the same verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import ConfigError
from .metrics import MismatchSums

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["drop_gradient", "fail_together", "gather_rows", "reduce_many", "reduce_sums"]


def reduce_sums(sums: MismatchSums, accelerator: Accelerator) -> MismatchSums:
    """Sums and maxima over all ranks: two collectives, about 17 KiB, constant in tokens. Every rank must call it."""
    if accelerator.num_processes == 1:
        return sums
    # reduce() works in place on some backends: hand it a copy
    additive = accelerator.reduce(sums.additive.clone(), reduction="sum")
    maxima = accelerator.gather(sums.maxima.unsqueeze(0)).amax(0)
    return MismatchSums(additive, maxima, sums.bootstrap_samples)


def reduce_many(many: Sequence[MismatchSums], accelerator: Accelerator) -> list[MismatchSums]:
    """Several sums of one size in the same two collectives. Every rank must call it with as many."""
    if accelerator.num_processes == 1:
        return list(many)
    stacked = MismatchSums(
        torch.stack([sums.additive.to(accelerator.device) for sums in many]),
        torch.stack([sums.maxima.to(accelerator.device) for sums in many]),
        many[0].bootstrap_samples,
    )
    reduced = reduce_sums(stacked, accelerator)
    return [
        MismatchSums(additive, maxima, reduced.bootstrap_samples)
        for additive, maxima in zip(reduced.additive, reduced.maxima, strict=True)
    ]


def gather_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks, in rank order, on every rank. Every rank must call it."""
    from accelerate.utils import gather_object

    return gather_object(rows)


def fail_together(error: str, world_size: int) -> None:
    """Raise ConfigError on every rank where one has something to say, in its words. Every rank must call it."""
    if world_size > 1:
        error = next((row["error"] for row in gather_rows([{"error": error}]) if row["error"]), "")
    if error:
        raise ConfigError(error)


def drop_gradient(optimizer: Any, accelerator: Accelerator) -> None:
    """Leave the optimizer nothing to apply: parameters without a gradient are skipped, moments and decay included."""
    scaler = accelerator.scaler
    if scaler is not None and scaler.is_enabled():
        accelerator.unscale_gradients(optimizer)  # fp16: the scaler wants to have seen gradients before it steps
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
