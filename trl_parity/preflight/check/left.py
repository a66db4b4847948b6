"""How long a check still takes: guessed from the first second on, and better with each thing that was timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["TimeLeft"]

# what each stage costs, in starts of an engine and in trials: to a factor of two
_COSTS = {
    "starting the engine": (1.0, 0.0),
    "loading the reference": (0.2, 1.0),
    "trials": (0.0, 18.0),
    "drift": (0.0, 6.0),
    "sampling": (0.0, 6.0),
    "lengths": (0.0, 10.0),
    "own": (0.0, 8.0),
    "baseline": (0.0, 10.0),
    "update": (0.0, 8.0),
    "small blocks": (1.0, 4.0),
    "engines": (1.0, 2.0),
}

_WITHIN = {"other engines": "engines", "shrinking the worst case": "drift"}


class TimeLeft:
    """Fed with all that a check reports, it tells the seconds that are left.

    Until one was timed, an engine's start and a trial are guessed from the size of the model's files.
    """

    def __init__(self, model: str, without: Sequence[str] = ()):
        """``without``: stages that are not run."""
        folder = Path(model)
        size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder.is_dir() else 5e8
        self._engine, self._trial = 3.0 + 2e-8 * size, 0.1 + 6e-9 * size
        self._stages = [name for name in _COSTS if name not in without]
        self._stage, self._since, self._first = "", 0.0, (0.0, 0)

    def __call__(self, what: str, done: int, of: int) -> float:
        """Seconds from now on. ``what``, ``done``, ``of``: what is under way, as ``run_check`` reports it."""
        now, stage = time.monotonic(), _WITHIN.get(what, what)
        if stage in self._stages and stage != self._stage:
            if self._stage == "starting the engine":
                self._engine = now - self._since
            self._stage, self._since, self._first = stage, now, (now, done)
        if stage == "trials" and done > self._first[1]:
            self._trial = (now - self._first[0]) / (done - self._first[1])
        if self._stage not in self._stages:
            return self._cost(self._stages)
        ahead = self._cost(self._stages[self._stages.index(self._stage) + 1 :])
        if stage == "trials":
            return ahead + (of - done) * self._trial
        here = self._cost([self._stage])
        return ahead + (here * (of - done) / of if of else max(0.0, here - (now - self._since)))

    def _cost(self, stages: list[str]) -> float:
        return sum(_COSTS[name][0] * self._engine + _COSTS[name][1] * self._trial for name in stages)
