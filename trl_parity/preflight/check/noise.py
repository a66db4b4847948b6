"""The reference against itself, with activations rounded as a dtype rounds them: what is no fault of an engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import trials
from .drift import Gaps
from .reference import Reference, Scored
from .rows import Limits
from .trials import Answered

__all__ = ["coarser", "noise_of"]


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Of two dtypes the one with fewer digits; ``other`` where they have as many."""
    return one if torch.finfo(one).eps > torch.finfo(other).eps else other


def noise_of(
    reference: Reference,
    answered: Answered,
    plain: list[Scored],
    limits: Limits,
    *,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
    weights: Mapping[str, torch.Tensor],
    seed: int,
) -> dict[str, Gaps]:
    """What noise of each side's dtype makes of one trial.

    ``dtype``, ``head_dtype``: of the engine's side, on ``weights`` in place of the reference's own.
    """

    def noise(dtype: torch.dtype, head_dtype: torch.dtype, weights: Mapping[str, torch.Tensor]) -> Gaps:
        with reference.holding(weights), reference.rounded(dtype, head_dtype, seed=seed):
            return trials.against_itself(answered, trials.score(answered, reference), plain, limits)

    of_engine, own = noise(dtype, head_dtype, weights), reference.dtype
    alike = (dtype, head_dtype) == (own, own)  # one noise, of one seed
    return {"trainer": of_engine if alike else noise(own, own, {}), "engine": of_engine}
