"""How many of a batch's tokens the fp32 head may score, so that measuring costs no more than its budget."""

from __future__ import annotations

from ..metrics.sums import BUMPED, INDEX, MismatchSums

__all__ = ["HeadShare"]

_KEPT = 0.8  # of what is known, from window to window


class HeadShare:
    """The ``share`` of the tokens that the fp32 head is to score, from reduced numbers: the same on every rank.

        share = (cost_budget x wall - (cost - head)) / (head / coverage),  at least 0, at most 1

    with the host seconds of all, of measuring and of the head in it, each window counting 0.8 of the next. 1 before
    the first window and after one that is not ``calm``.
    """

    def __init__(self, cost_budget: float):
        self._budget = cost_budget
        self._wall = self._cost = self._head = self._full = 0.0
        self.share = 1.0

    def update(self, sums: MismatchSums, coverage: float | None, *, calm: bool) -> None:
        """A window is over: its reduced sums, the share of its tokens that was scored, whether nothing speaks against
        it."""
        if self._budget >= 1:
            return
        parts = sums.parts()
        wall, cost = (float(parts["sums"][INDEX[name]]) for name in ("wall_seconds", "cost_seconds"))
        head = float(parts["bumped"][BUMPED.index("head_seconds")])
        self._wall = _KEPT * self._wall + wall
        self._cost = _KEPT * self._cost + cost
        self._head = _KEPT * self._head + head
        self._full = _KEPT * self._full + head / max(coverage or 1.0, 1e-6)
        left = self._budget * self._wall - (self._cost - self._head)
        self.share = min(1.0, max(0.0, left / self._full)) if calm and self._full > 0 else 1.0
