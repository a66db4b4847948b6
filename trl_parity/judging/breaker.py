"""From the statistics of windows to verdicts: pure, plain numbers in, the same verdict out on every rank.

A window is BREACH when a rule is over its limit. ``streak`` counts windows that were not shown to be healthy; it and
``needed``, the fewest windows that anything in it asks for, go from window to window by this table, as does ``level``,
breached windows that are remembered, in a row or not:

============  ==========  ==========================  =====================  =======================================
a window of   streak      needed                      level                  status
============  ==========  ==========================  =====================  =======================================
no data       as it was   as it was                   as it was              NO_DATA
health        0           none                        1 / ``breach_memory``  OK; CALIBRATING without a floor or in
                                                      less, at least 0       warm-up
a warning     as it was   as it was                   as it was              WARN
failure       one more    fewer of it and             1 more with            HALT once streak >= needed or
                          ``consecutive`` with        ``halt_on_error``      level > needed - 1, else ERROR
                          ``halt_on_error``
a breach      one more    fewer of it and what the    1 more                 the same, else BREACH
                          breached rules ask for
============  ==========  ==========================  =====================  =======================================

So three breaches halt where fewer than ``breach_memory`` healthy windows lie between them. A breach that rests on a
noise floor of fewer than ``SETTLED`` sequences alone is not remembered. The level is filled no further than just over
needed - 1, or to 1: however long a fault lasted, after more than ``breach_memory`` healthy windows one breach does not
halt.

WARN begins at a share of each limit (``Rule.warn``), one level before a breach, and at the limit of a ``warn_only``
rule; a run on its way back must get below it to be healthy again, so that one that swings about its limit still halts.
ERROR alone does not halt unless ``halt_on_error``: a broken measurement is never a pass, but it is no proof that the
run is sick either. In the first ``warmup`` windows only immediate rules halt.

An episode lasts from the first window that is not healthy to the next OK at level 0; people are alerted once in it at
WARN (or BREACH) and once at HALT.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ..config.parity import ParityConfig
from ..config.rules import Rule
from ..verdict import MismatchStats, Status, Verdict

__all__ = ["SETTLED", "Breaker", "Reading", "Seen", "Streak", "read"]

# Sequences from which on a noise floor is known well enough for breaches that are not in a row. On one to four, where
# noise differs by sequence (lognormal, spread 1), up to 16 % of healthy windows breach; on eight, 2 %.
SETTLED = 8


class Reading(NamedTuple):
    """One rule on one window."""

    rule: Rule
    seen: str  # what was looked at: the statistic, or its excess over the floor
    value: float
    limit: float  # what it was compared with
    over: bool
    warns: bool  # over the WARN level, or over the limit
    missing: bool = False  # the rule wants a noise floor, there is none, and without one it allows more

    @property
    def text(self) -> str:
        """``kl_k3 0.2 > 0.1``, for people; ``kl_k3 0.07 > 0.05 (limit 0.1)`` where it is over the WARN level alone."""
        level, rest = (self.limit, "") if self.over else (self.limit * self.rule.warn, f" (limit {self.limit:.4g})")
        return f"{self.seen} {self.value:.4g} {'<' if self.rule.below else '>'} {level:.4g}{rest}"


@lru_cache(maxsize=256)
def _names(stat: str) -> tuple[str, str, str]:
    """Trimmed, its floor and its excess."""
    return f"trimmed/{stat}", f"floor/{stat.removeprefix('replica/')}", f"excess/{stat}"


def read(rule: Rule, stats: Mapping[str, float | None]) -> Reading | None:
    """What ``rule`` sees in a window's scalars; None where its statistic was not measured."""
    raw, names = stats.get(rule.stat), _names(rule.stat)
    trimmed = stats.get(names[0])
    value = raw if rule.immediate or trimmed is None else trimmed
    if value is None:
        return None
    seen, limit = rule.stat, rule.limit
    if not math.isfinite(value):  # never healthy, on whichever side of whatever limit
        return Reading(rule, seen, value, limit, True, True)
    if rule.k is not None:
        floor = stats.get(names[1])
        if rule.stat == "ess":  # 1 without noise, less with it
            seen, value, floor = "1 - ess", 1.0 - value, None if floor is None else 1.0 - floor
        if rule.ceiling is not None and not value <= rule.ceiling:
            return Reading(rule, seen, value, rule.ceiling, True, True)
        if floor is None:
            if rule.absolute is None:
                return Reading(rule, seen, value, limit, False, False, missing=True)
            over, warns = not value <= rule.absolute, not value <= rule.absolute * rule.warn
            return Reading(rule, seen, value, rule.absolute, over, warns, missing=rule.absolute > limit)
        seen, value = names[2], value - floor
        limit = max(limit, (rule.k - 1.0) * floor)
    over = not value >= limit if rule.below else not value <= limit
    warns = over if rule.below or limit < 0 else not value <= limit * rule.warn
    return Reading(rule, seen, value, limit, over, warns)


class Seen(enum.Enum):
    """What is seen of a window, before what went before it counts."""

    NOTHING = "no data"
    HEALTH = "health"
    WARNING = "a warning"
    FAILURE = "failure"
    BREACH = "a breach"


class Streak(NamedTuple):
    """Windows in a row that were not shown to be healthy, and what is left of the breaches before."""

    length: int = 0
    needed: int | None = None  # the fewest windows that anything in it asks for; None: it can't halt
    memory: int = 0  # healthy windows until nothing is remembered: ``breach_memory`` for each breach

    def healed(self) -> Streak:
        """None any more; one healthy window nearer to forgetting."""
        return Streak(memory=max(0, self.memory - 1))

    def grown(self, asked: int | None, breach_memory: int) -> Streak:
        """One window longer, which asks for ``asked`` (None: for nothing, and is not remembered)."""
        needed = min((n for n in (self.needed, asked) if n is not None), default=None)
        memory = self.memory
        if asked is not None and needed is not None and breach_memory:
            most = max(breach_memory, (needed - 1) * breach_memory + 1)
            memory = max(memory, min(memory + breach_memory, most))
        return Streak(self.length + 1, needed, memory)

    def reached(self, breach_memory: int) -> bool:
        """Whether it is as long as needed, or as many are remembered."""
        needed = self.needed
        return needed is not None and (self.length >= needed or self.memory > (needed - 1) * breach_memory)


NONE = Streak()

# what is seen of a window -> the streak before, what the window asks for and ``breach_memory`` -> the streak after it
_AFTER: dict[Seen, Callable[[Streak, int | None, int], Streak]] = {
    Seen.NOTHING: lambda before, asked, memory: before,
    Seen.HEALTH: lambda before, asked, memory: before.healed(),
    Seen.WARNING: lambda before, asked, memory: before,
    Seen.FAILURE: Streak.grown,
    Seen.BREACH: Streak.grown,
}

# what is seen of a window -> its status, and the status where the streak is as long as needed and may halt
_STATUS: dict[Seen, tuple[Status, Status]] = {
    Seen.NOTHING: (Status.NO_DATA, Status.NO_DATA),
    Seen.HEALTH: (Status.OK, Status.OK),
    Seen.WARNING: (Status.WARN, Status.WARN),
    Seen.FAILURE: (Status.ERROR, Status.HALT),
    Seen.BREACH: (Status.BREACH, Status.HALT),
}

_LEVEL = {Status.HALT: "HALT", Status.BREACH: "WARN", Status.WARN: "WARN"}  # people are alerted at


@dataclass(slots=True)
class Breaker:
    """Judges one window after the other; its whole memory is ``state()``."""

    rules: Sequence[Rule]
    consecutive: int = 3
    halt_on_error: bool = False
    warmup: int = 0
    expects_floor: bool = True  # without a floor, healthy windows are CALIBRATING
    breach_memory: int = 0  # healthy windows that a breach is remembered for; 0: only breaches in a row halt
    current: Streak = NONE
    windows: int = 0  # judged so far, NO_DATA not counted
    alerted: str = ""  # the highest level people were alerted to in this episode: WARN or HALT

    @classmethod
    def from_config(cls, config: ParityConfig) -> Breaker:
        """A breaker with the config's rules and an empty streak."""
        return cls(
            config.resolved_rules(),
            config.consecutive,
            config.halt_on_error,
            config.warmup,
            config.floor_tokens > 0,
            config.breach_memory,
        )

    @property
    def streak(self) -> int:
        """Windows in a row that were not shown to be healthy."""
        return self.current.length

    @property
    def needed(self) -> int | None:
        """The fewest that anything in the streak asks for; None: nothing in it halts."""
        return self.current.needed

    @property
    def level(self) -> float:
        """Breaches that are remembered: each adds 1, a healthy window takes 1 / ``breach_memory``."""
        return self.current.memory / self.breach_memory if self.breach_memory else 0.0

    @property
    def halting(self) -> bool:
        """Whether a halt stands: the run was halted, and no window since then was healthy."""
        return self.alerted == "HALT" and self.current.reached(self.breach_memory)

    def readings(self, stats: Mapping[str, float | None], rules: Iterable[Rule] | None = None) -> list[Reading]:
        """What every rule sees in a window, or each of ``rules``."""
        rules = self.rules if rules is None else rules
        return [reading for rule in rules if (reading := read(rule, stats)) is not None]

    def judge(self, step: int, stats: MismatchStats | None, error: str = "") -> Verdict:
        """The verdict on one window. ``stats=None`` or any failed batch in it (``num_errors``) makes it ERROR."""
        if stats is not None and not stats.num_errors and stats["nonfinite_rate"] is None:
            reason = "no token to compare: the window's rollouts are empty or fully masked"
            if stats.get("lag/0/tokens") is not None:
                reason = "no token at lag 0 to compare: all come from older weights than the trainer's (see lag/*)"
            status = self._after(Seen.NOTHING)
            return Verdict(step=step, status=status, streak=self.streak, level=self.level, stats=stats, reason=reason)
        self.windows += 1
        readings = [] if stats is None else self.readings(stats.values_by_name)
        breached = [r for r in readings if r.over and not r.rule.warn_only]
        warned = [r for r in readings if r not in breached and (r.over if r.rule.warn_only else r.warns)]
        failed = stats is None or stats.num_errors > 0
        asked: int | None = None
        remembered = True
        if breached:
            seen, asked = Seen.BREACH, min(map(self._asked, breached))
            floor = None if stats is None else stats.get("floor/sequences")
            remembered = floor is None or floor >= SETTLED or not all(r.seen.startswith("excess/") for r in breached)
        elif failed:
            seen, asked = Seen.FAILURE, self.consecutive if self.halt_on_error else None
        else:
            seen = Seen.WARNING if warned else Seen.HEALTH
        warming = self.windows <= self.warmup
        may_halt = not warming or any(r.rule.immediate for r in breached)
        status = self._after(seen, asked, remembered=remembered, may_halt=may_halt)
        if status is Status.OK and (warming or (self.expects_floor and any(r.missing for r in readings))):
            status = Status.CALIBRATING
        parts = [r.text for r in (breached or warned)]
        if status is Status.HALT and self.needed is not None and self.streak < self.needed:
            parts.append(f"not in a row: level {self.level:.3g} > {self.needed - 1}")
        if failed:
            parts.append("measurement failed" + (f": {error}" if error else " on another rank"))
        return Verdict(
            step=step,
            status=status,
            streak=self.streak,
            level=self.level,
            breaches=tuple(r.rule.stat for r in breached),
            warnings=tuple(r.rule.stat for r in warned),
            alert=self._alert(status),
            stats=stats,
            reason="; ".join(parts),
        )

    def _after(
        self, seen: Seen, asked: int | None = None, *, remembered: bool = True, may_halt: bool = False
    ) -> Status:
        """Go on by the table; the status of the window."""
        self.current = _AFTER[seen](self.current, asked, self.breach_memory if remembered else 0)
        return _STATUS[seen][self.current.reached(self.breach_memory) and may_halt]

    def _asked(self, reading: Reading) -> int:
        """Windows in a row that halt, by a breached rule."""
        return 1 if reading.rule.immediate else (reading.rule.consecutive or self.consecutive)

    def _alert(self, status: Status) -> str:
        if status is Status.OK and not self.current.memory:
            self.alerted = ""
        level = _LEVEL.get(status, "")
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
        } | ({"memory": self.current.memory} if self.current.memory else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``; one of 0.6.0 remembers nothing but its streak."""
        memory = int(state.get("memory", 0)) if self.breach_memory else 0
        self.current = Streak(int(state["streak"]), state["needed"], memory)
        self.windows, self.alerted = int(state["windows"]), str(state["alerted"])
