"""A short training before the long one: did engine and trainer stay one policy, and do rewards look as they should?

Reads what a run with ParityCallback leaves in its folder, ``parity/metrics.jsonl`` and ``parity/rewards.json``; a
stored ``RewardBaseline`` is what rewards should look like. Each check passes, fails, or can't tell.
Needs no torch.
"""

from __future__ import annotations

import contextlib
import enum
import math
import statistics
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.parity import ParityConfig
from ..errors import ConfigError, DataError, ParityError
from ..judging.course import Course
from ..metrics.rewards import MIN_REWARDS, REWARDS_NAME, RewardBaseline
from ..report.outcome import halts_in_words
from ..results.paths import metrics_path
from ..results.reader import iter_windows, recorded_config
from ..verdict import enough_judged, judged

__all__ = ["Check", "Decision", "PilotOutcome", "PilotReport", "judge_pilot"]

# What a run may lose and still count as healthy. A breach now and then is what `consecutive` is there for.
_MAX_BREACHED = 0.1  # share of judged windows

_MAX_FAILED = 0.1  # share of windows whose measurement failed

_MIN_ENTROPY = 0.25  # of the entropy at the beginning: below it a policy repeats itself, and drift hides

_SPAN = 5  # windows at the beginning and at the end that are compared

_ALPHA = 0.001


class PilotOutcome(enum.StrEnum):
    """Of one check."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Decision(enum.StrEnum):
    """Of the pilot."""

    SCALE_UP = "scale up"
    DO_NOT = "do not scale up"
    UNKNOWN = "could not tell"

    @property
    def exit_code(self) -> int:
        """0, 1, 2."""
        return list(Decision).index(self)


@dataclass(frozen=True, slots=True)
class Check:
    """One question, its answer and the numbers behind it."""

    name: str
    outcome: PilotOutcome
    text: str


@dataclass(frozen=True, slots=True)
class PilotReport:
    """What the pilot showed. ``rewards``: the run's last ones, None where too few were left."""

    checks: tuple[Check, ...]
    rewards: RewardBaseline | None = None

    @property
    def decision(self) -> Decision:
        """One failed check is reason enough not to scale up; else one that can't tell leaves it open."""
        outcomes = {check.outcome for check in self.checks}
        if PilotOutcome.FAIL in outcomes:
            return Decision.DO_NOT
        return Decision.UNKNOWN if PilotOutcome.UNKNOWN in outcomes else Decision.SCALE_UP

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "decision": str(self.decision),
            "exit_code": self.decision.exit_code,
            "checks": [{"name": c.name, "outcome": str(c.outcome), "text": c.text} for c in self.checks],
        }


def judge_pilot(
    run: str | Path,
    baseline: RewardBaseline | None = None,
    *,
    min_effect: float = 0.2,
    steps: int | None = None,
    returncode: int = 0,
) -> PilotReport:
    """Judge a run's folder.

    Args:
        run: The run's folder (or its ``parity`` folder, or its ``metrics.jsonl``).
        baseline: What its rewards are compared with; None: they are only looked at for themselves.
        min_effect: Cliff's delta, or Kolmogorov-Smirnov distance, from which on rewards count as other ones.
        steps: Optimizer steps that were asked for; None: as many as there are.
        returncode: Exit code of the training.
    """
    whole = _Seen()
    try:
        for window in iter_windows(run):
            whole.add(window)
    except DataError as e:
        return PilotReport((_training(_Seen(), steps, returncode), Check("parity", PilotOutcome.UNKNOWN, str(e))))
    course = whole.course
    with contextlib.suppress(ParityError):  # of another version: as by default
        course.action = (recorded_config(run) or ParityConfig()).action
    recent = whole
    if course.recovered and course.since is not None:
        recent = _Seen()
        for window in iter_windows(run, quiet=True):
            if window["step"] >= course.since:
                recent.add(window)
    rewards, reward_check = _rewards(metrics_path(run).with_name(REWARDS_NAME), whole, baseline, min_effect)
    checks = (
        _training(whole, steps, returncode),
        _parity(recent, course),
        _drift(recent),
        _entropy(recent),
        reward_check,
    )
    return PilotReport(checks, rewards)


_NAMES = (
    "trimmed/kl_k3", "kl_k3", "floor/kl_k3", "excess/kl_k3", "limit/kl_k3", "entropy/trainer", "reward/mean",
)  # fmt: skip


class _Seen:
    """What the checks ask of windows, oldest first; of each a few numbers are kept, of two their reasons."""

    def __init__(self) -> None:
        self.course, self.counts = Course(), Counter[str]()
        self.windows, self.period = 0, 0
        self.last: Mapping[str, Any] = {"step": 0, "status": ""}
        self.breach = self.halt = ""  # why the last one was
        self.numbers = {name: array("d") for name in _NAMES}  # NaN where not measured, or no number
        self.lost: Counter[tuple[str, ...]] = Counter()

    def add(self, window: Mapping[str, Any]) -> None:
        """One window."""
        step, status = window["step"], str(window["status"])
        if self.windows:
            self.period = max(self.period, step - self.last["step"])
        self.windows += 1
        halts = self.course.halts
        self.course.add(step, status)
        self.counts[status] += 1
        if self.course.halts > halts:  # of those that count, the last is told of
            self.halt = str(window.get("reason"))
        if status == "BREACH":
            self.breach = str(window.get("reason"))
        self.last = {"step": step, "status": status}
        for name, column in self.numbers.items():
            column.append(float(window[name]) if _finite(window, name) else math.nan)
        for names in _LOST:
            values = [value for name in names if (value := window.get(name)) is not None]
            self.lost[names] += not all(map(math.isfinite, values))

    def values(self, name: str) -> list[float]:
        """Those that were measured, and are finite."""
        return [x for x in self.numbers[name] if x == x]


_LOST = (("trimmed/kl_k3", "kl_k3"), ("entropy/trainer",))


def _training(seen: _Seen, steps: int | None, returncode: int) -> Check:
    last = seen.last["step"]
    if seen.last["status"] == "HALT":  # judged by the windows, whatever the launcher makes of the exit code
        return Check("training", PilotOutcome.PASS, f"ended by trl-parity at step {last}")
    if returncode:
        return Check("training", PilotOutcome.UNKNOWN, f"ended with exit code {returncode} after step {last}")
    # a batch may feed several optimizer steps: its window has the first one's number
    period = seen.period if seen.windows > 1 else 1
    if steps is not None and last + period <= steps:
        return Check("training", PilotOutcome.UNKNOWN, f"measured up to step {last} of {steps}")
    return Check("training", PilotOutcome.PASS, f"went through, {last} steps")


def _parity(seen: _Seen, course: Course) -> Check:
    """Of the windows since the last halt was over."""
    counts = seen.counts
    told = ", ".join(f"{n} {status}" for status, n in counts.items())
    n = judged(counts)
    if course.halted:
        return Check("parity", PilotOutcome.FAIL, f"{halts_in_words(course)}: {seen.halt or told}")
    if not n:
        return Check("parity", PilotOutcome.UNKNOWN, f"no window could be judged: {told}")
    if seen.last["status"] == "BREACH" or counts["BREACH"] > _MAX_BREACHED * n:
        return Check("parity", PilotOutcome.FAIL, f"{told}; the last breach: {seen.breach}")
    if counts["ERROR"] > _MAX_FAILED * seen.windows:
        return Check("parity", PilotOutcome.UNKNOWN, f"the measurement failed too often: {told}")
    text = f"{n} of {seen.windows} windows judged: {told}"
    if course.recovered:
        text = f"OK since step {course.since}; {halts_in_words(course)}; {text}"
    if not enough_judged(counts):
        return Check("parity", PilotOutcome.UNKNOWN, f"{text}; expected at least half")
    return Check("parity", PilotOutcome.PASS, text)


def _drift(seen: _Seen) -> Check:
    """k3 KL against its floor and its limit: what there is left before the breaker speaks."""
    drift, floor = seen.values("trimmed/kl_k3") or seen.values("kl_k3"), seen.values("floor/kl_k3")
    if lost := seen.lost[_LOST[0]]:
        return Check("drift", PilotOutcome.FAIL, f"k3 KL was no finite number in {lost} of {seen.windows} windows")
    if not drift:
        return Check("drift", PilotOutcome.UNKNOWN, "k3 KL was never measured")
    text = f"k3 KL {statistics.median(drift):.2g} (median), {max(drift):.2g} (largest)"
    if not floor:  # a loop of one's own without one: the rules' absolute limits judged it
        return Check("drift", PilotOutcome.PASS, f"{text}; no noise floor, judged by absolute limits")
    text += f"; noise floor {statistics.median(floor):.2g}"
    limits = zip(seen.numbers["excess/kl_k3"], seen.numbers["limit/kl_k3"], strict=True)
    shares = [max(0.0, excess) / limit for excess, limit in limits if limit > 0 and excess == excess]
    if not shares:
        return Check("drift", PilotOutcome.PASS, text)
    text += f"; beyond it {statistics.median(shares):.0%} of the limit (median), {max(shares):.0%} (largest)"
    return Check("drift", PilotOutcome.FAIL if statistics.median(shares) > 1 else PilotOutcome.PASS, text)


def _entropy(seen: _Seen) -> Check:
    entropy = seen.values("entropy/trainer")
    if lost := seen.lost[_LOST[1]]:
        return Check("entropy", PilotOutcome.FAIL, f"was no finite number in {lost} of {seen.windows} windows")
    if len(entropy) < 2:
        return Check("entropy", PilotOutcome.UNKNOWN, "measured in fewer than 2 windows")
    span = min(_SPAN, len(entropy) // 2)
    first, last = statistics.median(entropy[:span]), statistics.median(entropy[-span:])
    text = f"{first:.3g} → {last:.3g} nats (medians of the first and last {span})"
    if last < _MIN_ENTROPY * first:
        return Check("entropy", PilotOutcome.FAIL, f"{text}: it collapses, and drift can't be seen in what is certain")
    return Check("entropy", PilotOutcome.PASS, text)


def _rewards(
    path: Path, seen: _Seen, baseline: RewardBaseline | None, min_effect: float
) -> tuple[RewardBaseline | None, Check]:
    if not path.exists():
        means = seen.values("reward/mean")
        mean = f"their mean was {means[-1]:.3g} at the end; " if means else ""
        text = f"{mean}{path} is missing: fewer than {MIN_REWARDS} finite ones, or the run did not end by itself"
        return None, Check("rewards", PilotOutcome.UNKNOWN, text)
    try:
        run = RewardBaseline.load(path)
    except ConfigError as e:
        return None, Check("rewards", PilotOutcome.UNKNOWN, str(e))
    told = f"mean {run.rewards.mean():.3g} of {run.rewards.size}"
    if run.rewards.min() == run.rewards.max():
        return run, Check("rewards", PilotOutcome.FAIL, f"every one is {run.rewards[0]:g}: nothing to learn from")
    if baseline is None:
        return run, Check("rewards", PilotOutcome.PASS, f"{told}; no baseline was given to compare them with")
    comparison = baseline.compare(run.rewards)
    if comparison is None:
        return run, Check("rewards", PilotOutcome.UNKNOWN, f"{told}; too few to compare, at least {MIN_REWARDS}")
    told += f", baseline {comparison.baseline_mean:.3g} of {baseline.rewards.size}"
    told += f"; Cliff's delta {comparison.effect_size:+.2f}, KS {comparison.ks:.2f} (p {comparison.p_value:.1g})"
    if not comparison.parted(min_effect, _ALPHA):
        return run, Check("rewards", PilotOutcome.PASS, f"{told}: as the baseline's")
    if comparison.effect_size >= min_effect:
        return run, Check(
            "rewards", PilotOutcome.PASS, f"{told}: higher than the baseline's; make sure that is learning"
        )
    what = "lower than the baseline's" if comparison.effect_size <= -min_effect else "distributed otherwise"
    return run, Check("rewards", PilotOutcome.FAIL, f"{told}: {what}")


def _finite(window: Mapping[str, Any], *names: str) -> bool:
    """Whether all were measured, and are finite."""
    return all(isinstance(value := window.get(name), (int, float)) and math.isfinite(value) for name in names)
