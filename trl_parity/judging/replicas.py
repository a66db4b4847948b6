"""One sick rank among many, whose drift the mean over all ranks hides. Pure, no torch.

Of each rank a window keeps its tokens, Σ k3, Σ |Δ| and largest Δ: x_r is its mean without the token of largest |Δ|.
Of R ranks together the lower bound of rank r's own mean is

    x_r - t s √(n / n_r),    s the standard error of the mean over all n tokens, n_r the rank's

with t the Student quantile of 1 - 0.01 / R (Bonferroni): of all R bounds, one is wrong in 1 % of the windows where the
ranks' sequences are alike. Noise that differs by sequence, in batches of a few, is skew, and the worst rank of a
window is then some rank or other; a sick one is the same each time. So what is judged, the largest over the ranks, is
what a rank reached in each of its last ``consecutive`` windows, or, sick now and then, in this one and in m in all
among as many as the breaker's memory spans. m is the smallest from ``consecutive`` on that is no chance:

    R P(Poisson(λ) >= m) <= 1e-6,    λ = how often the other ranks reached as much, over R - 1

Where ranks are alike in each window, whatever the law of their noise, all have the same λ; a halt wants the rule's
limit besides.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["Replicas"]

_ALPHA = 0.01

_CHANCE = 1e-6  # ranks expected to reach by chance, as often, what one of them did

_STATS = ("kl_k3", "logp_abs_diff/mean")

_CLAMP = 300.0  # Δ in e^Δ, as in the sums


class Replicas:
    """The ranks' last bounds. ``scalars``: of the last window.

    ``consecutive`` and ``breach_memory`` as in ``ParityConfig``: so many windows with fewer than so many others
    between them, in about 20 as the breaker counts them. Memory: 16 bytes a rank and window.
    """

    def __init__(self, consecutive: int, breach_memory: int = 0):
        self._consecutive = consecutive
        self._bounds: deque[np.ndarray] = deque(maxlen=consecutive + max(0, breach_memory - 1))
        self.scalars: dict[str, float | None] = {}

    def add(
        self, by_rank: np.ndarray | None, stats: Mapping[str, float | None], *, settled: bool = True
    ) -> dict[str, float | None]:
        """Take in a window: ``replica/*`` of it.

        ``by_rank``: ``MismatchSums.by_rank``; None of a single rank. ``settled``: whether the noise floor is known
        well enough for windows that are not in a row.
        """
        self.scalars = {}
        errors = [stats.get(f"se/{stat}") for stat in _STATS]
        sequences, ranks = stats.get("effective_sequences"), 0 if by_rank is None else len(by_rank)
        if by_rank is None or ranks < 2 or sequences is None or any(error is None for error in errors):
            return self.scalars  # nothing is known of the window: the bounds before it stand
        if self._bounds and len(self._bounds[0]) != ranks:
            self._bounds.clear()
        self._bounds.append(_lower_bounds(by_rank, np.array(errors, dtype=float), max(1.0, sequences - 1.0)))
        if len(self._bounds) >= self._consecutive:
            bounds = np.array(self._bounds)
            lasting = bounds[-self._consecutive :].min(0)
            if settled and len(bounds) > self._consecutive:
                repeated, windows = self._now_and_then(bounds)
                rank = int(repeated[:, 1].argmax())
                if repeated[rank, 1] > lasting[:, 1].max():
                    self.scalars["replica/windows"] = float(windows[rank])
                lasting = np.maximum(lasting, repeated)
            for i, stat in enumerate(_STATS):
                worst = float(lasting[:, i].max())
                self.scalars[f"replica/{stat}"] = worst if math.isfinite(worst) else None
            self.scalars["replica/rank"] = float(lasting[:, 1].argmax())
        return self.scalars

    def state(self) -> list[list[list[float | None]]]:
        """What a checkpoint keeps: JSON, the bounds by window and rank in the precision of their noise."""
        return [[[float(f"{x:.6g}") if math.isfinite(x) else None for x in row] for row in b] for b in self._bounds]

    def load_state(self, state: Sequence[Sequence[Sequence[float | None]]]) -> None:
        """Restore ``state``. Bounds of another number of ranks are forgotten at the next window."""
        windows = [[[-math.inf if x is None else x for x in row] for row in window] for window in state]
        self._bounds = deque((np.array(window) for window in windows), self._bounds.maxlen)

    def _now_and_then(self, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R, 2) what a rank reached now and too often for chance, from (T, R, 2); -inf of all ranks but one.

        And (R,) in how many windows it reached that mean |Δ|.
        """
        from scipy.special import pdtrc

        found, windows = np.full(bounds.shape[1:], -np.inf), np.zeros(bounds.shape[1])
        sorted_, least = -np.sort(-bounds, axis=0), self._consecutive
        reached = np.minimum(sorted_[least - 1 :], bounds[-1])  # (T', R, 2): in m = least, least + 1, ... windows
        for i in range(len(_STATS)):
            ranks = reached[..., i].argmax(1)
            values = reached[np.arange(len(ranks)), ranks, i]
            own = (sorted_[:, ranks, i] >= values).sum(0)
            everyone = np.sort(bounds[..., i], axis=None)
            others = everyone.size - np.searchsorted(everyone, values) - own
            chance = len(found) * pdtrc(own - 1.0, others / (len(found) - 1.0))
            if (sure := (chance <= _CHANCE).nonzero()[0]).size:
                first = sure[0]
                found[ranks[first], i], windows[ranks[first]] = values[first], own[first]
        return found, windows


def _lower_bounds(by_rank: np.ndarray, errors: np.ndarray, dof: float) -> np.ndarray:
    """(R, 2) of k3 and |Δ|, from (R, 5) tokens, Σ k3, Σ |Δ|, max Δ, max -Δ; -inf of a rank with a token or none."""
    from scipy.special import stdtrit

    tokens, sums, ends = by_rank[:, 0], by_rank[:, 1:3], by_rank[:, 3:]
    with np.errstate(invalid="ignore", divide="ignore"):
        signed = np.minimum(ends, _CLAMP) * (1.0, -1.0)
        largest = np.stack([(np.expm1(signed) - signed).max(1), ends.max(1)], axis=-1)
        means = np.maximum(sums - largest, 0.0) / (tokens - 1.0)[:, None]
        t = float(stdtrit(dof, 1.0 - _ALPHA / len(by_rank)))
        bounds = means - t * errors * np.sqrt(tokens.sum() / tokens)[:, None]
    return np.where((tokens > 1.0)[:, None] & np.isfinite(bounds), bounds, -np.inf)
