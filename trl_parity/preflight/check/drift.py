"""How far an engine is from the reference: sums over trials, and the drift they amount to. Adds up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from .rows import Limits, within_floor
from .statistics import SCALES, Sums, added

__all__ = [
    "Counterfactuals",
    "Drift",
    "Floors",
    "Gaps",
    "bucket",
    "bucket_name",
    "drift_of",
    "sampled_kl",
]


@dataclass(slots=True)
class Gaps:
    """Sums of what differs between an engine (or a noisy reference) and the reference. Adds up."""

    kl: Sums = field(default_factory=Sums)  # exact, of sampled tokens' laws at the trial's temperature
    k3: Sums = field(default_factory=Sums)  # e^d - 1 - d of sampled tokens without a whole law, d = ref - engine
    delta: Sums = field(default_factory=Sums)  # |d| of all sampled tokens
    over: int = 0  # tokens whose exact KL is over limits.max_kl
    over_squares: float = 0.0  # sum over trials of (failed - tokens * rate)^2 needs these three
    over_cross: float = 0.0
    sizes: float = 0.0
    prefill_kl: Sums = field(default_factory=Sums)  # exact, at T = 1, by prefill
    positions: dict[int, Sums] = field(default_factory=dict)  # |d| by prefill at T = 1, by bucket of context length
    curve: list[float] = field(default_factory=lambda: [0.0] * len(SCALES))
    trials: int = 0
    worst: float = 0.0  # largest mean KL of a trial

    def __add__(self, other: Gaps) -> Gaps:
        positions = dict(self.positions)
        for key, sums in other.positions.items():
            positions[key] = positions.get(key, Sums()) + sums
        return Gaps(
            self.kl + other.kl, self.k3 + other.k3, self.delta + other.delta,
            self.over + other.over, self.over_squares + other.over_squares, self.over_cross + other.over_cross,
            self.sizes + other.sizes, self.prefill_kl + other.prefill_kl, positions,
            [a + b for a, b in zip(self.curve, other.curve, strict=True)],
            self.trials + other.trials, max(self.worst, other.worst),
        )  # fmt: skip

    @property
    def half_square(self) -> float:
        """Half the mean squared log-prob difference by prefill: the KL to second order, on the tokens at hand."""
        return added(self.positions.values()).half_square

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        out: dict[str, Any] = {name: getattr(self, name).to_json() for name in _SUMS}
        out |= {name: getattr(self, name) for name in _NUMBERS}
        return out | {"positions": {str(k): s.to_json() for k, s in self.positions.items()}, "curve": self.curve}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Gaps:
        """Back from ``to_json``."""
        known = dict(value) | {name: Sums.from_json(value[name]) for name in _SUMS}
        known["positions"] = {int(k): Sums.from_json(s) for k, s in value["positions"].items()}
        return cls(**known)


_SUMS = ("kl", "k3", "delta", "prefill_kl")

_NUMBERS = ("over", "over_squares", "over_cross", "sizes", "trials", "worst")


def bucket(length: int) -> int:
    """Of a context length: 1 alone (attention sees one token: position can't matter), then four-fold steps."""
    return 0 if length <= 1 else 1 + int(math.log2(length)) // 2


def bucket_name(key: int) -> str:
    """The context lengths of a bucket."""
    return "1" if key == 0 else f"{max(2, 4 ** (key - 1)):,} to {4**key - 1:,}"


@dataclass(frozen=True, slots=True)
class Floors:
    """A noisy reference against the plain one, on tokens of some trials."""

    trainer: Gaps  # in the trainer's dtype
    engine: Gaps  # in the engine's; where that is the coarser one, on weights rounded to it
    trainer_dtype: str
    engine_dtype: str

    @property
    def same(self) -> bool:
        """Whether both sides compute in one dtype."""
        return self.trainer_dtype == self.engine_dtype


def drift_of(gaps: Gaps) -> float:
    """One number for how far apart: KL of what was sampled, or half the mean squared gap by prefill, the larger."""
    return max(x for x in (sampled_kl(gaps), gaps.half_square, 0.0) if not math.isnan(x))


def sampled_kl(gaps: Gaps) -> float:
    """Mean exact KL; k3 of the sampled tokens where the engine gave no whole law."""
    return gaps.kl.mean if gaps.kl.count + gaps.kl.bad else gaps.k3.mean


@dataclass(frozen=True, slots=True)
class Drift:
    """What is known of an engine's drift once the trials are over."""

    gaps: Gaps
    floors: Floors
    limits: Limits
    early: float = 0.0  # of the chance of error, what an end of the trials before the last may use up

    @property
    def z(self) -> float:
        """Standard errors of an interval: 95 % of both sides together, less what an early end may use up."""
        return NormalDist().inv_cdf(0.975 + self.early)

    @property
    def size(self) -> float:
        """See ``drift_of``."""
        return drift_of(self.gaps)

    @property
    def noise(self) -> float:
        """The same of the engine's dtype."""
        return drift_of(self.floors.engine)

    @property
    def excessive(self) -> bool:
        """More than the engine's dtype explains."""
        return not (
            within_floor(sampled_kl(self.gaps), sampled_kl(self.floors.engine), self.limits)
            and within_floor(self.gaps.half_square, self.floors.engine.half_square, self.limits)
        )

    @property
    def before_sampling(self) -> bool:
        """More than the engine's dtype explains by prefill already, at T = 1, with nothing done to the law."""
        return not within_floor(self.gaps.half_square, self.floors.engine.half_square, self.limits)

    @property
    def coarser(self) -> bool:
        """More than the trainer's dtype explains."""
        return not (
            within_floor(sampled_kl(self.gaps), sampled_kl(self.floors.trainer), self.limits)
            and within_floor(self.gaps.half_square, self.floors.trainer.half_square, self.limits)
        )


@dataclass(frozen=True, slots=True)
class Counterfactuals:
    """The drift on a few trials, as it is and with one thing undone; None: not tried."""

    base: float
    noise: float
    undone: Mapping[str, float]  # name: drift that is left

    def explained(self, name: str) -> float:
        """Share of the drift above the noise that disappears; 0 where not tried, or nothing is there to explain."""
        over = self.base - self.noise
        if name not in self.undone or not over > 0:
            return 0.0
        return min(1.0, (self.base - self.undone[name]) / over)
