"""What a probe is, and the ways to change one thing in a world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..counterfactual import Scene, Variant, World
from ..distribution import Law

# What a probe needs, in the order they are run: what can be found on the run itself comes before fits to its numbers.
COSTS = ("none", "repeat", "head", "weights", "forward", "engine", "fit", "singles", "last")

FREE = ("none", "repeat", "head", "fit", "last")  # run whatever the budget: one recompute, or what was asked already


class NotPossible(Exception):
    """This setup can't be asked; the text says why."""


def require_engine(scene: Scene) -> None:
    """Raise NotPossible where there is none, as with a trainer that samples by itself."""
    if scene.capture.generation is None:
        raise NotPossible("there is no engine: the trainer samples by itself")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The world with one cause undone. ``over``: tokens (N,) on which it is compared; None: all that are kept."""

    world: World
    finding: str
    cause: str = ""  # where the probe itself tells several apart
    over: torch.Tensor | None = None
    values: int = 1  # fitted to the data
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A hypothesis, what it predicts, and the counterfactual that tests it."""

    name: str
    cause: str
    hypothesis: str
    prediction: str
    cost: str
    run: Callable[[Scene, World], Candidate | None]
    exact: bool = False  # a fitted law: the true one leaves next to nothing, one that leaves much is not it


def redone(world: World) -> World:
    """The world with the trainer's numbers from a forward pass of ours, where they are still as scored."""
    return world if world.variant is not None else replace(world, variant=Variant())


def with_law(world: World, law: Law) -> World:
    """The world with another law."""
    return replace(redone(world), law=law)


def with_variant(world: World, **changes: Any) -> World:
    """The world with fields of its forward pass changed."""
    world = redone(world)
    assert world.variant is not None
    return replace(world, variant=replace(world.variant, **changes))


def mean(scene: Scene, world: World) -> float:
    """The residual per token of this rank."""
    sums, _ = scene.residual(world)
    return float(sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1))


FITS = "a fitted value explains the drift, and is not the configured one"


def probe(
    name: str, cause: str, cost: str, run: Callable[[Scene, World], Candidate | None], hypothesis: str, prediction: str
) -> Probe:
    """A probe, its fields in reading order."""
    exact = prediction == FITS
    return Probe(name=name, cause=cause, cost=cost, run=run, hypothesis=hypothesis, prediction=prediction, exact=exact)


def number(x: torch.Tensor) -> str:
    """Its mean, for people."""
    return f"{float(x.mean()):.3g}" if len(x) else "-"


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, for people."""
    return str(dtype).removeprefix("torch.")
