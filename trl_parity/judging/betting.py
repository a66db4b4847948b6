"""Bets against a null hypothesis, to be looked at after every window: an e-process, and factors for it. No torch.

Sources: Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences",
Annals of Statistics 49 (2021); Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
JRSS B 86 (2024); Shin, Ramdas and Rinaldo, "E-detectors", NEJSDS (2024); Fan, Grama and Liu, "Exponential inequalities
for martingales with applications", EJP 20 (2015); Wallace, "Bounds on normal approximations to Student's and the
chi-square distributions", Annals of Mathematical Statistics 30 (1959).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..metrics.statistics import CLIP

__all__ = ["CLIP", "SHARES", "SHIFTS", "Bets", "honesty_bets", "normal_score", "score_bets"]

SHARES = 0.95 * 0.5 ** np.arange(8)  # of the wealth, bet on a token

SHIFTS = np.array([0.25, 0.5, 1.0, 2.0, 3.0])  # of a window's normal score, bet on

_LARGEST = 1e100  # what evidence is cut off at


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

    FIELDS = ("wealth", "cusum", "onset", "total", "count")

    def __init__(self, size: int, share: float = 1.0, shape: tuple[int, ...] = ()):
        self.share, self.windows = share, 0
        self.losses = 0  # windows in a row in which the bet that holds the most lost (of a single run)
        self.wealth, self.cusum, self.onset, self.total, self.count = np.zeros((5, *shape, size))
        self._sum_up()

    def update(self, step: int, log_factors: np.ndarray, values: np.ndarray) -> None:
        """One window: log f, and what it was made of (for ``best``), both (..., size)."""
        self.windows += 1
        factors = np.minimum(np.exp(np.minimum(log_factors, 700.0)), 100.0)
        self.wealth = np.minimum(
            (self.wealth + _waiting(self.windows) - _waiting(self.windows + 1)) * factors, _LARGEST
        )
        if self.wealth.ndim == 1:
            self.losses = self.losses + 1 if factors[self.wealth.argmax()] < 1.0 else 0
        rising = self.cusum > 1.0  # CUSUM of the bet: it last began to rise where this left 1
        self.onset = np.where(rising, self.onset, step)
        self.total = self.total * rising + values
        self.count = self.count * rising + 1.0
        self.cusum = np.minimum(np.maximum(self.cusum, 1.0) * factors, _LARGEST)
        self._sum_up()

    def _sum_up(self) -> None:
        """``running``, the mean over k of R, is what the bets that began are worth; ``log10_evidence`` is log M."""
        self.running: Any = self.wealth.sum(-1) / self.wealth.shape[-1]
        self.log10_evidence: Any = np.log10(self.share * (self.running + _waiting(self.windows + 1)))

    def best(self) -> tuple[int, int, float]:
        """Of the bet that holds the most: its index, its onset and the mean of its values since then."""
        k = int(np.argmax(self.wealth))
        return k, int(self.onset[k]), float(self.total[k] / max(self.count[k], 1.0))

    def restart(self) -> None:
        """Begin anew, as before the first window."""
        self.load_state(Bets(self.wealth.shape[-1], self.share, self.wealth.shape[:-1]).state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        arrays = {name: getattr(self, name).tolist() for name in self.FIELDS}
        return {"windows": self.windows, "losses": self.losses} | arrays

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``; one of other bets (another version's) is left alone."""
        if np.shape(state["wealth"]) == self.wealth.shape:
            self.windows, self.losses = int(state["windows"]), int(state["losses"])
            for name in self.FIELDS:
                setattr(self, name, np.array(state[name], dtype=float))
            self._sum_up()


def honesty_bets(tokens: Any, mean: Any, square: Any, low: Any, high: Any) -> np.ndarray:
    """Log-factors on a mean ratio above 1 and on one below, (..., 16), from sums over a window's tokens.

    ``mean`` and ``square`` of x and x², x = min(w, 2) - 1 in [-1, 1]. Null hypothesis, at every token given those
    before it: 1 - low <= E[min(w, 2)] <= 1 + high. With y = (±x - effect) / (1 + effect) >= -1, a share b in [0, 1):

        exp(b y - (-log(1 - b) - b) y²) <= 1 + b y                    (Fan, Grama and Liu 2015, lemma 4.1)

    the mean of which is at most 1: the product over tokens in the order of sampling is a supermartingale, and needs
    only Σy and Σy². So tokens of a sequence may depend on each other, sequences may have any lengths, and tails do not
    matter. Assumed: sequences are drawn apart (given the prompts), and none is left out for what it turned out to be.

    Above 1 nothing more is: E[min(w, 2)] <= E[w] = 1 where the engine tells the probability it sampled with, for any
    trainer's law that was not learned from these very tokens. Below 1, what clipping takes must be bounded: it is
    E[(w - 2)+] <= 1.26 KL(rollout‖trainer), so that ``low`` makes it "honest, and within a KL of low / 1.26".
    """
    penalty = -np.log1p(-SHARES) - SHARES
    sides = []
    for x, effect in ((mean, high), (-mean, low)):
        total = tokens * (x - effect) / (1.0 + effect)
        squares = tokens * (square - 2.0 * effect * x + effect**2) / (1.0 + effect) ** 2
        sides += [np.multiply.outer(total, SHARES) - np.multiply.outer(squares, penalty)]
    return np.concatenate(sides, axis=-1)


def normal_score(t: np.ndarray, dof: np.ndarray) -> np.ndarray:
    """The normal quantile of a t statistic, by Wallace's approximation: a little nearer to 0 (0.08 at |t| = 20)."""
    return np.sign(t) * np.sqrt(dof * np.log1p(t * t / dof)) * (8.0 * dof + 1.0) / (8.0 * dof + 3.0)


def score_bets(t: np.ndarray, dof: np.ndarray) -> np.ndarray:
    """Log-factors b z - b²/2 on t statistics (..., n) that are too high, z the normal score: (..., n x 5).

    Each has mean 1 at most where t lies stochastically below Student's, given the past. Of a t that is not known
    (NaN): no bet, 0.
    """
    factors = SHIFTS * normal_score(t, dof)[..., None] - 0.5 * SHIFTS**2
    return np.where(np.isfinite(factors), factors, 0.0).reshape(*t.shape[:-1], -1)


def _waiting(t: int) -> float:
    """log 2 / log(1 + t): the wealth that has not started before window t >= 1."""
    return math.log(2.0) / math.log1p(t)
