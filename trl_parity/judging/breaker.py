"""From the statistics of windows to verdicts: pure, plain numbers in, the same verdict out on every rank.

A window is BREACH when a rule is over its limit. ``streak`` counts windows that were not shown to be healthy: BREACH
and ERROR make it grow, NO_DATA and WARN leave it as it is, OK ends it. WARN begins at a share of each limit
(``Rule.warn``), one level before a breach; a run on its way back must get below it to be healthy again, so that one
that swings about its limit still halts. HALT when the streak reaches the ``consecutive`` of a rule breached in it.
ERROR alone does not halt unless ``halt_on_error``: a broken measurement is never a pass, but it is no proof that the
run is sick either. In the first ``warmup`` windows only immediate rules halt.

An episode lasts from the first window that is not healthy to the next OK; people are alerted once in it at WARN (or
BREACH) and once at HALT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config.parity import ParityConfig
from ..config.rules import Rule
from ..verdict import MismatchStats, Status, Verdict

__all__ = ["Breaker", "Reading", "read"]


class Reading(NamedTuple):
    """One rule on one window."""

    rule: Rule
    seen: str  # what was looked at: the statistic, or its excess over the floor
    value: float
    limit: float  # what it was compared with
    over: bool
    warns: bool  # over the WARN level, or over the limit
    missing: bool = False  # the rule wants a noise floor and there is none

    @property
    def text(self) -> str:
        """``kl_k3 0.2 > 0.1``, for people; ``kl_k3 0.07 > 0.05 (limit 0.1)`` where it is over the WARN level alone."""
        level, rest = (self.limit, "") if self.over else (self.limit * self.rule.warn, f" (limit {self.limit:.4g})")
        return f"{self.seen} {self.value:.4g} {'<' if self.rule.below else '>'} {level:.4g}{rest}"


def read(rule: Rule, stats: Mapping[str, float | None]) -> Reading | None:
    """What ``rule`` sees in a window's scalars; None where its statistic was not measured."""
    raw = stats.get(rule.stat)
    trimmed = stats.get(f"trimmed/{rule.stat}")
    value = raw if rule.immediate or trimmed is None else trimmed
    if value is None:
        return None
    seen, limit = rule.stat, rule.limit
    if rule.k is not None:
        floor = stats.get(f"floor/{rule.stat}")
        if rule.stat == "ess":  # 1 without noise, less with it
            seen, value, floor = "1 - ess", 1.0 - value, None if floor is None else 1.0 - floor
        if rule.ceiling is not None and not value <= rule.ceiling:
            return Reading(rule, seen, value, rule.ceiling, True, True)
        if floor is None:
            if rule.absolute is None:
                return Reading(rule, seen, value, limit, False, False, missing=True)
            over, warns = not value <= rule.absolute, not value <= rule.absolute * rule.warn
            return Reading(rule, seen, value, rule.absolute, over, warns, missing=True)
        seen, value = f"excess/{rule.stat}", value - floor
        limit = max(limit, (rule.k - 1.0) * floor)
    over = not value >= limit if rule.below else not value <= limit
    warns = over if rule.below or limit < 0 else not value <= limit * rule.warn
    return Reading(rule, seen, value, limit, over, warns)


@dataclass(slots=True)
class Breaker:
    """Judges one window after the other; its whole memory is ``state()``."""

    rules: Sequence[Rule]
    consecutive: int = 3
    halt_on_error: bool = False
    warmup: int = 0
    expects_floor: bool = True  # without a floor, healthy windows are CALIBRATING
    streak: int = 0
    # fewest consecutive windows asked for by any rule breached in the current streak; None: no breach in it
    needed: int | None = None
    windows: int = 0  # judged so far, NO_DATA not counted
    alerted: str = ""  # the highest level people were alerted to in this episode: WARN or HALT

    @classmethod
    def from_config(cls, config: ParityConfig) -> Breaker:
        """A breaker with the config's rules and an empty streak."""
        return cls(
            config.resolved_rules(), config.consecutive, config.halt_on_error, config.warmup, config.floor_tokens > 0
        )

    def readings(self, stats: Mapping[str, float | None]) -> list[Reading]:
        """What every rule sees in a window."""
        return [reading for rule in self.rules if (reading := read(rule, stats)) is not None]

    def judge(self, step: int, stats: MismatchStats | None, error: str = "") -> Verdict:
        """The verdict on one window. ``stats=None`` or any failed batch in it (``num_errors``) makes it ERROR."""
        if stats is not None and not stats.num_errors and stats["nonfinite_rate"] is None:
            reason = "no token to compare: the window's rollouts are empty or fully masked"
            if stats.get("lag/0/tokens") is not None:
                reason = "no token at lag 0 to compare: all come from older weights than the trainer's (see lag/*)"
            return Verdict(step=step, status=Status.NO_DATA, streak=self.streak, stats=stats, reason=reason)
        self.windows += 1
        readings = [] if stats is None else self.readings(stats.values_by_name)
        breached = [r for r in readings if r.over and not r.rule.warn_only]
        warned = [r for r in readings if r not in breached and (r.over if r.rule.warn_only else r.warns)]
        failed = stats is None or stats.num_errors > 0
        self._count(breached, warned, failed)
        floorless = self.expects_floor and any(r.missing for r in readings)
        status = self._status(breached, warned, failed, floorless)
        parts = [r.text for r in (breached or warned)]
        if failed:
            parts.append("measurement failed" + (f": {error}" if error else " on another rank"))
        return Verdict(
            step=step,
            status=status,
            streak=self.streak,
            breaches=tuple(r.rule.stat for r in breached),
            warnings=tuple(r.rule.stat for r in warned),
            alert=self._alert(status),
            stats=stats,
            reason="; ".join(parts),
        )

    def _count(self, breached: Sequence[Reading], warned: Sequence[Reading], failed: bool) -> None:
        """Lengthen or end the streak, and note how long one halts."""
        if breached:
            self.streak += 1
            needed = min(1 if r.rule.immediate else (r.rule.consecutive or self.consecutive) for r in breached)
            self.needed = needed if self.needed is None else min(self.needed, needed)
        elif failed:
            self.streak += 1
            if self.halt_on_error and self.needed is None:
                self.needed = self.consecutive
        elif all(r.rule.warn_only for r in warned):
            self.streak, self.needed = 0, None

    def _status(self, breached: Sequence[Reading], warned: Sequence[Reading], failed: bool, floorless: bool) -> Status:
        """What the window amounts to, counted already. ``floorless``: a rule wants a noise floor and there is none."""
        may_halt = self.windows > self.warmup or any(r.rule.immediate for r in breached)
        reached = self.needed is not None and self.streak >= self.needed
        if reached and may_halt and (breached or failed):
            return Status.HALT
        if breached:
            return Status.BREACH
        if failed:
            return Status.ERROR
        if warned:
            return Status.WARN
        return Status.CALIBRATING if self.windows <= self.warmup or floorless else Status.OK

    def _alert(self, status: Status) -> str:
        if status is Status.OK:
            self.alerted = ""
        level = {Status.HALT: "HALT", Status.BREACH: "WARN", Status.WARN: "WARN"}.get(status, "")
        if not level or self.alerted in (level, "HALT"):
            return ""
        self.alerted = level
        return level

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "streak": self.streak,
            "needed": self.needed,
            "windows": self.windows,
            "alerted": self.alerted,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``."""
        self.streak, self.needed = int(state["streak"]), state["needed"]
        self.windows, self.alerted = int(state["windows"]), str(state["alerted"])
