"""What a window amounts to: its statistics, and the verdict on them. Plain numbers, no torch."""

from __future__ import annotations

import enum
import math
from collections.abc import ItemsView, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["JUDGED", "SEVERITY", "MismatchStats", "Status", "Verdict", "enough_judged", "judged", "worst"]


class Status(enum.StrEnum):
    """What a window amounts to."""

    OK = "OK"
    WARN = "WARN"
    BREACH = "BREACH"
    HALT = "HALT"
    NO_DATA = "NO_DATA"  # nothing to compare: never a pass, never 0.0
    ERROR = "ERROR"  # the measurement itself failed
    CALIBRATING = "CALIBRATING"  # nothing wrong seen, but the noise floor is missing or the warm-up not over

    @property
    def code(self) -> int:
        """The number trackers plot as ``parity/breaker/status``."""
        return {"OK": 0, "WARN": 1, "BREACH": 2, "HALT": 3, "NO_DATA": -1, "ERROR": -2, "CALIBRATING": -3}[self]


# mildest first: what a few windows amount to together is the last of theirs; what was not shown healthy is not OK
SEVERITY = (
    Status.OK,
    Status.CALIBRATING,
    Status.NO_DATA,
    Status.WARN,
    Status.ERROR,
    Status.BREACH,
    Status.HALT,
)


JUDGED = (Status.OK, Status.WARN, Status.BREACH, Status.HALT)


def worst(statuses: Iterable[str]) -> Status:
    """The last of theirs in ``SEVERITY``; a status that is none counts as ERROR."""
    return max((Status(s) if s in SEVERITY else Status.ERROR for s in statuses), key=SEVERITY.index)


def judged(counts: Mapping[str, int]) -> int:
    """Windows of ``counts`` (by status) that were judged against limits."""
    return sum(counts.get(status, 0) for status in JUDGED)


def enough_judged(counts: Mapping[str, int]) -> bool:
    """Whether a run can count as healthy: at least half of its windows were judged. Missing is not healthy."""
    return 2 * judged(counts) >= sum(counts.values()) > 0


@dataclass(frozen=True, slots=True)
class MismatchStats(Mapping[str, float | None]):
    """The scalars of one window, by the names in ``SCALARS``.

    A read-only mapping; ``None`` means not measured, never 0.0.
    """

    num_tokens: int
    num_sequences: int
    num_batches: int
    num_errors: int
    values_by_name: dict[str, float | None] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float | None:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def items(self) -> ItemsView[str, float | None]:
        """Names and values."""  # the mapping's own: Mapping's would look each name up
        return self.values_by_name.items()

    def __hash__(self) -> int:
        return id(self)

    def updated(self, values: Mapping[str, float | None]) -> MismatchStats:
        """A copy with these scalars laid over its own."""
        merged = self.values_by_name | dict(values)
        return MismatchStats(self.num_tokens, self.num_sequences, self.num_batches, self.num_errors, merged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the breaker says of one window; the same on every rank."""

    step: int  # optimizer step the window's last batch feeds (trackers' global_step)
    status: Status
    streak: int  # breached windows in a row, this one included
    level: float = 0.0  # breached windows that are remembered, in a row or not
    breaches: tuple[str, ...] = ()  # statistics over their limit
    warnings: tuple[str, ...] = ()  # statistics over their WARN level, or over the limit of a warn_only rule
    alert: str = ""  # WARN or HALT: the first window of this episode that reached it, people should be told
    stats: MismatchStats | None = None  # None: the measurement failed
    reason: str = ""  # one line for people

    @property
    def halted(self) -> bool:
        """Whether this window halts the run."""
        return self.status is Status.HALT

    def to_dict(self) -> dict[str, Any]:
        """The window's line in ``metrics.jsonl``. Non-finite numbers become strings ("inf", "nan"): JSON has none."""
        scalars: dict[str, float | None] = {} if self.stats is None else dict(self.stats.values_by_name)
        scalars |= {"breaker/status": self.status.code, "breaker/streak": self.streak, "breaker/level": self.level}
        return {
            "step": self.step,
            "status": str(self.status),
            "streak": self.streak,
            "breaches": list(self.breaches),
            "warnings": list(self.warnings),
            "alert": self.alert,
            "reason": self.reason,
            "num_tokens": 0 if self.stats is None else self.stats.num_tokens,
            "num_sequences": 0 if self.stats is None else self.stats.num_sequences,
            "num_batches": 0 if self.stats is None else self.stats.num_batches,
            "num_errors": 1 if self.stats is None else self.stats.num_errors,
        } | {k: v if v is None or math.isfinite(v) else str(v) for k, v in scalars.items()}
