"""Which windows a verdict rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..config.parity import ParityConfig
from ..verdict import Status, Verdict

__all__ = ["Counted", "counted"]


class Counted(NamedTuple):
    """Windows over a limit, oldest first, and what is said of their number."""

    windows: Sequence[Verdict]
    text: str


def counted(verdict: Verdict, config: ParityConfig, verdicts: Sequence[Verdict]) -> Counted:
    """Of a window that breached or was halted. ``verdicts``: up to it, oldest first."""
    streak = [v for v in verdicts if v.status in (Status.BREACH, Status.HALT, Status.ERROR)][-verdict.streak :]
    streak = streak or [verdict]
    if verdict.breaches and all(name.startswith("evidence/") for name in verdict.breaches):
        onset = None if verdict.stats is None else verdict.stats.get("evidence/onset")
        since = [v for v in verdicts if onset is not None and onset <= v.step < streak[0].step]
        return Counted([*since, *streak], "decided over all windows of the run, by log10 of the evidence")
    rules = {rule.stat: rule for rule in config.resolved_rules()}
    asked = [1 if (rule := rules[name]).immediate else rule.consecutive for v in streak for name in v.breaches]
    needed = min((n for n in asked if n is not None), default=config.consecutive)
    if verdict.halted and verdict.streak < needed < verdict.level + 1:
        window = _remembered(config, verdicts, needed)
        over = [v for v in window if _counts(v, config)]
        return Counted(over, f"{len(over)} breaches in the last {len(window)} windows")
    return Counted(streak, f"{verdict.streak} window(s) in a row over the limit")


def _counts(verdict: Verdict, config: ParityConfig) -> bool:
    """Whether the breaker remembers this window as a breach."""
    return bool(verdict.breaches) or (verdict.status is Status.ERROR and config.halt_on_error)


def _remembered(config: ParityConfig, verdicts: Sequence[Verdict], needed: int) -> Sequence[Verdict]:
    """The fewest last windows whose breaches, less what the healthy ones between took, are more than needed - 1."""
    memory = first = 0
    for i in range(len(verdicts) - 1, -1, -1):
        if _counts(verdicts[i], config):
            memory, first = memory + config.breach_memory, i
            if memory > (needed - 1) * config.breach_memory:
                break
        elif verdicts[i].status in (Status.OK, Status.CALIBRATING):
            memory -= 1
    return verdicts[first:]
