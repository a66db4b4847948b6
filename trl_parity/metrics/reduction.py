"""One reduction per window: after it every rank holds the same numbers, and so reaches the same verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .sums import MismatchSums

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["reduce_many", "reduce_sums"]


def reduce_sums(sums: MismatchSums, accelerator: Accelerator) -> MismatchSums:
    """Sums and maxima over all ranks: two collectives, about 19 KiB, constant in tokens. Every rank must call it."""
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
    import torch

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
