"""The noise floor in force: what was measured of it, when it is due again, what it has cost. No torch.

A floor comes from a few sequences, and noise differs from one to the next. So what is in force is an upper bound of
it: for each statistic x and source, with the sequences dealt out to G groups (``GROUPS``, or one each),

    bound = x + t s,  s² = (G - 1) / G Σ (x_-g - mean of them)²

x_-g without group g (the jackknife, by sequences), t of 95 % (one side) with G - 1 degrees of freedom. Of one group of
N sequences s = x / √N, with N - 1 degrees of freedom, at least 1: what differs as much as it is large. Measurements
are pooled as long as they agree, so that the bound comes down with time; one whose mean |Δ| lies beyond the other's
bounds begins anew. An engine that disagrees with itself is a fault of its own (``floor/engine_excess``): its source
counts up to ``MOST`` times rounding's. ``floor_upper/*``, which sequential tests bet against, is a bound of 99.9 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..config.parity import ParityConfig
from ..metrics.scalars import FLOORED
from ..metrics.statistics import compute
from ..metrics.sums import MismatchSums

__all__ = ["GROUPS", "SAME_EXPERTS", "SOURCES", "NoiseFloor"]

SOURCES = ("rounding", "batch_shape", "engine")

SAME_EXPERTS = "same_experts"  # rounding without flips of routers: told where there are routers, no part of the floor

GROUPS = 8  # of sequences, in each source

# What the engine's source may be of rounding's: both its passes are rounded, and its kernels differ in shape
MOST = {"kl_k3": 4.0, "logp_abs_diff/mean": 2.0, "logp_abs_diff/p99": 2.0, "ratio/out_of_band": 4.0,
        "ratio/extreme": 4.0, "ess": 4.0}  # fmt: skip

_WHOLE = {"ratio/extreme": "ratio/extreme"}  # so rare in noise that the one left out is often the only one

ENGINE_MOST = 3.0  # times rounding's mean |Δ|: beyond it the engine's own is a fault

_SIZE = "logp_abs_diff/mean"  # by which measurements are compared

_UPPER = ("kl_k3", "logp_abs_diff/mean")  # whose floor is bet on


class NoiseFloor:
    """The floor in force, when it is measured anew, and what it has cost. All from reduced numbers.

    ``values``: ``floor/<stat>`` for every statistic of ``FLOORED``, the largest of its sources
    (``ess``: the smallest); empty before the first measurement. ``sources``: the same by source. ``upper``:
    ``floor_upper/<stat>`` of those in ``_UPPER``. All are bounds.
    ``sequences``: how many rounding's is of; None where it was not measured here.
    """

    def __init__(self, config: ParityConfig):
        self._every, self._share = config.floor_every_n_windows, config.floor_cost_share
        self.enabled = config.floor_tokens > 0
        self.sources: dict[str, dict[str, float]] = {}
        self.values: dict[str, float] = {}
        self.upper: dict[str, float] = {}
        self.sequences: float | None = None
        self.age = 0  # windows since it was measured, or last tried in vain
        self._tried = False
        self._pools: dict[str, list[MismatchSums]] = {}  # by source and group, of all measurements that agree
        self.seconds = 0.0  # summed over ranks and measurements
        self.last_seconds = 0.0
        self.wall = 0.0  # summed over ranks

    @property
    def due(self) -> bool:
        """Whether the coming window shall measure it: at first, then by its budget; one in vain is made up for."""
        if not self.enabled:
            return False
        affordable = self.seconds + self.last_seconds <= self._share * self.wall
        if not self.values:
            return not self._tried or affordable or self.age >= self._every
        return self.age >= self._every and affordable

    def update(self, sources: Mapping[str, MismatchSums | Sequence[MismatchSums]]) -> bool:
        """Take over (reduced) measurements, by source: sums of groups of sequences, or of one.

        False, and everything as before, when the trainer's rounding has no token.
        """
        groups = {name: [one] if isinstance(one, MismatchSums) else list(one) for name, one in sources.items()}
        measured = {name: [one.cpu() for one in many if _tokens(one)] for name, many in groups.items()}
        if not _bounds(measured.get("rounding", [])):
            self.missed()
            return False
        for name, sums in measured.items():
            self._pool(name, sums)
        self.age, self.sequences = 0, _sequences(self._pools["rounding"])
        bounds = {name: found for name, pool in self._pools.items() if (found := _bounds(pool))}
        highs = {name: {stat: bound.high for stat, bound in found.items()} for name, found in bounds.items()}
        uppers = {name: {stat: bound.upper for stat, bound in found.items()} for name, found in bounds.items()}
        self.sources = {name: {stat: _told(stat, x) for stat, x in found.items()} for name, found in highs.items()}
        self.values = {f"floor/{stat}": _told(stat, _largest(stat, highs)) for stat in FLOORED}
        self.upper = {f"floor_upper/{stat}": _largest(stat, uppers) for stat in _UPPER}
        if SAME_EXPERTS in highs:
            self.values |= {f"floor/{SAME_EXPERTS}/{stat}": highs[SAME_EXPERTS][stat] for stat in _UPPER}
            totals = [sums.totals() for sums in self._pools[SAME_EXPERTS]]
            routed = sum(t["routed"] for t in totals)
            self.values["floor/router_flips"] = sum(t["flipped"] for t in totals) / max(1.0, routed)
        if "engine" in bounds:
            excess = bounds["engine"][_SIZE].low - ENGINE_MOST * highs["rounding"][_SIZE]
            self.values["floor/engine_excess"] = max(0.0, excess)
        return True

    def missed(self) -> None:
        """A measurement came to nothing: it is not tried again at once."""
        self._tried = True
        self.age = self.age if self.values else 0

    def _pool(self, name: str, new: list[MismatchSums]) -> None:
        """Add a measurement to its source's pool, or begin a new one with it."""
        old, more = (_bounds(sums) for sums in (self._pools.get(name, []), new))
        if not more:
            return
        if not old or more[_SIZE].low > old[_SIZE].high or more[_SIZE].high < old[_SIZE].low:
            self._pools[name] = [one.copy() for one in new]
            return
        pool = self._pools[name]
        for one in new:  # another sequence: into a group of its own while there is room, then into the smallest
            if len(pool) < GROUPS:
                pool.append(one.copy())
            else:
                min(pool, key=_tokens).add_(one)

    def account(self, floor_seconds: float, wall_seconds: float) -> None:
        """Add one window's (reduced) seconds."""
        self.seconds += floor_seconds
        self.wall += wall_seconds
        if floor_seconds:
            self.last_seconds = floor_seconds

    def scalars(self, stats: Mapping[str, float | None]) -> dict[str, float | None]:
        """``floor/*`` and ``excess/*`` of a window."""
        out: dict[str, float | None] = {**self.values, **self.upper}
        if self.enabled:
            out["cost/floor_share"] = self.seconds / self.wall if self.wall else None
            out |= {"floor/age": float(self.age), "floor/sequences": self.sequences}
        for stat in FLOORED:
            value, floor = stats.get(f"trimmed/{stat}"), self.values.get(f"floor/{stat}")
            if value is not None and floor is not None:
                out[f"excess/{stat}"] = floor - value if stat == "ess" else value - floor
        return out

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        names = ("sources", "values", "age", "seconds", "last_seconds", "wall")
        pools = {name: [sums.to_sparse() for sums in pool] for name, pool in self._pools.items()}
        more = {name: found for name, found in (("pools", pools), ("upper", self.upper)) if found}
        return {name: getattr(self, name) for name in names} | more

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``; a floor switched off or on since then stays as the settings say.

        One of 0.6.0 holds no sums: its values are in force until the next measurement.
        """
        if self.enabled:
            pools = state.get("pools", {})
            self._pools = {name: [MismatchSums.from_sparse(sums) for sums in pool] for name, pool in pools.items()}
            self.sequences = _sequences(self._pools["rounding"]) if self._pools else None
            for name in state.keys() - {"pools"}:
                setattr(self, name, state[name])


def _tokens(sums: MismatchSums) -> float:
    return sums.totals()["tokens"]


def _sequences(pool: Sequence[MismatchSums]) -> float:
    return sum(sums.totals()["sequences"] for sums in pool)


def _stats(pool: Sequence[MismatchSums]) -> dict[str, float] | None:
    """Each statistic of ``FLOORED`` of some groups together, rising with noise; None where one can't be told."""
    total = pool[0].copy()
    for sums in pool[1:]:
        total.add_(sums)
    found = compute(total)
    values = {stat: found[_WHOLE.get(stat, f"trimmed/{stat}")] for stat in FLOORED}
    if any(value is None or not math.isfinite(value) for value in values.values()):
        return None
    return {stat: _told(stat, value or 0.0) for stat, value in values.items()}


class _Bounds(NamedTuple):
    """Of a statistic, rising with noise: an interval of 90 %, and an upper bound of 99.9 %."""

    low: float
    high: float
    upper: float


def _largest(stat: str, found: Mapping[str, Mapping[str, float]]) -> float:
    """Of the sources; the engine's as far as it counts."""
    allowed = {"engine": MOST[stat] * found["rounding"][stat]}
    return max(min(found[name][stat], allowed.get(name, math.inf)) for name in SOURCES if name in found)


def _bounds(pool: Sequence[MismatchSums]) -> dict[str, _Bounds]:
    """By statistic; empty without tokens."""
    from scipy.special import stdtrit

    points = _stats(pool) if pool else None
    if points is None:
        return {}
    without = [_stats([*pool[:i], *pool[i + 1 :]]) for i in range(len(pool))] if len(pool) > 1 else []
    known = [one for one in without if one is not None]
    groups, sequences = len(known), max(1.0, _sequences(pool))
    out = {}
    t, t_upper = stdtrit(max(1.0, (groups if groups > 1 else sequences) - 1), (0.95, 0.999)).tolist()
    for stat, x in points.items():
        error = abs(x) / math.sqrt(sequences)
        if groups > 1:
            mean = sum(one[stat] for one in known) / groups
            error = math.sqrt((groups - 1) / groups * sum((one[stat] - mean) ** 2 for one in known))
        out[stat] = _Bounds(max(0.0, x - t * error), x + t * error, x + t_upper * error)
    return out


def _told(stat: str, value: float) -> float:
    """``ess`` is 1 without noise, and less with it: 1 - ess rises, as the others do; and back."""
    return 1.0 - value if stat == "ess" else value
