"""Rows of a check: what was compared, how it came out, and what all of them together say. Plain numbers, no torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...files import jsonable

__all__ = ["EXIT_CODES", "CheckOutcome", "Limits", "Row", "RowVerdict", "outcome", "within_floor"]


class RowVerdict(enum.StrEnum):
    """What a row amounts to."""

    PASS = "pass"
    FAIL = "fail"
    OUT_OF_REACH = "out of reach"  # over the limit, but so is the dtype's own noise: no engine could meet it
    UNCLEAR = "unclear"  # the interval holds the limit: more trials would tell
    NOT_RUN = "not run"  # never a pass


class CheckOutcome(enum.StrEnum):
    """What a check amounts to."""

    FIT = "fit"
    UNFIT = "unfit"
    UNKNOWN = "could not tell"


EXIT_CODES = {CheckOutcome.FIT: 0, CheckOutcome.UNFIT: 1, CheckOutcome.UNKNOWN: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is asked for. KL in nats, exact, of the engine's law from the reference's.

    Means are over all tokens of all trials, or of the worst one. Fields with a help text are arguments of the command.
    """

    mean_kl: float = field(
        default=1e-3, metadata={"help": "limit of the mean KL", "flag": "--max-mean-kl", "metavar": "X"}
    )
    max_kl: float = field(  # what a single token must keep to pass
        default=3e-3,
        metadata={"help": "limit of a trial's mean KL, and of a token's", "flag": "--max-trial-kl", "metavar": "X"},
    )
    pass_rate: float = field(
        default=0.995, metadata={"help": "share of tokens within it", "flag": "--min-pass-rate", "metavar": "X"}
    )
    k: float = 9.0  # noise: KL over k times the floor is no noise any more (3 times it in log-probs)
    least_kl: float = 1e-9  # and KL below this is never looked at: log-probs alike to 4e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the report. Numbers may be None: not measured, or none is meant."""

    id: str
    group: str  # limits, mechanisms, invariances, baseline
    title: str
    verdict: RowVerdict
    statistic: str = ""  # what value is
    value: float | None = None
    limit: float | None = None
    at_least: bool = False  # the value must be over the limit, not under it
    floor: float | None = None  # the same statistic of the dtype's own noise
    interval: tuple[float, float] | None = None  # 95 %
    worst: float | None = None
    tokens: int = 0
    trials: int = 0
    evidence: str = ""
    fix: str = ""
    needed: bool = True  # not run leaves the outcome open
    reproduce: str = ""  # command
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that JSON has no word for as strings."""
        return {k: jsonable(v) for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Row:
        """Back from ``to_json``."""
        known = dict(value)
        known["verdict"] = RowVerdict(known["verdict"])
        for name in ("value", "limit", "floor", "worst"):
            known[name] = None if known[name] is None else float(known[name])
        if known["interval"] is not None:
            known["interval"] = tuple(float(x) for x in known["interval"])
        return cls(**known)


def not_run(id: str, group: str, title: str, why: str, *, needed: bool) -> Row:
    """A row of what was left out, and why."""
    return Row(id=id, group=group, title=title, verdict=RowVerdict.NOT_RUN, evidence=why, needed=needed)


def within_floor(kl: float, floor: float, limits: Limits) -> bool:
    """Whether a mean KL is no more than the dtype's own noise makes. False for what is not a number."""
    return kl <= max(limits.least_kl, limits.k * floor)


def outcome(rows: Sequence[Row]) -> CheckOutcome:
    """One failure is unfit; else whatever is open and needed leaves the answer open; else fit."""
    if any(row.verdict is RowVerdict.FAIL for row in rows):
        return CheckOutcome.UNFIT
    undecided = any(
        row.verdict is RowVerdict.UNCLEAR or (row.verdict is RowVerdict.NOT_RUN and row.needed) for row in rows
    )
    return (
        CheckOutcome.UNKNOWN
        if undecided or not any(row.verdict is RowVerdict.PASS for row in rows)
        else CheckOutcome.FIT
    )
