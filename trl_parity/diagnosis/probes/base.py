"""What a probe is, and the ways to change one thing in a counterfactual."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..counterfactual import Counterfactual, DiagnosedBatch
from ..distribution import Distribution
from ..findings import NAMES, NOTHING, Findings
from ..forward_passes import ForwardPass

# What a probe costs, in the order they are run: what can be found on the run itself comes before fits to its numbers.
COSTS = ("none", "repeat", "head", "weights", "forward", "engine", "fit", "singles", "last")

FREE = ("none", "repeat", "head", "fit", "last")  # run whatever the budget: one recompute, or what was asked already


class NotPossible(Exception):
    """This setup can't be asked; the text says why. ``found``: for other probes, all the same."""

    def __init__(self, why: str, found: Findings = NOTHING):
        super().__init__(why)
        self.found = found


class NothingThere(NotPossible):
    """What would be asked is not in this setup, so the cause is not either."""


class Unexplained(NothingThere):
    """Something was seen, in the text, that no cause follows from."""


def require_engine(batch: DiagnosedBatch) -> None:
    """Raise NothingThere without one, as with a trainer that samples by itself."""
    if batch.capture.generation is None:
        raise NothingThere("there is no engine: the trainer samples by itself")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A counterfactual with one more cause undone. ``over``: tokens (N,) it is compared on; None: all kept ones."""

    counterfactual: Counterfactual
    finding: str
    cause: str = ""  # where the probe itself tells several apart
    over: torch.Tensor | None = None
    values: int = 1  # fitted to the data
    fix: str = ""  # where what was seen asks for another than its cause's
    most: float = 1.0  # confidence there can be: less where what was seen has other causes as well
    details: dict[str, Any] = field(default_factory=dict)


# of the batch, what is explained so far, and what earlier probes found: the candidate (None: looked, found nothing to
# undo) and what was found for later ones
Run = Callable[[DiagnosedBatch, Counterfactual, Findings], tuple[Candidate | None, Findings]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A hypothesis, what it predicts, and the counterfactual that tests it.

    A probe sees the findings it ``needs`` or ``uses`` and no others, and gives those it names and no others. Without
    one it needs it is not possible; one it uses may be missing.
    """

    name: str
    cause: str
    hypothesis: str
    prediction: str
    cost: str
    run: Run
    fitted: bool = False  # values fitted to the numbers: the true ones leave next to nothing, others are not it
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()

    def look(
        self, batch: DiagnosedBatch, current: Counterfactual, findings: Findings
    ) -> tuple[Candidate | None, Findings]:
        """``run`` under that contract. Raises NotPossible, and what the probe does."""
        for name in self.needs:
            if name not in findings.found:
                raise NotPossible(findings.why_missing.get(name, f"no probe before it gave {name}"))
        candidate, found = self.run(batch, current, findings.only({*self.needs, *self.uses}))
        if undeclared := found.found - set(self.gives):
            raise TypeError(f"{self.name} gives {', '.join(sorted(undeclared))}, which it does not declare")
        return candidate, found


def in_order(probes: Iterable[Probe]) -> tuple[Probe, ...]:
    """Probes as they are run. Raises ValueError where one builds on a finding that none before it gives.

    What a probe uses it may have given itself, when an earlier cause was looked for.
    """
    ordered = tuple(sorted(probes, key=lambda p: COSTS.index(p.cost)))
    given: set[str] = set()
    for p in ordered:
        if unknown := {*p.needs, *p.uses, *p.gives} - NAMES:
            raise ValueError(f"{p.name} names findings that there are none of: {', '.join(sorted(unknown))}")
        if early := [name for name in p.needs if name not in given]:
            raise ValueError(f"{p.name} needs {', '.join(early)}, which no probe before it gives")
        given |= set(p.gives)
        if early := [name for name in p.uses if name not in given]:
            raise ValueError(f"{p.name} uses {', '.join(early)}, which no probe before it gives")
    return ordered


def probe(
    name: str,
    cause: str,
    cost: str,
    run: Run,
    hypothesis: str,
    prediction: str,
    *,
    needs: tuple[str, ...] = (),
    uses: tuple[str, ...] = (),
    gives: tuple[str, ...] = (),
) -> Probe:
    """A probe, its fields in reading order."""
    return Probe(
        name=name,
        cause=cause,
        cost=cost,
        run=run,
        hypothesis=hypothesis,
        prediction=prediction,
        needs=needs,
        uses=uses,
        gives=gives,
    )


def independent(look: Callable[[DiagnosedBatch, Counterfactual], Candidate | None]) -> Run:
    """A probe that builds on no finding and gives none."""

    def run(batch: DiagnosedBatch, current: Counterfactual, findings: Findings) -> tuple[Candidate | None, Findings]:
        return look(batch, current), NOTHING

    return run


def recomputed(current: Counterfactual) -> Counterfactual:
    """The trainer's numbers from a forward pass of ours, where they are still as scored."""
    return current if current.forward is not None else replace(current, forward=ForwardPass())


def with_distribution(current: Counterfactual, distribution: Distribution) -> Counterfactual:
    """With another distribution made of the logits."""
    return replace(recomputed(current), distribution=distribution)


def with_forward(current: Counterfactual, **changes: Any) -> Counterfactual:
    """With fields of its forward pass changed."""
    base = recomputed(current)
    assert base.forward is not None
    return replace(base, forward=replace(base.forward, **changes))


def mean_residual(batch: DiagnosedBatch, current: Counterfactual) -> float:
    """Per token of this rank."""
    sums, _ = batch.residual(current)
    return float(sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1))


def mean_in_words(x: torch.Tensor) -> str:
    """The mean, for people."""
    return f"{float(x.mean()):.3g}" if len(x) else "-"
