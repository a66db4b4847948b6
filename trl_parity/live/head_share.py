"""How many of a batch's tokens the fp32 head may score, so that measuring costs no more than its budget."""

from __future__ import annotations

from ..metrics.sums import BUMPED, INDEX, MismatchSums

__all__ = ["HeadShare"]

_KEPT = 0.8  # of what is known, from window to window


class HeadShare:
    """The ``share`` of the tokens that the fp32 head is to score, from reduced numbers: the same on every rank.

        share = (cost_budget x wall - (cost - head)) / head for all tokens,  at least 0, at most 1

    with the host seconds of all, of measuring and of the head in it, each window counting 0.8 of the next. 1 before
    the first window and after one that is not ``calm``.
    """

    def __init__(self, cost_budget: float):
        self._budget = cost_budget
        self._left = self._for_all = 0.0  # seconds for the head: within the budget, and for all tokens
        self.share = 1.0

    def update(self, sums: MismatchSums, *, calm: bool) -> None:
        """A window is over: its reduced sums, on the host, and whether nothing speaks against it."""
        if self._budget >= 1:
            return
        parts = sums.parts()
        wall, cost = (float(parts["sums"][INDEX[name]]) for name in ("wall_seconds", "cost_seconds"))
        head, for_all = (
            float(parts["bumped"][BUMPED.index(name)]) for name in ("head_seconds", "head_seconds_for_all")
        )
        self._left = _KEPT * self._left + self._budget * wall - (cost - head)
        self._for_all = _KEPT * self._for_all + for_all
        self.share = min(1.0, max(0.0, self._left / self._for_all)) if calm and self._for_all > 0 else 1.0
