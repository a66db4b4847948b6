"""What the windows of a run come to, one after the other: counts, halts, and whether a halt stands. Plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..verdict import SEVERITY, Status

__all__ = ["Course"]


@dataclass(slots=True, kw_only=True)
class Course:
    """A run so far. A halt stands until the next OK; from that window on, what was before it is history.

    ``counts``: windows by status; ``recent``: those since the last halt was over, all of a run never halted.
    ``since``: step of the OK that ended the last halt; None: there was none, or it stands. ``halts``: how often the
    run was halted, ``first_halt`` and ``last_halt`` at which steps. ``step``: the last window's. ``action``: the
    run's setting; what learned from condemned batches (``log``) is not healed by an OK.
    """

    action: str = "stop"
    counts: Counter[str] = field(default_factory=Counter)
    recent: Counter[str] = field(default_factory=Counter)
    step: int = 0
    since: int | None = None
    halts: int = 0
    first_halt: int | None = None
    last_halt: int | None = None

    def add(self, step: int, status: str) -> None:
        """One window. A status that is none counts as ERROR."""
        status = str(status) if status in SEVERITY else "ERROR"
        self.step = step
        if status == Status.HALT and not self.standing:
            self.halts, self.last_halt, self.since = self.halts + 1, step, None
            self.first_halt = step if self.first_halt is None else self.first_halt
        elif status == Status.OK and self.standing:
            self.since = step
            self.recent.clear()
        self.counts[status] += 1
        self.recent[status] += 1

    @property
    def standing(self) -> bool:
        """Whether the run was halted, and no window since then was OK."""
        return self.halts > 0 and self.since is None

    @property
    def halted(self) -> bool:
        """Whether that is what the run came to."""
        return self.standing or (self.halts > 0 and self.action == "log")

    @property
    def recovered(self) -> bool:
        """Whether the run was halted, and that is over."""
        return self.halts > 0 and not self.halted

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"counts": dict(self.counts), "recent": dict(self.recent)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Course:
        """From ``state()``."""
        counts = {name: Counter(state[name]) for name in ("counts", "recent")}
        return cls(**{**state, **counts})
