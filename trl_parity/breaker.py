"""From the statistics of windows to verdicts: pure, plain numbers in, the same verdict out on every rank.

A window is BREACH when a rule is over its limit. ``streak`` counts windows in a row that were not shown to be
healthy: BREACH and ERROR make it grow, OK and WARN end it, NO_DATA leaves it as it is. HALT when the streak reaches
the ``consecutive`` of a rule breached in it. ERROR alone does not halt unless ``halt_on_error``: a broken measurement
is never a pass, but it is no proof that the run is sick either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .config import ParityConfig, Rule
from .records import MismatchStats, Status, Verdict

__all__ = ["Breaker"]


@dataclass(slots=True)
class Breaker:
    """Judges one window after the other; its whole memory is ``state()``."""

    rules: Sequence[Rule]
    consecutive: int = 3
    halt_on_error: bool = False
    streak: int = 0
    # fewest consecutive windows asked for by any rule breached in the current streak; None: no breach in it
    needed: int | None = field(default=None)

    @classmethod
    def from_config(cls, config: ParityConfig) -> Breaker:
        """A breaker with the config's rules and an empty streak."""
        return cls(config.resolved_rules(), config.consecutive, config.halt_on_error)

    def judge(self, step: int, stats: MismatchStats | None, error: str = "") -> Verdict:
        """The verdict on one window. ``stats=None`` or any failed batch in it (``num_errors``) makes it ERROR."""
        if stats is not None and not stats.num_errors and stats["nonfinite_rate"] is None:
            reason = "no token to compare: the window's rollouts are empty or fully masked"
            return Verdict(step=step, status=Status.NO_DATA, streak=self.streak, stats=stats, reason=reason)

        over = [] if stats is None else [r for r in self.rules if r.breached(stats.get(r.stat))]
        breached = [r for r in over if not r.warn_only]
        warned = [r for r in over if r.warn_only]
        failed = stats is None or stats.num_errors > 0
        if breached:
            self.streak += 1
            needed = min(1 if r.immediate else (r.consecutive or self.consecutive) for r in breached)
            self.needed = needed if self.needed is None else min(self.needed, needed)
        elif failed:
            self.streak += 1
            if self.halt_on_error and self.needed is None:
                self.needed = self.consecutive
        else:
            self.streak, self.needed = 0, None

        if self.needed is not None and self.streak >= self.needed:
            status = Status.HALT
        elif breached:
            status = Status.BREACH
        elif failed:
            status = Status.ERROR
        else:
            status = Status.WARN if warned else Status.OK
        parts = [_describe(r, stats) for r in over if stats is not None]
        if failed:
            parts.append("measurement failed" + (f": {error}" if error else " on another rank"))
        return Verdict(
            step=step,
            status=status,
            streak=self.streak,
            breaches=tuple(r.stat for r in breached),
            warnings=tuple(r.stat for r in warned),
            stats=stats,
            reason="; ".join(parts),
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"streak": self.streak, "needed": self.needed}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.streak, self.needed = int(state["streak"]), state["needed"]


def _describe(rule: Rule, stats: MismatchStats) -> str:
    value = stats.get(rule.stat)
    return f"{rule.stat} {value:.4g} {'<' if rule.below else '>'} {rule.limit:g}"
