"""Where a run's host seconds go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stopwatch"]


class Stopwatch:
    """Seconds by account since the last lap. What an inner account takes is no part of the outer one's."""

    def __init__(self) -> None:
        self._began = self._mark = time.perf_counter()
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def account(self, name: str) -> Iterator[None]:
        """The block's time goes to this account."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def add(self, name: str, seconds: float) -> None:
        """What was measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def lap(self) -> tuple[dict[str, float], float]:
        """The accounts since the last lap, and all the time since then. The next begins."""
        self._settle()
        seconds, self._seconds = self._seconds, {}
        began, self._began = self._began, self._mark
        return seconds, self._mark - began

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.add(self._open[-1], now - self._mark)
        self._mark = now
