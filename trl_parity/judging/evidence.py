"""All the evidence of a run: four sequential tests that may be looked at after every window. Pure, constant memory.

    honesty   the mean ratio w = trainer / rollout probability of the sampled tokens is 1, as under any honest engine
    drift     mean Δ, mean |Δ| and k3 are within what the noise floor, with its own uncertainty, allows
    change    mean |Δ| and k3 are what they were in this run's own past
    entropy   the sampled tokens are as surprising as the trainer's law says: E[-log π(y)] = H(π)

Each is an e-process: M >= 0, a supermartingale from M_0 = 1/4 while its null hypothesis holds. By Ville's inequality M
ever reaches 1/alpha with probability alpha / 4 at most: ``log10 M >= -log10 alpha`` decides at any window, and alpha
is the false-alarm rate of a whole run, of any length, over the four. Each null hypothesis contains a smallest effect:
no number of windows condemns a drift that does not matter. No window multiplies a bet by more than 100 (a factor cut
off is still one of a supermartingale): while M is below 1, two windows can't decide, let alone one, or one sequence or
token of any size. What is decided condemns the windows that speak for it. After three in a row that speak against it,
its test begins anew.

What the bets are made of, and the theorems: ``trl_parity.judging.betting``. Quesenberry, "SPC Q charts for start-up
processes for short or long runs", Journal of Quality Technology 23 (1991).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..config.parity import ParityConfig
from ..config.rules import EVIDENCE_EFFECTS
from ..verdict import MismatchStats
from .betting import SHARES, SHIFTS, Bets, honesty_bets, score_bets

__all__ = ["TESTS", "Evidence", "Finding", "Past"]

TESTS = ("honesty", "drift", "change", "entropy")

# (w - 2)+ <= 1.26 (w - 1 - log w) for every w: clipping takes at most this times the KL from the mean ratio
_CLIPPED_PER_KL = 1.26

_NO_FLOOR_KL = 0.01  # KL that is allowed an honest engine where no floor is known: the rule's own absolute limit

_FEW = 5  # windows before their spread is known well enough

_HISTORY = 20  # windows of past before a change is looked for

_MEMORY = 200  # windows that the past reaches back, effectively

_OVER = 3  # windows in a row that speak against what was decided: it is over, and the test begins anew

_DELAY = 10  # windows that wait before they are past

# The least standard deviation of a window given the past: of Δ, log |Δ|, log k3 and the entropy's drift. Healthy
# windows follow the policy and their prompts, in stretches that few windows, or the sequences of one, do not show.
_LEAST = np.array([1e-4, 0.15, 0.3, 0.0])

_STATS = ("kl_k1", "logp_abs_diff/mean", "kl_k3", "entropy/drift")

_INPUTS = (
    "ratio/clipped", "ratio/clipped_square",
    "kl_k1", "trimmed/logp_abs_diff/mean", "trimmed/kl_k3", "entropy/drift",
    *(f"se/{stat}" for stat in _STATS), *(f"floor/{stat}" for stat in _STATS[1:3]),
    *(f"floor_upper/{stat}" for stat in ("kl_k3", *_STATS[1:3])),
    "entropy/trainer", "cost/coverage",
)  # fmt: skip

# what each test bets on
_SIDES = {
    "honesty": ("mean ratio above 1", "mean ratio below 1"),
    "drift": ("mean Δ above 0", *_STATS[1:3], "mean Δ below 0"),
    "change": _STATS[1:3],
    "entropy": ("surprisal below the entropy", "surprisal above the entropy"),
}

# of ``_STATS`` above their limits, of ``_STATS`` below them, and of changes: those that are bet on, in that order
_ORDER = np.array([0, 1, 2, 4, 8, 9, 3, 7])


class Finding(NamedTuple):
    """What one test says most loudly."""

    test: str
    log10_evidence: float
    statistic: str  # of the bet that holds the most
    onset: int  # first step of the run of windows that speaks for it
    level: float  # its mean since then: clipped ratio, Δ, |Δ| or k3; of a change the multiple of the past's


class Past:
    """Level, spread and lag-1 correlation of the statistics of windows, over the last 200 or so.

    Plain moments, exponential weights from 200 on; residuals are cut off at 3 standard deviations. The newest windows
    (a quarter of those known, 10 at most) wait: those of a change are not to hide it.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.n, self.mean, self.var, self.cov, self.last = np.zeros((5, *shape))
        self.queue: list[np.ndarray] = []

    def add(self, y: np.ndarray, calm: np.ndarray) -> None:
        """Let a window wait; the oldest that waits becomes past where it is known and ``calm``, else it is dropped."""
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
        """Restore ``state``; what an older version did not look at has no past."""
        missing = len(self.n) - len(state["moments"][0])
        moments = np.pad(np.array(state["moments"], dtype=float), ((0, 0), (0, missing)))
        self.n, self.mean, self.var, self.cov, self.last = moments
        self.queue = [np.pad(np.array(y, dtype=float), (0, missing), constant_values=math.nan) for y in state["queue"]]


class Evidence:
    """The four tests of a run, from what a window's line in ``metrics.jsonl`` holds. What is missing is not bet on.

    Read from it: ``ratio/clipped`` and ``ratio/clipped_square``, means of min(w, 2) and of (min(w, 2) - 1)²;
    ``kl_k1``, ``trimmed/logp_abs_diff/mean``, ``trimmed/kl_k3``; ``floor/<stat>``, and ``floor_upper/<stat>``, an
    upper confidence bound (a floor's error is the same in all windows: it does not average out); ``se/<stat>``,
    standard errors over independent sequences, with which ``drift`` begins at once instead of after five windows;
    ``entropy/drift`` and ``entropy/trainer``; ``cost/coverage``, the share of the tokens whose entropy is known.

    drift: y = log x of a statistic x, limit m = log max(upper + effect, ``floor_factor`` x upper); of Δ: y = ± mean Δ,
    m = effect + upper of k3, since an honest engine has E[-Δ] = KL. t = (y - m) / scale, scale the larger of the
    standard error within the window and the spread of the windows before it; z is t's normal score, exp(b z - b²/2)
    the factor. Assumption: given the past, t lies stochastically below Student's, as for normal means of at most m;
    skew to the right and single outliers lower it, as they raise the scale. A stretch of windows over the limit is a
    drift: where it is chance (correlated windows), the spread, with their correlation in it, is what bounds it.

    change: the same with m = log max(``change_factor`` x level, level + effect, floor), level the past's, from 20
    windows of it on: Quesenberry's Q statistics, independent standard normal while windows are normal with any
    constant mean and variance, here shrunk by the margin and the least spread. The past learns nothing while the bets
    on drift or change that run are worth over 1.

    entropy: y = ± entropy/drift, m = effect + mean |Δ| (laws that far apart may differ in entropy by as much). Sampled
    from the trainer's law, Σ(H + log π(y)) is a martingale whatever the prompts. The scale is the larger of standard
    error and spread, as above, and of sqrt(H (1 + log+ 1/H) / n) + (3 + log+ 1/H) / n: of a peaked law most windows
    lack the rare token that makes up for the others, and without it neither shows how far they spread. The log-factors
    are divided by ``copies``. Of a sample of the tokens n is how many were scored, its chance is in the standard error
    (without one there is no bet), and the spread of the windows before is that of windows of all tokens.

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
        effects = EVIDENCE_EFFECTS | dict(effects or {})
        self._honesty, self._effects = effects["honesty"], np.array([effects[stat] for stat in _STATS])
        self.floor_factor, self.change_factor = floor_factor, change_factor
        self._missing = np.full(shape, math.nan) if shape else math.nan
        self.past = Past((*shape, len(_STATS)))
        sizes = {test: len(sides) * len(SHARES if test == "honesty" else SHIFTS) for test, sides in _SIDES.items()}
        self.bets = {test: Bets(size, 1.0 / len(TESTS), shape) for test, size in sizes.items()}

    @classmethod
    def from_config(cls, config: ParityConfig) -> Evidence:
        """With the config's settings, before the first window."""
        effects = config.evidence_smallest_effects()
        return cls(config.evidence_alpha, effects, config.evidence_floor_factor, config.evidence_change_factor)

    def add(self, step: int, stats: MismatchStats | None) -> MismatchStats | None:
        """Take in a window that is to be judged; its statistics with ``scalars`` in them.

        One that was not measured, or only in part, or has no token to compare is left as it is.
        """
        if stats is None or stats.num_errors or stats.get("nonfinite_rate") is None:
            return stats
        copies = stats.get("copies") or 1.0
        self.update(step, stats.num_tokens, stats.num_sequences, stats, copies)
        return stats.updated(self.scalars())

    def update(self, step: int, tokens: Any, sequences: Any, values: Mapping[str, Any], copies: Any = 1) -> None:
        """Take in one judged window, once. From reduced numbers: the same on every rank.

        ``tokens`` and ``sequences``: compared in the window. ``copies``: the largest number of its rows that are equal
        because they are one draw (1: none). The log-factors of honesty and entropy are divided by it, which is valid
        however the copies depend on each other (Hölder's inequality).
        """
        given = np.array([self._missing if (x := values.get(name)) is None else x for name in _INPUTS], dtype=float).T
        mean, square, x, error = given[..., 0], given[..., 1], given[..., 2:6], given[..., 6:10]
        floor, upper, entropy, coverage = given[..., 10:12], given[..., 12:15], given[..., 15], given[..., 16]
        sampled = coverage < 1.0
        x[..., 0] *= -1.0  # mean Δ
        x[..., 3] = np.where(sampled & ~np.isfinite(error[..., 3]), math.nan, x[..., 3])
        if np.isfinite(mean + square).all():
            kl = np.where(np.isfinite(upper[..., 0]), upper[..., 0], _NO_FLOOR_KL)
            low = self._honesty + _CLIPPED_PER_KL * kl
            factors = honesty_bets(tokens, mean - 1.0, square, low, self._honesty) / copies
            self.bets["honesty"].update(step, factors, mean[..., None])
        past, effect = self.past, self._effects
        with np.errstate(invalid="ignore", divide="ignore"):
            y, level = x.copy(), np.exp(past.mean[..., 1:3])
            y[..., 1:3] = np.log(np.maximum(x[..., 1:3], effect[1:3]))
            limit = np.empty_like(y)
            limit[..., 0] = upper[..., 0] + effect[0]
            limit[..., 1:3] = np.log(np.maximum(upper[..., 1:] + effect[1:3], self.floor_factor * upper[..., 1:]))
            limit[..., 3] = np.fmax(x[..., 1], 0.0) + effect[3]
            error[..., 1:3] /= x[..., 1:3]
            larger = np.fmax(np.where(past.n >= _FEW, past.spread, math.nan), error)
            dof = np.maximum(np.where(larger == error, np.asarray(sequences)[..., None], past.n) - 1.0, 1.0)
            scale = np.maximum(larger, _LEAST)
            rare = np.maximum(-np.log(entropy), 0.0)
            scored = tokens * np.where(sampled, coverage, 1.0)
            scale[..., 3] = np.maximum(scale[..., 3], np.sqrt(entropy * (1.0 + rare) / scored) + (3.0 + rare) / scored)
            above, below = (y - limit) / scale, (-y - limit) / scale
            limit = np.log(np.fmax(np.maximum(self.change_factor * level, level + effect[1:3]), floor))
            pooled = scale[..., 1:3] * np.sqrt(1.0 + 1.0 / past.n[..., 1:3])
            change = np.where(past.n[..., 1:3] >= _HISTORY, (y[..., 1:3] - limit) / pooled, math.nan)
            t = np.concatenate([above, below, change], axis=-1)[..., _ORDER]
            factors = score_bets(t, np.concatenate([dof, dof, dof[..., 1:3]], axis=-1)[..., _ORDER])
            told = np.concatenate([x, x, x[..., 1:3] / level], axis=-1)[..., _ORDER]
        known = np.isfinite(t)
        told = np.repeat(np.where(known, told, 0.0), len(SHIFTS), axis=-1)
        first = 0
        for test in ("drift", "change", "entropy"):
            sides = slice(first, first := first + len(_SIDES[test]))
            if known[..., sides].any():
                whose = slice(sides.start * len(SHIFTS), sides.stop * len(SHIFTS))
                share = np.asarray(copies)[..., None] if test == "entropy" else 1.0
                self.bets[test].update(step, factors[..., whose] / share, told[..., whose])
        calm = np.maximum(self.bets["drift"].running, self.bets["change"].running) <= 1.0
        y[..., 3] = np.where(sampled, math.nan, y[..., 3])
        past.add(y, np.stack([calm, calm, calm, self.bets["entropy"].running <= 1.0], axis=-1))
        for bets in self.bets.values():
            if bets.losses >= _OVER and bets.log10_evidence >= self.limit:
                bets.restart()

    def scalars(self) -> dict[str, float | None]:
        """``evidence/<test>``: log10 M, a decision from ``limit`` on; None before the first window of the test.

        Of a decision that the window speaks against, 0: the window is none of those it was made of. Of less evidence
        that it speaks against, half of ``limit`` at most: nobody is warned of it. ``evidence/onset``: the step since
        when the strongest test's bet rises, once its M is above 1.
        """
        known = {test: float(bets.log10_evidence) for test, bets in self.bets.items() if bets.windows}
        against = [test for test in known if self.bets[test].losses]
        known |= {test: 0.0 if test in self.decided else min(known[test], self.limit / 2.0) for test in against}
        found: dict[str, float | None] = {f"evidence/{test}": known.get(test) for test in TESTS}
        strongest = max(known, key=lambda test: known[test], default="")
        found["evidence/onset"] = float(self.bets[strongest].best()[1]) if known.get(strongest, 0.0) > 0.0 else None
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

    @property
    def suspects_floor(self) -> bool:
        """Whether the evidence of a drift over the noise floor is half of the limit, or more."""
        return bool(2.0 * self.bets["drift"].log10_evidence >= self.limit)

    @property
    def suspects_entropy(self) -> bool:
        """Whether what was bet on the entropy is worth more than all bets began with."""
        return bool(self.bets["entropy"].running > 1.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON; nothing before the first window."""
        if not self.past.queue and not any(bets.windows for bets in self.bets.values()):
            return {}
        return {"bets": {test: bets.state() for test, bets in self.bets.items()}, "past": self.past.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``; an empty one is a run's beginning."""
        if state:
            for test, bets in self.bets.items():
                if test in state["bets"]:
                    bets.load_state(state["bets"][test])
            self.past.load_state(state["past"])
