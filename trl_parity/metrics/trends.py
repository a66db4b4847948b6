"""Watches over numbers that are no mismatch but spoil one's reading of it: entropy over time, temperature by phase."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["EntropyWatch", "expected_temperature"]

_TREND, _REFERENCE = 20, 5


class EntropyWatch:
    """Trend of the trainer's entropy, and its level against the run's beginning.

    A policy without entropy hides every drift: log-probs of near-certain tokens agree between any two models. A
    collapse also goes before non-finite log-probs. An entropy that is not finite makes both of its window NaN, and is
    forgotten with it.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_TREND)
        self._first: list[float] = []
        self._finite = True  # the last one that was measured

    def update(self, entropy: float | None) -> None:
        """Add one window's ``entropy/trainer``."""
        if entropy is None:
            return
        self._finite = math.isfinite(entropy)
        if not self._finite:
            return
        self._recent.append(entropy)
        if len(self._first) < _REFERENCE:
            self._first.append(entropy)

    def scalars(self) -> dict[str, float | None]:
        """``entropy/trend`` (from 3 windows on) and ``entropy/relative`` (from 5 on)."""
        if not self._finite:
            return {"entropy/trend": math.nan, "entropy/relative": math.nan}
        out: dict[str, float | None] = {}
        if len(self._recent) >= 3:
            out["entropy/trend"] = statistics.linear_regression(range(len(self._recent)), self._recent).slope
        if len(self._first) == _REFERENCE and (reference := statistics.median(self._first)) > 0:
            out["entropy/relative"] = self._recent[-1] / reference
        return out

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"recent": list(self._recent), "first": list(self._first)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``."""
        self._recent = deque(filter(math.isfinite, state["recent"]), maxlen=_TREND)
        self._first = [entropy for entropy in state["first"] if math.isfinite(entropy)]


def expected_temperature(phases: Mapping[str, Sequence[tuple[int, float]]], kind: str, step: int) -> float | None:
    """The temperature set for this phase (``ParityConfig.temperature_phases``); None where none was set."""
    reached = [temperature for first, temperature in phases.get(kind, ()) if first <= step]
    return reached[-1] if reached else None
