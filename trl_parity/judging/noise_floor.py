"""The noise floor in force: what was measured of it, when it is due again, what it has cost. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config.parity import ParityConfig
from ..metrics.scalars import FLOORED
from ..metrics.statistics import compute
from ..metrics.sums import MismatchSums

__all__ = ["SOURCES", "NoiseFloor"]

SOURCES = ("rounding", "batch_shape", "engine")


class NoiseFloor:
    """The floor in force, when it is measured anew, and what it has cost. All from reduced numbers.

    ``values``: ``floor/<stat>`` for every statistic of ``FLOORED``, the largest of its sources
    (``ess``: the smallest); empty before the first measurement. ``sources``: the same by source.
    """

    def __init__(self, config: ParityConfig):
        self._every, self._share = config.floor_every_n_windows, config.floor_cost_share
        self.enabled = config.floor_tokens > 0
        self.sources: dict[str, dict[str, float]] = {}
        self.values: dict[str, float] = {}
        self.age = 0  # windows since it was measured, or last tried in vain
        self._tried = False
        self.seconds = 0.0  # summed over ranks and measurements
        self.last_seconds = 0.0
        self.wall = 0.0  # summed over ranks

    @property
    def due(self) -> bool:
        """Whether the coming window shall measure it."""
        if not self.enabled:
            return False
        if not self.values:
            return not self._tried or self.age >= self._every
        return self.age >= self._every and self.seconds + self.last_seconds <= self._share * self.wall

    def update(self, sources: Mapping[str, MismatchSums]) -> bool:
        """Take over (reduced) measurements. False, and everything as before, when none of them has a token."""
        found: dict[str, dict[str, float]] = {}
        for name, sums in sources.items():
            stats = compute(sums)
            values = {stat: stats[f"trimmed/{stat}"] for stat in FLOORED}
            if all(value is not None and math.isfinite(value) for value in values.values()):
                found[name] = {stat: float(value or 0.0) for stat, value in values.items()}
        self._tried = True
        if "rounding" not in found:
            self.age = self.age if self.values else 0
            return False
        self.sources, self.age = found, 0
        for stat in FLOORED:
            measured = [values[stat] for values in found.values()]
            self.values[f"floor/{stat}"] = min(measured) if stat == "ess" else max(measured)
        return True

    def account(self, floor_seconds: float, wall_seconds: float) -> None:
        """Add one window's (reduced) seconds."""
        self.seconds += floor_seconds
        self.wall += wall_seconds
        if floor_seconds:
            self.last_seconds = floor_seconds

    def scalars(self, stats: Mapping[str, float | None]) -> dict[str, float | None]:
        """``floor/*`` and ``excess/*`` of a window."""
        out: dict[str, float | None] = dict(self.values)
        if self.enabled:
            out["cost/floor_share"] = self.seconds / self.wall if self.wall else None
            out["floor/age"] = float(self.age)
        for stat in FLOORED:
            value, floor = stats.get(f"trimmed/{stat}"), self.values.get(f"floor/{stat}")
            if value is not None and floor is not None:
                out[f"excess/{stat}"] = floor - value if stat == "ess" else value - floor
        return out

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        names = ("sources", "values", "age", "seconds", "last_seconds", "wall")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``; a floor switched off or on since then stays as the settings say."""
        if self.enabled:
            for name, value in state.items():
                setattr(self, name, value)
