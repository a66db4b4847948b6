"""What a window is summed up in: mergeable sums, maxima, a histogram and bootstrap resamples, in two vectors.

How a batch fills them and what is read from them: ``trl_parity.metrics.statistics``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .scalars import LAG_BUCKETS

if TYPE_CHECKING:
    import numpy as np
    import torch

    Parts = dict[str, np.ndarray]
    # adds what a batch's sequences, (rows, B) numbers on the host, say to those parts; maxima by name
    AddSequences = Callable[[Parts, np.ndarray], dict[str, float]]

__all__ = [
    "ADDED",
    "BINS",
    "BUMPED",
    "CARRIED_BINS",
    "DECADES",
    "INDEX",
    "LOG_RATIO_BINS",
    "PER_DECADE",
    "REPLAYED",
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

CARRIED_BINS = 13 * 6 + 1  # of Σ k3 of sequences and prompts: 6 a decade from 1e-8 (below: bin 0) to 1e5

LOG_RATIO_BINS = 4 * 48 + 1  # of |S|: 48 a decade from 1e-2 nats (below: bin 0) to 1e2

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

# the trainer's side with the engine's truncation and penalties replayed: tokens both sides have a number for, k3, |Δ|
REPLAYED = ("replayed_tokens", "replayed_k3", "replayed_abs_delta")

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
    # over rows: (Σ k3)²
    "row_k3_square",
    *REPLAYED,
)  # fmt: skip

# plain numbers that are no sums over sequences
BUMPED = (
    # completions that stopped by themselves, where TRL masks truncated ones; of them, those that it masks
    "stopped", "stopped_masked",
    # of the first batch: tokens with a reference log-prob, k3 of reference against policy
    "reference_tokens", "reference_k3",
    # of a sample of the frozen weights: Σ |x - what it was|, Σ |what it was|
    "frozen_moved", "frozen_size",
    # layers of adapters found merged into the base
    "merged_layers", "adapter_layers",
    # of a teacher's server: completion tokens it was asked for, those it has a number for and not, Σ of these; places
    # it gave log-probs for, Σ e^ of them; ids it gave them for, and those that are none of the student's
    "teacher_tokens", "teacher_known", "teacher_missing", "teacher_logprob",
    "teacher_places", "teacher_mass", "teacher_ids", "teacher_foreign",
    # compared tokens that a sample left out; host seconds of the fp32 head inside the trainer's passes, and what they
    # would have been for all tokens
    "unscored", "head_seconds", "head_seconds_for_all",
    # of a floor's passes over a mixture of experts: choices of routers, and those that rounding changes
    "routed", "flipped",
)  # fmt: skip

_NAMES = SUMS + ADDED + BUMPED

# ``copies``: the largest number of equal rows in a batch; behind all that 0.6.0 kept
MAXIMA = (
    "delta", "neg_delta", "seq_abs_delta", "temperature_gap", "kv_cache_usage", "copies",
    "teacher_mass", "teacher_temperature_gap",
    # completions that the trainer asks for a prompt
    "group",
)  # fmt: skip

_FIRST_MAXIMA = 5  # of 0.6.0

# of the parts of ``additive``, in this order
_SHAPES: dict[str, tuple[int, ...]] = {
    "sums": (len(SUMS),),
    "histogram": (2, BINS),
    "bootstrap": (0, _BOOT),  # R of them
    "sequence_weights": (2, SCALES),  # Σ e^S and Σ e^2S over the sequences of each scale, divided by it (its square)
    "correction_weights": (WEIGHT_BINS,),  # sequences by the weight the trainer's correction gave them
    "added": (len(ADDED),),
    "carried": (2, 2, CARRIED_BINS),  # sequences, and prompts, by Σ k3: counts and sums
    "log_ratios": (2, LOG_RATIO_BINS),  # sequences by S
    "bumped": (len(BUMPED),),
    "equal_rows": (5,),  # completions, pairs of one prompt, equal ones, those expected, and probabilities
}

_OF_A_WINDOW = ("sequence_weights", "correction_weights", "carried", "log_ratios", "equal_rows")

_FLOOR = 2  # resamples of a noise floor's sums, which are reduced for three sources and have no such parts

_WAIT = 16  # batches whose sequences are kept before they are added


@lru_cache(maxsize=8)
def _places(bootstrap_samples: int) -> list[tuple[str, slice, tuple[int, ...]]]:
    """Name, place and shape of each part of ``additive``."""
    found, first = [], 0
    shapes = _SHAPES | {"bootstrap": (bootstrap_samples, _BOOT)}
    if bootstrap_samples <= _FLOOR:
        shapes |= {name: (0, *shapes[name][1:]) for name in _OF_A_WINDOW}
    for name, shape in shapes.items():
        found.append((name, slice(first, first := first + math.prod(shape)), shape))
    return found


class MismatchSums:
    """Everything a window needs, in two vectors: one that adds and one that takes the maximum.

    ``additive``: fp64, the sums named in ``SUMS``, then the histogram (2 signs x ``BINS``), then the bootstrap
    (R resamples x [Σ w, Σ (H + rollout log-prob), Σ tokens]), sequence weights by scale (2 x ``SCALES``), the
    histogram of the correction's weights (``WEIGHT_BINS``), the sums named in ``ADDED``, sequences and prompts by
    their Σ k3, sequences by S, the sums named in ``BUMPED``, and pairs of completions. ``maxima``: fp64, ``-inf``
    where nothing was seen.
    About 28 KiB with R = 200, whatever the number of tokens. ``by_rank``: where they were reduced over several ranks,
    (ranks, 5) tokens, Σ k3, Σ |Δ|, max Δ and max -Δ of each; it does not merge.
    """

    __slots__ = ("_additive", "_bumps", "_maxima", "_raises", "_waiting", "bootstrap_samples", "by_rank")

    def __init__(self, additive: torch.Tensor, maxima: torch.Tensor, bootstrap_samples: int):
        self._additive, self._maxima, self.bootstrap_samples = additive, maxima, bootstrap_samples
        # on their way into them: plain numbers, and numbers of sequences; no kernel for each
        self._bumps: dict[str, float] = {}
        self._raises: dict[str, float] = {}
        self._waiting: list[tuple[AddSequences, torch.Tensor]] = []
        self.by_rank: torch.Tensor | None = None

    @property
    def replica(self) -> torch.Tensor:
        """(..., 3) what is told of this rank alone: tokens, Σ k3, Σ |Δ|."""
        import torch

        return torch.stack([self.additive[..., INDEX[name]] for name in ("tokens", "k3", "abs_delta")], dim=-1)

    @property
    def additive(self) -> torch.Tensor:
        """Everything that adds. A device sync on accelerators where sequences wait."""
        self.settle()
        return self._additive

    @property
    def maxima(self) -> torch.Tensor:
        """Everything that takes the maximum. The same."""
        self.settle()
        return self._maxima

    def settle(self) -> None:
        """Add what is on its way, on the host: whatever can fail of it fails here."""
        if not (self._waiting or self._bumps or self._raises):
            return
        waiting, self._waiting = self._waiting, []
        bumps, self._bumps = self._bumps, {}
        raises, self._raises = self._raises, {}
        here = self if self._additive.device.type == "cpu" else MismatchSums.zeros("cpu", self.bootstrap_samples)
        parts, maxima = here.parts(), here._maxima.numpy()
        for add, rows in waiting:
            for name, value in add(parts, rows.cpu().numpy()).items():
                raises[name] = max(value, raises.get(name, -math.inf))
        for name, amount in bumps.items():
            if name in INDEX:
                parts["sums"][INDEX[name]] += amount
            else:
                parts["bumped"][BUMPED.index(name)] += amount
        for name, value in raises.items():
            maxima[MAXIMA.index(name)] = max(value, maxima[MAXIMA.index(name)])
        if here is not self:
            self._add(here)

    def parts(self) -> Parts:
        """Views of ``additive`` by what they are, of sums on the host."""
        flat = self.additive.numpy()
        return {name: flat[place].reshape(shape) for name, place, shape in _places(self.bootstrap_samples)}

    def cpu(self) -> MismatchSums:
        """On the host: itself, where it is there. A device sync on accelerators."""
        self.settle()
        if self._additive.device.type == "cpu":
            return self
        import torch

        both = torch.cat([self._additive, self._maxima]).cpu()
        out = MismatchSums(both[: -len(MAXIMA)], both[-len(MAXIMA) :], self.bootstrap_samples)
        out.by_rank = None if self.by_rank is None else self.by_rank.cpu()
        return out

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu", bootstrap_samples: int = 200) -> MismatchSums:
        """The sums of no tokens."""
        import torch

        size = _places(bootstrap_samples)[-1][1].stop
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
        self._add(other)
        self.bump(**other._bumps)
        self.raise_to(**other._raises)
        for add, rows in other._waiting:
            self.wait(add, rows)

    def _add(self, other: MismatchSums) -> None:
        import torch

        self._additive.add_(other._additive.to(self._additive.device))
        torch.maximum(self._maxima, other._maxima.to(self._maxima.device), out=self._maxima)

    def wait(self, add: AddSequences, rows: torch.Tensor) -> None:
        """Keep (rows, B) numbers of sequences for ``add``, which is called when the sums are read."""
        self._waiting.append((add, rows))
        if len(self._waiting) >= _WAIT:
            self.settle()

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
        assert amounts.keys() <= INDEX.keys() | set(BUMPED), amounts
        for name, amount in amounts.items():
            self._bumps[name] = self._bumps.get(name, 0.0) + amount

    def span(self, *names: str) -> torch.Tensor:
        """A view of sums that stand side by side, to be added to as one vector in this order."""
        part, known = ("sums", SUMS) if names[0] in INDEX else ("added", ADDED)
        first = known.index(names[0])
        assert known[first : first + len(names)] == names, f"{names} do not stand side by side in SUMS or ADDED"
        [place] = [place for name, place, _ in _places(self.bootstrap_samples) if name == part]
        return self._additive[place][first : first + len(names)]

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
        parts = self.cpu().parts()
        found = [*parts["sums"].tolist(), *parts["added"].tolist(), *parts["bumped"].tolist()]
        return dict(zip(_NAMES, found, strict=True))

    def peaks(self) -> dict[str, float]:
        """All maxima by name."""
        found = dict(zip(MAXIMA, self.maxima.tolist(), strict=True))
        return found | {"abs_delta": max(found["delta"], found["neg_delta"])}

    @property
    def histogram(self) -> torch.Tensor:
        """Counts of Δ: (2, bins), row 0 for Δ < 0, row 1 for Δ >= 0."""
        return self._additive[len(SUMS) : len(SUMS) + 2 * BINS].view(2, BINS)

    @property
    def bootstrap(self) -> torch.Tensor:
        """(R, 3): per resample Σ w, Σ (H + rollout log-prob) and Σ tokens."""
        first = len(SUMS) + 2 * BINS
        return self.additive[first : first + _BOOT * self.bootstrap_samples].view(self.bootstrap_samples, _BOOT)
