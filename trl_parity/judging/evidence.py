"""All the evidence of a run: three sequential tests that may be looked at after every window. Pure, constant memory.

    honesty   the mean ratio w = trainer / rollout probability of the sampled tokens is 1, as under any honest engine
    drift     mean Δ, mean |Δ| and k3 are within what the noise floor, with its own uncertainty, allows
    change    mean |Δ| and k3 are what they were in this run's own past

Each is an e-process: M >= 0, a supermartingale from M_0 = 1/3 while its null hypothesis holds. By Ville's inequality M
ever reaches 1/alpha with probability alpha / 3 at most: ``log10 M >= -log10 alpha`` decides at any window, and alpha
is the false-alarm rate of a whole run, of any length, over the three. Each null hypothesis contains a smallest effect:
no number of windows condemns a drift that does not matter. No window multiplies a bet by more than 100 (a factor cut
off is still one of a supermartingale), so that three windows at least decide, and no single token, sequence or window
of any size does.

Sources: Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences",
Annals of Statistics 49 (2021); Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
JRSS B 86 (2024); Shin, Ramdas and Rinaldo, "E-detectors", NEJSDS (2024); Fan, Grama and Liu, "Exponential inequalities
for martingales with applications", EJP 20 (2015); Quesenberry, "SPC Q charts for start-up processes for short or long
runs", Journal of Quality Technology 23 (1991); Wallace, "Bounds on normal approximations to Student's and the
chi-square distributions", Annals of Mathematical Statistics 30 (1959).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["CLIP", "EFFECTS", "TESTS", "Bets", "Evidence", "Finding", "Past", "honesty_bets", "normal_score"]

TESTS = ("honesty", "drift", "change")

# The smallest effects that matter: of the mean ratio (0.002 a token is a factor e in the ratio of 500 tokens) and of
# mean Δ; of the others the limits that the fixed rules set on the excess.
EFFECTS = {"honesty": 0.002, "kl_k1": 0.002, "logp_abs_diff/mean": 0.003, "kl_k3": 1e-4}

CLIP = 2.0  # a ratio above it counts as it in the test of honesty

# (w - 2)+ <= 1.26 (w - 1 - log w) for every w: clipping takes at most this times the KL from the mean ratio
_CLIPPED_PER_KL = 1.26

_NO_FLOOR_KL = 0.01  # KL that is allowed an honest engine where no floor is known: the rule's own absolute limit

_SHARES = 0.95 * 0.5 ** np.arange(8)  # of the wealth, bet on a token

_SHIFTS = np.array([0.25, 0.5, 1.0, 2.0, 3.0])  # of a window's normal score, bet on

_FEW = 5  # windows before their spread is known well enough

_HISTORY = 20  # windows of past before a change is looked for

_MEMORY = 200  # windows that the past reaches back, effectively

_DELAY = 10  # windows that wait before they are past

_SPREAD = 0.05  # the least standard deviation of a window: of log |Δ| and log k3, and of Δ in units of its effect

_LARGEST = 1e100  # what evidence is cut off at

_STATS = ("kl_k1", "logp_abs_diff/mean", "kl_k3")

_INPUTS = (
    "ratio/clipped", "ratio/clipped_square", "kl_k1", "trimmed/logp_abs_diff/mean", "trimmed/kl_k3",
    *(f"se/{stat}" for stat in _STATS), *(f"floor/{stat}" for stat in _STATS),
    *(f"floor_upper/{stat}" for stat in ("kl_k3", *_STATS[1:])),
)  # fmt: skip

# what each test bets on; of drift and change also the statistic's place and its sign
_SIDES = {
    "honesty": ("mean ratio above 1", "mean ratio below 1"),
    "drift": ("mean Δ above 0", "mean Δ below 0", *_STATS[1:]),
    "change": _STATS[1:],
}

_PLACES, _SIGNS = np.array([0, 0, 1, 2]), np.array([1.0, -1.0, 1.0, 1.0])


class Finding(NamedTuple):
    """What one test says most loudly."""

    test: str
    log10_evidence: float
    statistic: str  # of the bet that holds the most
    onset: int  # first step of the run of windows that speaks for it
    level: float  # its mean since then: clipped ratio, Δ, |Δ| or k3; of a change the multiple of the past's


class Bets:
    """A mixture of bets over sizes and start times: an e-process of constant memory.

    With factors f_k,t, each E[f_k,t | past] <= 1 under the null hypothesis,

        R_k,t = (R_k,t-1 + g_t) min(f_k,t, 100)          g_t = p_t - p_t+1,  p_t = log 2 / log(1 + t)
        M_t   = share (mean over k of R_k,t + p_t+1)

    the Shiryaev-Roberts recursion with a prior on the start: window t brings the part g_t of the wealth (they sum to
    1), the rest waits. M is a nonnegative supermartingale with M_0 = share, so Ville's inequality holds for the whole
    run: an e-detector with control of the false-alarm probability in place of the average run length. A fault that
    begins at window t pays log(1/g_t) for it, 11 nats at t = 1000, and nothing for the healthy windows before.
    """

    FIELDS = ("windows", "wealth", "cusum", "onset", "total", "count")

    def __init__(self, size: int, share: float = 1.0, shape: tuple[int, ...] = ()):
        self.share, self.windows = share, 0
        self.wealth, self.cusum, self.onset, self.total, self.count = np.zeros((5, *shape, size))

    def update(self, step: int, log_factors: np.ndarray, values: np.ndarray) -> None:
        """One window: log f, and what it was made of (for ``best``), both (..., size)."""
        self.windows += 1
        factors = np.minimum(np.exp(np.minimum(log_factors, 700.0)), 100.0)
        self.wealth = np.minimum(
            (self.wealth + _waiting(self.windows) - _waiting(self.windows + 1)) * factors, _LARGEST
        )
        rising = self.cusum > 1.0  # CUSUM of the bet: it last began to rise where this left 1
        self.onset = np.where(rising, self.onset, step)
        self.total = self.total * rising + values
        self.count = self.count * rising + 1.0
        self.cusum = np.minimum(np.maximum(self.cusum, 1.0) * factors, _LARGEST)

    @property
    def running(self) -> Any:
        """Mean over k of R: what the bets that have started are worth."""
        return self.wealth.mean(-1)

    @property
    def log10_evidence(self) -> Any:
        """log10 M."""
        return np.log10(self.share * (self.running + _waiting(self.windows + 1)))

    def best(self) -> tuple[int, int, float]:
        """Of the bet that holds the most: its index, its onset and the mean of its values since then."""
        k = int(np.argmax(self.wealth))
        return k, int(self.onset[k]), float(self.total[k] / max(self.count[k], 1.0))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        return {name: np.asarray(getattr(self, name)).tolist() for name in self.FIELDS}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``; one of other bets (another version's) is left alone."""
        if np.shape(state["wealth"]) == self.wealth.shape:
            self.windows = int(state["windows"])
            for name in self.FIELDS[1:]:
                setattr(self, name, np.array(state[name], dtype=float))


class Past:
    """Level, spread and lag-1 correlation of the statistics of windows, over the last 200 or so.

    Plain moments, exponential weights from 200 on; residuals are cut off at 3 standard deviations. The newest windows
    (a quarter of those known, 10 at most) wait: those of a change are not to hide it.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.n, self.mean, self.var, self.cov, self.last = np.zeros((5, *shape))
        self.queue: list[np.ndarray] = []

    def add(self, y: np.ndarray, calm: np.ndarray) -> None:
        """Let a window wait; the oldest that waits becomes past where it is known and ``calm``, and is dropped else."""
        self.queue.append(y)
        if len(self.queue) <= min(_DELAY, float(self.n.max()) // 4):
            return
        y = self.queue.pop(0)
        where = calm & np.isfinite(y)
        weight = where / np.minimum(self.n + 1.0, _MEMORY)
        far = np.where(self.n >= _FEW, 3.0 * np.sqrt(self.var) + 1e-12, np.inf)
        residual = np.where(where, np.minimum(np.maximum(y - self.mean, -far), far), 0.0)
        self.mean = self.mean + weight * residual
        self.var = (1.0 - weight) * (self.var + weight * residual * residual)
        self.cov = (1.0 - weight) * (self.cov + weight * residual * self.last)
        self.last = np.where(where, residual * (self.n > 0), self.last)  # of the first, all is residual
        self.n = np.minimum(self.n + where, _MEMORY)

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation of a window; times (1 + r) / (1 - r) in the variance where the correlation r is positive.

        Sums of windows of lag-1 correlation r spread as sums of independent ones of this deviation do.
        """
        r = np.minimum(np.maximum(self.cov / (self.var + 1e-300), 0.0), 0.9)
        return np.sqrt(self.var * self.n / np.maximum(self.n - 1.0, 1.0) * (1.0 + r) / (1.0 - r))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        moments = [self.n, self.mean, self.var, self.cov, self.last]
        queue = [[x if math.isfinite(x) else None for x in y.tolist()] for y in self.queue]
        return {"moments": [moment.tolist() for moment in moments], "queue": queue}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``."""
        self.n, self.mean, self.var, self.cov, self.last = np.array(state["moments"], dtype=float)
        self.queue = [np.array(y, dtype=float) for y in state["queue"]]


def honesty_bets(tokens: Any, mean: Any, square: Any, low: Any, high: Any) -> np.ndarray:
    """Log-factors on a mean ratio above 1 and on one below, (..., 16), from sums over a window's tokens.

    ``mean`` and ``square`` of x and x², x = min(w, 2) - 1 in [-1, 1]. Null hypothesis, at every token given those
    before it: 1 - low <= E[min(w, 2)] <= 1 + high. With y = (±x - effect) / (1 + effect) >= -1 and a share b in [0, 1),

        exp(b y - (-log(1 - b) - b) y²) <= 1 + b y                    (Fan, Grama and Liu 2015, lemma 4.1)

    the mean of which is at most 1: the product over tokens in the order of sampling is a supermartingale, and needs
    only Σy and Σy². So tokens of a sequence may depend on each other, sequences may have any lengths, and tails do not
    matter. Assumed: sequences are drawn apart (given the prompts), and none is left out for what it turned out to be.

    Above 1 nothing more is: E[min(w, 2)] <= E[w] = 1 where the engine tells the probability it sampled with, for any
    trainer's law that was not learned from these very tokens. Below 1, what clipping takes must be bounded: it is
    E[(w - 2)+] <= 1.26 KL(rollout‖trainer), so that ``low`` makes it "honest, and within a KL of low / 1.26".
    """
    penalty = -np.log1p(-_SHARES) - _SHARES
    sides = []
    for x, effect in ((mean, high), (-mean, low)):
        total = tokens * (x - effect) / (1.0 + effect)
        squares = tokens * (square - 2.0 * effect * x + effect**2) / (1.0 + effect) ** 2
        sides += [np.multiply.outer(total, _SHARES) - np.multiply.outer(squares, penalty)]
    return np.concatenate(sides, axis=-1)


def normal_score(t: np.ndarray, dof: np.ndarray) -> np.ndarray:
    """The normal quantile of a t statistic, by Wallace's approximation: a little nearer to 0 (0.06 at |t| = 20)."""
    return np.sign(t) * np.sqrt(dof * np.log1p(t * t / dof)) * (8.0 * dof + 1.0) / (8.0 * dof + 3.0)


class Evidence:
    """The three tests of a run, from what a window's line in ``metrics.jsonl`` holds. What is missing is not bet on.

    Read from it: ``ratio/clipped`` and ``ratio/clipped_square``, means of min(w, 2) and of (min(w, 2) - 1)²; ``kl_k1``,
    ``trimmed/logp_abs_diff/mean``, ``trimmed/kl_k3``; ``floor/<stat>``, and ``floor_upper/<stat>``, an upper confidence
    bound (a floor's error is the same in all windows: it does not average out); ``se/<stat>``, standard errors over
    independent sequences, with which ``drift`` begins at once instead of after five windows.

    drift: y = log x of a statistic x, limit m = log max(upper + effect, ``floor_factor`` x upper); of Δ: y = ± mean Δ,
    m = effect + upper of k3, since an honest engine has E[-Δ] = KL. t = (y - m) / scale, scale the larger of the
    standard error within the window and the spread of the windows before it; z is t's normal score, exp(b z - b²/2)
    the factor. Assumption: given the past, t lies stochastically below Student's, as for normal means of at most m;
    skew to the right and single outliers lower it, as they raise the scale.

    change: the same with m = log max(``change_factor`` x level, level + effect, floor), level the past's, from 20
    windows of it on. These z are Quesenberry's Q statistics: independent standard normal while windows are normal with
    any constant mean and variance. The past learns nothing while bets on drift or change that run are worth over 1.

    ``alpha``: false alarms a run. ``shape``: of independent runs in lockstep, whose values are arrays (simulations).
    """

    def __init__(
        self,
        alpha: float = 1e-4,
        effects: Mapping[str, float] | None = None,
        floor_factor: float = 1.25,
        change_factor: float = 1.25,
        shape: tuple[int, ...] = (),
    ):
        self.limit = -math.log10(alpha)
        effects = EFFECTS | dict(effects or {})
        self._honesty, self._effects = effects["honesty"], np.array([effects[stat] for stat in _STATS])
        self._least = _SPREAD * np.array([self._effects[0], 1.0, 1.0])
        self.floor_factor, self.change_factor = floor_factor, change_factor
        self.past = Past((*shape, len(_STATS)))
        sizes = {test: len(sides) * len(_SHARES if test == "honesty" else _SHIFTS) for test, sides in _SIDES.items()}
        self.bets = {test: Bets(size, 1.0 / len(TESTS), shape) for test, size in sizes.items()}

    def update(self, step: int, tokens: Any, sequences: Any, values: Mapping[str, Any], copies: Any = 1) -> None:
        """Take in one judged window, once. From reduced numbers: the same on every rank.

        ``copies``: rows of the window that are equal because they are one draw (1: none), at most. Its log-factors of
        honesty are divided by it, which is valid however they depend on each other (Hölder's inequality).
        """
        given = np.array([math.nan if (x := values.get(name)) is None else x for name in _INPUTS], dtype=float).T
        mean, square, x = given[..., 0], given[..., 1], given[..., 2:5]
        error, floor, upper = given[..., 5:8], given[..., 8:11], given[..., 11:14]
        x[..., 0] *= -1.0  # mean Δ
        if np.isfinite(mean).all():
            kl = np.where(np.isfinite(upper[..., 2]), upper[..., 2], _NO_FLOOR_KL)
            low = self._honesty + _CLIPPED_PER_KL * kl
            factors = honesty_bets(tokens, mean - 1.0, square, low, self._honesty) / copies
            self.bets["honesty"].update(step, factors, mean[..., None])
        with np.errstate(invalid="ignore", divide="ignore"):
            effect, past = self._effects, self.past
            y, limit = np.log(np.maximum(x, effect)), np.log(np.maximum(upper + effect, self.floor_factor * upper))
            y[..., 0], limit[..., 0] = x[..., 0], upper[..., 0] + effect[0]
            error[..., 1:] /= x[..., 1:]
            spread = np.where(past.n >= _FEW, past.spread, math.nan)
            within = ~(spread >= error) & (error >= 0.0)  # the larger, or the only one that is known
            dof = np.maximum(np.where(within, np.asarray(sequences)[..., None], past.n) - 1.0, 1.0)
            scale = np.maximum(np.fmax(spread, error), self._least)
            drift = (_SIGNS * y[..., _PLACES] - limit[..., _PLACES]) / scale[..., _PLACES]
            self._bet("drift", step, drift, dof[..., _PLACES], x[..., _PLACES])
            level = np.exp(past.mean)
            limit = np.log(np.fmax(np.maximum(self.change_factor * level, level + effect), floor))
            change = np.where(past.n >= _HISTORY, (y - limit) / (scale * np.sqrt(1.0 + 1.0 / past.n)), math.nan)
            self._bet("change", step, change[..., 1:], dof[..., 1:], (x / level)[..., 1:])
        calm = np.maximum(self.bets["drift"].running, self.bets["change"].running) <= 1.0
        past.add(y, np.asarray(calm)[..., None])

    def _bet(self, test: str, step: int, t: np.ndarray, dof: np.ndarray, values: np.ndarray) -> None:
        """A window's t statistics; those not known (NaN) are no bet, and a window without any is none of the test's."""
        known = np.isfinite(t)
        if known.any():
            z = np.where(known, normal_score(t, dof), math.nan)[..., None]
            factors = np.nan_to_num(_SHIFTS * z - 0.5 * _SHIFTS**2).reshape(self.bets[test].wealth.shape)
            self.bets[test].update(step, factors, np.repeat(np.where(known, values, 0.0), len(_SHIFTS), axis=-1))

    def scalars(self) -> dict[str, float | None]:
        """``evidence/<test>``: log10 M, a decision from ``limit`` on; None before the first window of the test.

        ``evidence/onset``: the step since when the strongest test's bet rises, once its M is above 1.
        """
        found: dict[str, float | None] = {f"evidence/{test}": None for test in TESTS} | {"evidence/onset": None}
        found |= {f"evidence/{t}": float(bets.log10_evidence) for t, bets in self.bets.items() if bets.windows}
        strongest = max(TESTS, key=lambda test: found[f"evidence/{test}"] or -math.inf)
        if (found[f"evidence/{strongest}"] or 0.0) > 0.0:
            found["evidence/onset"] = float(self.bets[strongest].best()[1])
        return found

    def finding(self, test: str) -> Finding:
        """What one test says most loudly."""
        bets, sides = self.bets[test], _SIDES[test]
        k, onset, level = bets.best()
        return Finding(test, float(bets.log10_evidence), sides[k * len(sides) // bets.wealth.shape[-1]], onset, level)

    @property
    def decided(self) -> tuple[str, ...]:
        """Tests whose evidence is at the limit now."""
        return tuple(test for test in TESTS if self.bets[test].log10_evidence >= self.limit)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        return {"bets": {test: bets.state() for test, bets in self.bets.items()}, "past": self.past.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``."""
        for test, bets in self.bets.items():
            bets.load_state(state["bets"][test])
        self.past.load_state(state["past"])


def _waiting(t: int) -> float:
    """log 2 / log(1 + t): the wealth that has not started before window t >= 1."""
    return math.log(2.0) / math.log1p(t)
