"""Whether two runs differ beyond their noise floors: the same curves, aligned by step, and a test. Needs no torch.

For each statistic x (trimmed, as rules see it; of ``ess``, 1 - ess) and each run B against the first one, A:

    H0: |E[x_B - x_A]| <= margin,  margin = max(noise floor of A, of B)

Windows of one run resemble their neighbours, so n of them are worth fewer independent ones: the integrated
autocorrelation time τ is estimated (the larger of Geyer's initial positive sequence and that of an AR(1) process, its
coefficient corrected for bias and 1.5 standard errors up), and Student's t is taken with n / τ windows. Where the runs
share steps, the differences step by step are what is tested (what both share, such as a policy that grows certain,
falls out); else the two means. p-values are of the nearer end of H0, doubled for its two ends, and Holm's over all
statistics and runs.
In fewer than 10 windows no autocorrelation can be seen: they are taken as independent, and the answer says so.

A drift that comes late hardly moves a mean. What sees it is the breaker, which judged each run over its own floor: two
runs differ, too, where one was halted and the other went past that step without (``halts_apart``).

What is tested is whether these two runs' windows differ. Whether another seed of the same settings would differ as
much, no pair of runs can tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .reader import Columns

__all__ = [
    "COLUMNS",
    "TESTED",
    "Comparison",
    "autocorrelation_time",
    "compare",
    "halts_apart",
    "holm",
    "standing_halt",
]

TESTED = ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99", "ratio/out_of_band", "ess")

SHOWN = {
    "kl_k3": "k3 KL, nats per token", "logp_abs_diff/mean": "mean |Δ|, nats", "ratio/out_of_band":
    "share of ratios outside [0.9, 1.1]", "ess": "effective sample size", "entropy/trainer": "trainer's entropy, nats",
    "reward/mean": "mean reward",
}  # fmt: skip

COLUMNS = (*TESTED, *SHOWN, *(f"{form}/{stat}" for form in ("trimmed", "floor") for stat in TESTED))

LEAST = 3  # independent windows

_ABOVE = 1.5  # standard errors above its estimate that a coefficient is taken for

FEW = 10  # fewer show no autocorrelation


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One statistic of one run against the first one's. Means over the windows that were compared."""

    run: int  # index of B
    stat: str
    windows: int  # pairs, or the fewer of the two
    paired: bool
    mean_a: float
    mean_b: float
    margin: float
    floored: bool  # whether any noise floor is known
    low: float  # ends of the interval of the difference of means, at the level asked for (not Holm's)
    high: float
    worth: float  # independent windows these are worth
    p: float  # NaN: they are worth fewer than 3
    p_holm: float

    def verdict(self, alpha: float) -> str:
        """``differs``, ``same`` (the interval is within the margin), ``open``, or ``too few windows``."""
        if math.isnan(self.p):
            return "too few windows"
        if self.p_holm <= alpha:
            return "differs"
        return "same" if -self.margin <= self.low and self.high <= self.margin else "open"


def compare(runs: Sequence[Columns], alpha: float = 0.05) -> list[Comparison]:
    """Every run against the first one, statistic by statistic; what was not measured in both is left out."""
    found = [
        one
        for run in range(1, len(runs))
        for stat in TESTED
        if (one := _one(runs[0], runs[run], run, stat, alpha)) is not None
    ]
    adjusted = holm([c.p for c in found])
    return [_with_holm(c, p) for c, p in zip(found, adjusted, strict=True)]


def halts_apart(a: Columns, b: Columns) -> bool:
    """Whether one run was halted, and the other went past that step without."""
    for one, other in ((a, b), (b, a)):
        if (step := standing_halt(one)) is not None and standing_halt(other) is None and other.last["step"] >= step:
            return True
    return False


def standing_halt(run: Columns) -> int | None:
    """Step at which a run was first halted; None where it was not, or where that is over."""
    return None if run.course.recovered else run.first_halt


def _one(a: Columns, b: Columns, run: int, stat: str, alpha: float) -> Comparison | None:
    (steps_a, x_a, floor_a), (steps_b, x_b, floor_b) = _values(a, stat), _values(b, stat)
    if not len(x_a) or not len(x_b):
        return None
    floors = [f for f in (floor_a, floor_b) if f is not None]
    margin = max(floors, default=0.0)
    _, at_a, at_b = np.intersect1d(steps_a, steps_b, return_indices=True)
    paired = len(at_a) >= min(LEAST, len(x_a), len(x_b))
    if paired:
        x_a, x_b = x_a[at_a], x_b[at_b]
        variance, worth = _of_mean(x_b - x_a, float(np.abs(x_a).max()))
        df = worth - 1
    else:
        (var_a, worth_a), (var_b, worth_b) = _of_mean(x_a), _of_mean(x_b)
        variance, worth = var_a + var_b, min(worth_a, worth_b)
        spread = sum(v * v / max(w - 1, 1e-9) for v, w in ((var_a, worth_a), (var_b, worth_b)))
        df = variance * variance / spread if 0 < spread < math.inf else worth - 1  # Welch
    mean_a, mean_b = float(x_a.mean()), float(x_b.mean())
    low, high, p = _test(mean_b - mean_a, math.sqrt(variance), df, margin, alpha, worth)
    if stat == "ess":  # told as it is
        mean_a, mean_b, low, high = 1 - mean_a, 1 - mean_b, -high, -low
    return Comparison(
        run=run, stat=stat, windows=min(len(x_a), len(x_b)), paired=paired, mean_a=mean_a, mean_b=mean_b,
        margin=margin, floored=bool(floors), low=low, high=high, worth=worth, p=p, p_holm=p,
    )  # fmt: skip


def _values(columns: Columns, stat: str) -> tuple[np.ndarray, np.ndarray, float | None]:
    """Steps, the statistic as rules see it, and its mean noise floor."""
    x = np.array(columns.values[f"trimmed/{stat}"])
    if not np.isfinite(x).any():
        x = np.array(columns.values[stat])
    floor = np.array(columns.values[f"floor/{stat}"])
    if stat == "ess":
        x, floor = 1 - x, 1 - floor
    known = np.isfinite(x)
    floor = floor[np.isfinite(floor)]
    # a resumed file may hold a step twice: the later one counts
    steps, first = np.unique(np.array(columns.steps)[known][::-1], return_index=True)
    return steps, x[known][::-1][first], float(floor.mean()) if len(floor) else None


def _of_mean(x: np.ndarray, scale: float = 0.0) -> tuple[float, float]:
    """Variance of the mean of a series whose neighbours resemble each other; independent draws it is worth.

    ``scale``: of what ``x`` is a difference of; spread below its rounding is none.
    """
    n = len(x)
    if n < LEAST:
        return math.inf, n
    squares = float(((x - x.mean()) ** 2).sum())
    if squares <= n * (1e-12 * max(scale, float(np.abs(x).max()))) ** 2:
        return 0.0, n
    tau = 1.0 if n < FEW else autocorrelation_time(x, _ABOVE)
    worth = n / tau
    # squares / n underestimates the variance of a draw by the factor 1 - τ / n
    return (math.inf if worth < LEAST else squares / n * tau / n / (1 - tau / n)), worth


def autocorrelation_time(x: np.ndarray, above: float = 0.0) -> float:
    """τ of a series; white noise: 1. The larger of two estimates, at least 1.

    1 + 2 Σ ρ_k, summed while ρ_2k + ρ_2k+1 > 0 (Geyer 1992), and (1 + r) / (1 - r) with r = ρ_1 + (1 + 4 ρ_1) / n
    (Marriott and Pope 1954: in a short series ρ_1 is estimated too small), and ``above`` standard errors more,
    √((1 - r²) / n): of a few dozen windows r is known to a tenth or two, and what it falls short by is taken for a
    difference.
    """
    n = len(x)
    centred = x - x.mean()
    variance = float(centred @ centred)
    if n < 4 or variance <= 0:
        return 1.0
    tau, first = -1.0, float(centred[1:] @ centred[:-1]) / variance
    for k in range(0, n - 1, 2):
        pair = float(centred[: n - k] @ centred[k:]) + float(centred[: n - k - 1] @ centred[k + 1 :])
        if pair <= 0:
            break
        tau += 2 * pair / variance
    r = first + (1 + 4 * first) / n
    r = min(max(r + above * math.sqrt(max(1 - r * r, 0.0) / n), 0.0), 0.99)
    return max(1.0, tau, (1 + r) / (1 - r))


def _test(
    difference: float, error: float, df: float, margin: float, alpha: float, worth: float
) -> tuple[float, float, float]:
    """Ends of the interval, and the p-value of |difference| <= margin."""
    from scipy import stats

    if worth < LEAST:
        return math.nan, math.nan, math.nan
    half = float(stats.t.ppf(1 - alpha / 2, df)) * error
    beyond = abs(difference) - margin
    if error == 0:
        p = 0.0 if beyond > 0 else 1.0
    else:
        p = min(1.0, 2 * float(stats.t.sf(beyond / error, df)))
    return difference - half, difference + half, p


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down p-values; NaN (nothing tested) takes no part."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    out, largest = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, ps[i] * (len(order) - rank)))
        out[i] = largest
    return out


def _with_holm(c: Comparison, p: float) -> Comparison:
    from dataclasses import replace

    return replace(c, p_holm=p)
