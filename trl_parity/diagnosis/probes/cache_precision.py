"""Probes of the engine's key-value cache: rounded as it may be, does the trainer agree?"""

from __future__ import annotations

from dataclasses import replace

from ...scoring.cache_grids import coarser_grids, declared_grids
from ...scoring.dtypes import dtype_name
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..findings import NOTHING, Findings
from .base import (
    Candidate,
    NothingThere,
    NotPossible,
    Probe,
    Unexplained,
    independent,
    mean_residual,
    probe,
    recomputed,
    require_engine,
    with_forward,
)

__all__ = ["CACHE"]

_LEFT = 0.75  # of the excess over the floor on the few: a grid that leaves more is not tried on all

_SCALES = 0.01  # a grid that makes numbers smaller by more may be mistaken for a scale

_AS_WELL = 1.05  # times what the grid leaves of the drift: a scale that leaves no more explains it as well

_ROUNDED_CACHE = (
    "no setting of this engine asks for a coarse KV cache, and it has one: find what rounds keys and values on their "
    "way into it or back (a connector that moves or offloads blocks, another attention backend, a patch), and take it "
    "out or leave the cache in the engine's dtype."
)


def kv_cache(batch: DiagnosedBatch, current: Counterfactual, findings: Findings) -> tuple[Candidate | None, Findings]:
    """The trainer attends to keys and values rounded as in the engine's cache."""
    name = _setting(batch)
    ways = [with_forward(current, cache_grid=grid) for grid in declared_grids(name)]
    if not ways:
        return None, NOTHING
    best = min(ways, key=lambda w: mean_residual(batch, w))
    moved = float((batch.log_probs(best) - batch.log_probs(recomputed(current))).abs().mean())
    candidate = Candidate(
        counterfactual=best,
        finding=f"kv_cache_dtype of the live engine is {name}; rounded alike, the trainer moves by {moved:.3g} nats",
        details={"kv_cache_dtype": name, "moved": moved},
    )
    return candidate, Findings(cache_moved=moved)


def _setting(batch: DiagnosedBatch) -> str:
    require_engine(batch)
    if batch.engine is None:
        raise NotPossible("the engine's settings are not at hand on this rank, or the server does not tell them")
    return str(batch.engine.settings()["kv_cache_dtype"])


def undeclared(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The grid that explains the drift though no setting asks for it: looked for on the few sequences first."""
    if declared_grids(name := _setting(batch)):
        return None
    if batch.sharded:
        raise NothingThere("the policy is sharded over ranks: one pass over its weights is made, and no other")
    assert batch.engine is not None
    dtype = batch.engine.dtype
    few, grids = current.kept & batch.of_few, coarser_grids(dtype)
    before = mean_residual(batch, replace(recomputed(current), kept=few))
    try:
        left = [mean_residual(batch, replace(with_forward(current, cache_grid=x, few=True), kept=few)) for x in grids]
    except (TypeError, ValueError, AttributeError, NotImplementedError) as e:  # no memory, say, is a failure
        raise NothingThere(f"the policy's attention takes no cache of ours ({type(e).__name__}: {e})") from e
    excess = before - batch.floor
    if not left or excess <= 0.0 or min(left) - batch.floor > _LEFT * excess:
        return None
    grid = grids[left.index(min(left))]
    if abs(grid.scale - 1.0) > _SCALES:
        scaled = replace(with_forward(current, cache_grid=grid.only_scaled(), few=True), kept=few)
        if mean_residual(batch, scaled) <= _AS_WELL * min(left):
            raise Unexplained(
                f"with keys and values scaled by {grid.scale:.2f} the trainer is as near to the engine as with them "
                f"in {grid.name}: something makes attention's answer another, and no grid does"
            )
    return Candidate(
        counterfactual=with_forward(current, cache_grid=grid),
        finding=f"kv_cache_dtype of the live engine is {name}, its dtype {dtype_name(dtype)}; with keys and values in "
        f"{grid.name} the trainer agrees",
        fix=_ROUNDED_CACHE if name == "auto" else "",  # else of a kind that is not replayed exactly
        details={"cache_grid": grid.name},
    )


CACHE: tuple[Probe, ...] = (
    probe("cache precision", "kv_cache_precision", "forward", kv_cache,
           "the engine's KV cache is quantized", "with keys and values rounded alike, the trainer agrees",
           gives=("cache_moved",)),
    probe("cache of another precision", "kv_cache_precision", "singles", independent(undeclared),
           "keys and values are rounded on their way through the cache, and no setting says so",
           "with keys and values on one of a few grids, the trainer agrees"),
)  # fmt: skip
