"""What a window is summed up in: mergeable sums, maxima, a histogram and bootstrap resamples, in two vectors.

How a batch fills them and what is read from them: ``trl_parity.metrics.statistics``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .scalars import LAG_BUCKETS

if TYPE_CHECKING:
    import torch

__all__ = [
    "ADDED",
    "BINS",
    "DECADES",
    "INDEX",
    "PER_DECADE",
    "SCALES",
    "SECOND_MOMENTS",
    "SUMS",
    "WEIGHT_BINS",
    "MismatchSums",
]

# Histogram of Δ: by sign, |Δ| on a log scale. A quantile read from it is off by half a bin at most, 1.8 %.
DECADES = (-9, 3)  # |Δ| from 1e-9 (below: zero) to 1e3 nats (above: the last bin)

PER_DECADE = 64

BINS = (DECADES[1] - DECADES[0]) * PER_DECADE + 1  # bin 0 holds |Δ| < 1e-9

_BOOT = 3  # sums a resample keeps

WEIGHT_BINS = 62  # of the weights the trainer's correction gave to sequences

# What a sequence's e^S is divided by before it is added to those of its scale, the nearest: e^(600 k), |k| <= 32
SCALES = 65

SUMS = (
    # over tokens that both sides scored with a finite number; own_*: by the trainer's own head
    "delta", "own_delta", "k3", "own_k3", "abs_delta", "own_abs_delta", "w", "w2",
    # trainer entropy: plain, and of the law the rollout is compared with
    "rollout_logprob", "entropy", "law_entropy",
    # how many they are, and how many were to be compared
    "tokens", "own_tokens", "out_of_band", "confident", "compared", "entropy_tokens",
    # sequences with at least one such token; of windows that 0.6.0 began, e^S and its square
    "sequences", "seq_w", "seq_w2",
    # truncation replay
    "trunc_tokens", "kept_mass", "log_kept", "out_of_support",
    # updates against the policy that generated
    "drift_tokens", "drift_k3",
    # bookkeeping, per rank
    "batches", "errors", "lag", "cost_seconds", "floor_seconds", "wall_seconds",
    # the same on every rank
    "requests", "temperature_engine", "temperature_trainer", "rewards", "reward_sum",
    # prompt tokens of the run's requests that the engine looked up in its prefix cache, and found there
    "looked_up_tokens", "cached_tokens",
    # staleness: batches or sequences a lag was added for; tokens and k3 by lag; of sequences of which it is known
    # whether a sync fell into their generation, and those where it may have; of probes
    "lags", *(f"{what}{name}" for name in LAG_BUCKETS for what in ("lag_tokens/", "lag_k3/")),
    "stale_compared", "stale_nonfinite", "flight_tokens", "in_flight_tokens", "probe_tokens",
)  # fmt: skip

INDEX = {name: i for i, name in enumerate(SUMS)}

SECOND_MOMENTS = (*(f"second_moment/{i}{j}" for i in range(4) for j in range(4)), "row_tokens_square")

# behind all that 0.6.0 kept, whose checkpoints are read by place
ADDED = (
    # over sequences: the square of w - tokens, H + rollout log-prob and tokens, each times each of the three
    *(f"third_moment/{i}{j}" for i in range(3) for j in range(3)),
    # tokens with an entropy that is no number
    "entropy_nonfinite",
    # sequences whose last token both sides scored; of that token |Δ|, and whether it is above 1 nat
    "last_tokens", "last_abs_delta", "last_apart",
    # sequences the trainer's correction gave weights: how many, shares of tokens with weight 0, means of min(w, 1), of
    # w, and its square
    "corrected", "corrected_zeroed", "corrected_kept", "corrected_w", "corrected_w2",
    # the same of those longer than their batch's mean
    "long_corrected", "long_zeroed", "long_kept",
    # over tokens: x = min(w, 2) - 1 and its square, and how many they are
    "clipped", "clipped_square", "clipped_tokens",
    # over clusters of equal rows of a batch: products of Σ Δ, Σ |Δ|, Σ k3 and tokens; over rows: tokens squared
    *SECOND_MOMENTS,
)  # fmt: skip

# ``copies``: the largest number of equal rows in a batch; behind all that 0.6.0 kept
MAXIMA = ("delta", "neg_delta", "seq_abs_delta", "temperature_gap", "kv_cache_usage", "copies")

_FIRST_MAXIMA = 5  # of 0.6.0


class MismatchSums:
    """Everything a window needs, in two vectors: one that adds and one that takes the maximum.

    ``additive``: fp64, the sums named in ``SUMS``, then the histogram (2 signs x ``BINS``), then the bootstrap
    (R resamples x [Σ w, Σ (H + rollout log-prob), Σ tokens]), sequence weights by scale (2 x ``SCALES``), the
    histogram of the correction's weights (``WEIGHT_BINS``), and the sums named in ``ADDED``. ``maxima``: fp64,
    ``-inf`` where nothing was seen. About 19 KiB with R = 200, whatever the number of tokens. ``by_rank``: where they
    were reduced over several ranks, (ranks, 5) tokens, Σ k3, Σ |Δ|, max Δ and max -Δ of each; it does not merge.
    """

    __slots__ = ("_additive", "_bumps", "_maxima", "_raises", "bootstrap_samples", "by_rank")

    def __init__(self, additive: torch.Tensor, maxima: torch.Tensor, bootstrap_samples: int):
        self._additive, self._maxima, self.bootstrap_samples = additive, maxima, bootstrap_samples
        self._bumps: dict[str, float] = {}  # plain numbers on their way into them: no kernel for each
        self._raises: dict[str, float] = {}
        self.by_rank: torch.Tensor | None = None

    @property
    def replica(self) -> torch.Tensor:
        """(..., 3) what is told of this rank alone: tokens, Σ k3, Σ |Δ|."""
        import torch

        return torch.stack([self.additive[..., INDEX[name]] for name in ("tokens", "k3", "abs_delta")], dim=-1)

    @property
    def additive(self) -> torch.Tensor:
        """Everything that adds."""
        if self._bumps:
            import torch

            bumps, self._bumps = self._bumps, {}
            amounts = torch.tensor([bumps.get(name, 0.0) for name in SUMS], dtype=torch.float64)
            self._additive[: len(SUMS)] += amounts.to(self._additive.device, non_blocking=True)
        return self._additive

    @property
    def maxima(self) -> torch.Tensor:
        """Everything that takes the maximum."""
        if self._raises:
            import torch

            raises, self._raises = self._raises, {}
            values = torch.tensor([raises.get(name, -math.inf) for name in MAXIMA], dtype=torch.float64)
            values = values.to(self._maxima.device, non_blocking=True)
            torch.maximum(self._maxima, values, out=self._maxima)
        return self._maxima

    def cpu(self) -> MismatchSums:
        """On the host: itself, where it is there. One device sync on accelerators."""
        if self._additive.device.type == "cpu":
            return self
        import torch

        both = torch.cat([self.additive, self.maxima]).cpu()
        out = MismatchSums(both[: -len(MAXIMA)], both[-len(MAXIMA) :], self.bootstrap_samples)
        out.by_rank = None if self.by_rank is None else self.by_rank.cpu()
        return out

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu", bootstrap_samples: int = 200) -> MismatchSums:
        """The sums of no tokens."""
        import torch

        size = len(SUMS) + 2 * BINS + _BOOT * bootstrap_samples + 2 * SCALES + WEIGHT_BINS + len(ADDED)
        return cls(
            torch.zeros(size, dtype=torch.float64, device=device),
            torch.full((len(MAXIMA),), -math.inf, dtype=torch.float64, device=device),
            bootstrap_samples,
        )

    def add_(self, other: MismatchSums) -> None:
        """Merge ``other`` in place; associative and commutative up to fp64 rounding."""
        if other.bootstrap_samples != self.bootstrap_samples:
            raise ValueError(
                f"cannot merge sums with {other.bootstrap_samples} and {self.bootstrap_samples} bootstrap samples. "
                "Use one bootstrap_samples on every rank."
            )
        import torch

        self.additive.add_(other.additive.to(self._additive.device))
        torch.maximum(self.maxima, other.maxima.to(self.maxima.device), out=self.maxima)

    def copy(self) -> MismatchSums:
        """A copy with tensors of its own."""
        return MismatchSums(self.additive.clone(), self.maxima.clone(), self.bootstrap_samples)

    def to_sparse(self) -> dict[str, Any]:
        """Plain JSON numbers, zeros left out; exact (Python prints the shortest digits that give a double back)."""
        maxima = [x if math.isfinite(x) else str(x) for x in self.maxima.tolist()]
        while len(maxima) > _FIRST_MAXIMA and maxima[-1] == "-inf":
            maxima.pop()
        additive = {str(i): x if math.isfinite(x) else str(x) for i, x in enumerate(self.additive.tolist()) if x != 0}
        return {"additive": additive, "maxima": maxima, "bootstrap_samples": self.bootstrap_samples}

    @classmethod
    def from_sparse(cls, saved: Mapping[str, Any]) -> MismatchSums:
        """Back from ``to_sparse``."""
        import torch

        out = cls.zeros(bootstrap_samples=int(saved["bootstrap_samples"]))
        for i, x in saved["additive"].items():
            out.additive[int(i)] = float(x)
        maxima = torch.tensor([float(x) for x in saved["maxima"]], dtype=torch.float64)
        out.maxima[: len(maxima)].copy_(maxima)
        return out

    def bump(self, **amounts: float) -> None:
        """Add plain numbers to named sums."""
        assert amounts.keys() <= INDEX.keys(), amounts
        for name, amount in amounts.items():
            self._bumps[name] = self._bumps.get(name, 0.0) + amount

    def span(self, *names: str) -> torch.Tensor:
        """A view of sums that stand side by side, to be filled as one vector in this order."""
        known, before = (SUMS, 0) if names[0] in INDEX else (ADDED, self._additive.numel() - len(ADDED))
        first = known.index(names[0])
        assert known[first : first + len(names)] == names, f"{names} do not stand side by side"
        return self._additive[before + first : before + first + len(names)]

    def peak_span(self, *names: str) -> torch.Tensor:
        """The same of maxima."""
        first = MAXIMA.index(names[0])
        assert MAXIMA[first : first + len(names)] == names, f"{names} do not stand side by side in MAXIMA"
        return self._maxima[first : first + len(names)]

    def raise_to(self, **values: float) -> None:
        """Raise named maxima to plain numbers."""
        assert values.keys() <= set(MAXIMA), values
        for name, value in values.items():
            self._raises[name] = max(value, self._raises.get(name, -math.inf))

    def totals(self) -> dict[str, float]:
        """All sums by name. A device sync on accelerators, as of the next."""
        found = dict(zip(SUMS, self._additive[: len(SUMS)].tolist(), strict=True))
        found |= zip(ADDED, self._additive[-len(ADDED) :].tolist(), strict=True)
        for name, amount in self._bumps.items():
            found[name] += amount
        return found

    def peaks(self) -> dict[str, float]:
        """All maxima by name."""
        found = dict(zip(MAXIMA, self._maxima.tolist(), strict=True))
        for name, value in self._raises.items():
            found[name] = max(found[name], value)
        return found | {"abs_delta": max(found["delta"], found["neg_delta"])}

    @property
    def histogram(self) -> torch.Tensor:
        """Counts of Δ: (2, bins), row 0 for Δ < 0, row 1 for Δ >= 0."""
        return self._additive[len(SUMS) : len(SUMS) + 2 * BINS].view(2, BINS)

    @property
    def bootstrap(self) -> torch.Tensor:
        """(R, 3): per resample Σ w, Σ (H + rollout log-prob) and Σ tokens."""
        first = len(SUMS) + 2 * BINS
        return self._additive[first : first + _BOOT * self.bootstrap_samples].view(self.bootstrap_samples, _BOOT)

    @property
    def sequence_weights(self) -> torch.Tensor:
        """(2, SCALES): Σ e^S and Σ e^2S over the sequences of each scale, divided by it (its square)."""
        end = self._additive.numel() - len(ADDED) - WEIGHT_BINS
        return self._additive[end - 2 * SCALES : end].view(2, SCALES)

    @property
    def correction_weights(self) -> torch.Tensor:
        """(WEIGHT_BINS,) counts of sequences by the weight the trainer's correction gave them."""
        return self._additive[-len(ADDED) - WEIGHT_BINS : -len(ADDED)]

    @property
    def third_moments(self) -> torch.Tensor:
        """(3, 3): Σ over sequences of x_i² x_j, of x = w - tokens, H + rollout log-prob, tokens."""
        return self.span(*(name for name in ADDED if name.startswith("third_moment/"))).view(3, 3)
