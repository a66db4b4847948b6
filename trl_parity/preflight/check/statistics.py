"""Statistics of equivalence, as mergeable sums: pure tensor maths.

``p``: the engine's law, ``q``: the reference's, both (n, V) log-probs, -inf for what is not in a law.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "SCALES",
    "Sums",
    "at_temperature",
    "coarse_kl",
    "exact_kl",
    "fitted_scale",
    "kolmogorov_smirnov",
    "pit",
    "scale_curve",
    "surprisal",
    "total_variation",
    "wilson",
]

# of logits, tried by `scale_curve`: half to twice, and finely about one
SCALES = tuple(sorted([*(2.0 ** (j / 12) for j in range(-12, 13)), *(1.0 + d for d in (-0.02, -0.005, 0.005, 0.02))]))

_EDGES = torch.logspace(-18, 3, 22 * 16, dtype=torch.float64)  # of histograms: bins 15 % wide


def normalized(law: torch.Tensor) -> torch.Tensor:
    """fp64 log-probs that add up to one: fp32 ones are off by 1e-7, which is more than the KL that is looked for."""
    law = law.double()
    return law - law.logsumexp(-1, keepdim=True)


def at_temperature(law: torch.Tensor, temperature: float) -> torch.Tensor:
    """The law of the same logits at another temperature, fp64."""
    return normalized(law.double() / temperature)


def exact_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(engine ‖ reference) = sum_v p (log p - log q) over the whole vocabulary, (n,), nats, fp64.

    inf where the engine samples what the reference excludes; nan where a law has nan in it.
    """
    p, q = normalized(p), normalized(q)
    terms = p.exp() * (p - q)
    return torch.where(p == -torch.inf, 0.0, terms).sum(-1).clamp(min=0.0)


def coarse_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A lower bound of the KL where only k entries of both laws are known, (n, k) each.

    The entries and one cell for all the rest: merging cells never increases a KL (data processing inequality).
    """
    p, q = p.double(), q.double()
    kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
    rest_p, rest_q = ((1.0 - x.exp().sum(-1)).clamp(min=1e-12) for x in (p, q))
    return (kl + rest_p * (rest_p.log() - rest_q.log())).clamp(min=0.0)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(1/2) sum_v |p - q|, (n,): the largest difference in probability of any event."""
    return 0.5 * (normalized(p).exp() - normalized(q).exp()).abs().sum(-1)


def scale_curve(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum over the n laws of KL(engine ‖ softmax(a log q)) for each a of `SCALES`, fp64."""
    p, q = normalized(p), q.double()
    kept = p.exp()
    entropy = torch.where(p == -torch.inf, 0.0, kept * p).sum()
    cross = torch.where(p == -torch.inf, 0.0, kept * q).sum()
    norms = torch.stack([(a * q).logsumexp(-1).sum() for a in SCALES])
    return entropy - torch.tensor(SCALES, dtype=torch.float64) * cross + norms


def fitted_scale(curve: Sequence[float]) -> tuple[float, float]:
    """(a, share of the KL it explains): the scale of the reference's logits that fits the engine best.

    The curve is convex in a; its least point is refined by a parabola through three neighbours.
    """
    one = SCALES.index(1.0)
    at = min(range(1, len(SCALES) - 1), key=lambda i: curve[i])
    x, y = SCALES[at - 1 : at + 2], curve[at - 1 : at + 2]
    slopes = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (slopes[1] - slopes[0]) / (x[2] - x[0])
    if not bend > 0 or not curve[one] > 0:
        return 1.0, 0.0
    best = min(max(0.5 * (x[0] + x[1]) - slopes[0] / (2 * bend), x[0]), x[2])
    least = y[0] + slopes[0] * (best - x[0]) + bend * (best - x[0]) * (best - x[1])
    return best, 1.0 - max(0.0, least) / curve[one]


def surprisal(law: torch.Tensor, tokens: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(excess, variance), both (n,): -log p(token) - entropy of the law, and the variance of -log p under it.

    ``law``: (m, V); ``which``: (n,), the row of it each token was drawn from.
    """
    law = normalized(law)
    p = law.exp()
    bits = torch.where(law == -torch.inf, 0.0, -law)
    mean = (p * bits).sum(-1)
    variance = (p * (bits - mean[:, None]) ** 2).sum(-1)
    return -law[which, tokens] - mean[which], variance[which]


def pit(law: torch.Tensor, tokens: torch.Tensor, which: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Randomized probability integral transform over the tokens by falling probability, (n,) in [0, 1].

    Uniform when the tokens are drawn from the law; a cut tail leaves the upper end empty. ``law`` and ``which`` as in
    ``surprisal``; tokens of one probability are in the order of their ids.
    """
    p, order = normalized(law).exp().sort(dim=-1, descending=True, stable=True)
    before = torch.empty_like(p).scatter_(-1, order, p.cumsum(-1) - p)
    own = torch.empty_like(p).scatter_(-1, order, p)
    return before[which, tokens] + uniform.double() * own[which, tokens]


def kolmogorov_smirnov(values: torch.Tensor) -> tuple[float, float]:
    """(distance, p-value) of n values from the uniform law on [0, 1]: the limit of many, with Stephens' correction."""
    from scipy.special import kolmogorov  # scipy.stats takes seconds to import

    x, n = values.double().sort().values, len(values)
    below = torch.arange(n, dtype=torch.float64) / n
    distance = float(torch.maximum(x - below, below + 1.0 / n - x).max())
    return distance, float(kolmogorov(distance * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))))


def wilson(passed: float, total: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a rate; (0, 1) of nothing. Total may be an effective number."""
    if total <= 0:
        return 0.0, 1.0
    rate = passed / total
    middle = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return (0.0 if passed == 0 else max(0.0, middle - half)), (1.0 if passed == total else min(1.0, middle + half))


@dataclass(slots=True)
class Sums:
    """Of non-negative numbers: count, sum, sum of squares, maximum, a histogram for quantiles. Adds up."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    bad: int = 0  # not finite: in no other number
    bins: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, values: torch.Tensor) -> Sums:
        """The sums of these values."""
        values = values.double().flatten()
        good = values[torch.isfinite(values)]
        bins = torch.bincount(torch.bucketize(good, _EDGES), minlength=len(_EDGES) + 1)
        return cls(
            len(good),
            float(good.sum()),
            float(good.square().sum()),
            float(good.max()) if len(good) else 0.0,
            len(values) - len(good),
            {int(i): int(bins[i]) for i in bins.nonzero()},
        )

    def __add__(self, other: Sums) -> Sums:
        bins = dict(self.bins)
        for i, n in other.bins.items():
            bins[i] = bins.get(i, 0) + n
        return Sums(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            max(self.largest, other.largest),
            self.bad + other.bad,
            bins,
        )

    @property
    def mean(self) -> float:
        """inf where some value was not finite; nan of nothing."""
        if self.bad:
            return math.inf
        return self.total / self.count if self.count else math.nan

    @property
    def half_square(self) -> float:
        """Half the mean square; inf where some value was not finite, nan of nothing."""
        if self.bad:
            return math.inf
        return self.squares / (2 * self.count) if self.count else math.nan

    @property
    def maximum(self) -> float:
        """inf where some value was not finite."""
        return math.inf if self.bad else self.largest

    def quantile(self, q: float) -> float:
        """From the histogram, to 15 %: the upper edge of the bin it falls in."""
        total = self.count + self.bad
        if not total:
            return math.nan
        seen = 0
        for i in sorted(self.bins):
            seen += self.bins[i]
            if seen >= q * total:
                return min(self.largest, float(_EDGES[min(i, len(_EDGES) - 1)]))
        return math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "count": self.count, "total": self.total, "squares": self.squares, "largest": self.largest,
            "bad": self.bad, "bins": [[i, n] for i, n in sorted(self.bins.items())],
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sums:
        """Back from ``to_json``."""
        return cls(**{**value, "bins": {int(i): int(n) for i, n in value["bins"]}})


def added(many: Iterable[Sums]) -> Sums:
    """All of them together."""
    out = Sums()
    for one in many:
        out = out + one
    return out
