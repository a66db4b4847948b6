"""One reduction per window: after it every rank holds the same numbers, and so reaches the same verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .sums import MismatchSums

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["reduce_many", "reduce_sums"]


def reduce_sums(sums: MismatchSums, accelerator: Accelerator) -> MismatchSums:
    """Sums and maxima over all ranks: two collectives, about 28 KiB, constant in tokens. Every rank must call it.

    Of each rank 24 bytes more come to all: ``by_rank``.
    """
    if accelerator.num_processes == 1:
        return sums
    import torch

    # reduce() works in place on some backends: hand it a copy
    additive = accelerator.reduce(sums.additive.clone(), reduction="sum")
    gathered = accelerator.gather(torch.cat([sums.maxima, sums.replica], dim=-1).unsqueeze(0))
    most, by_rank = gathered.split([sums.maxima.shape[-1], sums.replica.shape[-1]], dim=-1)
    out = MismatchSums(additive, most.amax(0), sums.bootstrap_samples)
    out.by_rank = torch.cat([by_rank, most[..., :2]], dim=-1)
    return out


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
