"""What is tried on the reference's side: its own noise, and the engine's cache, config and weights in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...engine.weight_readback import HeldTensor, read_back
from ...scoring.cache_grids import coarser_grids, declared_grids
from ...scoring.dtypes import dtype_name
from . import trials
from .drift import Counterfactuals, Drift, Gaps, drift_of
from .noise import coarser
from .subject import Subject

__all__ = ["held_tensors", "measure_floors", "what_if"]


def measure_floors(subject: Subject) -> dict[str, Any]:
    """JSON of ``Floors``, on a few trials."""
    each = subject.noises()
    out = {side: sum((one[side] for one in each), Gaps()).to_json() for side in ("trainer", "engine")}
    return out | {
        "trainer_dtype": dtype_name(subject.reference.dtype),
        "engine_dtype": dtype_name(coarser(subject.engine.dtype, subject.reference.dtype)),
    }


def held_tensors(subject: Subject) -> tuple[list[HeldTensor] | None, str, bool]:
    """The engine's side of each of the reference's tensors; None, and why, where it can't be read.

    And whether it should have been: what is quantized or spread over ranks has no such side.
    """
    engine = subject.engine
    if engine.tensor_parallel > 1 or engine.settings()["quantization"] is not None:
        return None, "the engine's weights are quantized or spread over ranks: they can't be read back", False
    named = {name: t.to(subject.reference.dtype) for name, t in subject.reference.named_tensors()}
    try:
        held = read_back(engine.model.load_weights, engine.model, named.items())
        # an engine of more digits than the trainer has: alike once rounded, and delivered so by the first sync
        return (
            [
                replace(t, differing=0) if t.values is not None and torch.equal(t.values, named[t.name]) else t
                for t in held
            ],
            "",
            True,
        )
    except Exception as e:
        return None, f"the engine's load_weights does not take the trainer's tensors: {type(e).__name__}: {e}", True


def what_if(
    subject: Subject, drift: Drift, differs: Mapping[str, Any], held: Sequence[HeldTensor] | None
) -> Counterfactuals:
    """The drift of a few trials with one thing undone at a time."""
    if not drift.excessive:
        return Counterfactuals(0.0, 0.0, {})
    reference, undone = subject.reference, {}

    limits, probed = subject.settings.limits, subject.probed()

    def left() -> float:
        return drift_of(sum((trials.compare(answered, reference, limits) for answered, _ in probed), Gaps()))

    base = drift_of(sum((trials.compared(answered, plain, limits) for answered, plain in probed), Gaps()))
    told = declared_grids(str(subject.engine.settings()["kv_cache_dtype"]))
    for grid in told or coarser_grids(subject.engine.dtype):  # told nothing, the engine may still do it
        with reference.cached_on(grid):
            undone[f"kv:{grid.name}"] = left()
    if differs:
        try:
            with reference.built_from(subject.engine.hf_config):
                undone["config"] = left()
        except Exception:  # a config this class of model can't be built from: the row says what differs
            pass
    values = {t.name: t.values for t in held or () if t.differing and t.values is not None}
    if values:
        with reference.holding(values):
            undone["weights"] = left()
    return Counterfactuals(base, drift_of(drift.floors.engine), undone)
