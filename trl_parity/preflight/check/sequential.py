"""Whether the trials may end before the last one.

There is one look, and the number of tokens plans it, not what they show: after the first n tokens of known KL with
limit^n <= error, where ``limit`` is the pass rate asked for. An engine that passes no more tokens than that gets so
far without a single failure with a chance of at most ``error``. Intervals are that much wider then, so a row that
passes is wrong no more often than without the look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .drift import Drift, Gaps, sampled_kl
from .equivalence import pass_rate_interval

__all__ = ["LEAST_TRIALS", "planned_look", "settled"]

LEAST_TRIALS = 12  # that each kind of prompt is among them


def planned_look(exact_tokens: Sequence[int], pass_rate: float, error: float) -> int | None:
    """After how many trials to look; None: never. ``exact_tokens``: of each trial, known before it is run."""
    if error <= 0.0 or not 0.0 < pass_rate < 1.0:
        return None
    needed, tokens = math.log(error) / math.log(pass_rate), 0
    for trials, more in enumerate(exact_tokens, 1):
        tokens += more
        if tokens >= needed and trials >= LEAST_TRIALS:
            return trials if trials < len(exact_tokens) else None
    return None


def settled(drift: Drift, each: Sequence[Gaps], error: float) -> bool:
    """Whether the trials so far decide all rows that are made of them.

    They pass where no token is over its limit, they fail where the pass rate and the worst trial do and the drift is
    no noise; and either way the interval of what is compared with a limit or a floor (Student's t over trials, who
    are the independent ones, two-sided at twice ``error``) lies on one side of each.
    """
    gaps, limits, floors = drift.gaps, drift.limits, drift.floors
    kl = _interval([(g.kl.count, g.kl.total, g.kl.bad) for g in each], error)
    halves = _interval(
        [
            (sum(s.count for s in sums), sum(s.squares for s in sums) / 2, sum(s.bad for s in sums))
            for sums in (g.positions.values() for g in each)
        ],
        error,
    )
    if kl is None or halves is None:
        return False

    def noise(of_engine: float) -> float:
        return max(limits.least_kl, limits.k * of_engine)

    lines = [
        (kl, limits.mean_kl),
        *((kl, noise(sampled_kl(side))) for side in (floors.engine, floors.trainer)),
        *((halves, noise(side.half_square)) for side in (floors.engine, floors.trainer)),
    ]
    if not all(high < line or low > line for (low, high), line in lines):
        return False
    if not gaps.over:
        return True
    excessive = kl[0] > noise(sampled_kl(floors.engine)) or halves[0] > noise(floors.engine.half_square)
    rate = pass_rate_interval(gaps, drift.z)[1]
    worst = not gaps.worst < max(limits.max_kl, limits.k * floors.engine.worst)
    return excessive and rate < limits.pass_rate and worst


def _interval(trials: Sequence[tuple[int, float, int]], error: float) -> tuple[float, float] | None:
    """Of a mean over tokens, from (count, total, not finite) of each trial; None of too few, or of none."""
    from scipy.special import stdtrit

    many, tokens = len(trials), sum(count for count, _, _ in trials)
    if many < 2 or not tokens:
        return None
    if any(bad for _, _, bad in trials):
        return math.inf, math.inf
    mean = sum(total for _, total, _ in trials) / tokens
    squares = sum((total - mean * count) ** 2 for count, total, _ in trials)
    half = float(stdtrit(many - 1, 1.0 - error)) * math.sqrt(many / (many - 1) * squares) / tokens
    return mean - half, mean + half
