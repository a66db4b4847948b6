"""Which cause explains most of a drift, and how sure that is: shares of the excess, over resamples of sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..records import Evidence
from .probes.base import Candidate, Probe

__all__ = [
    "DECISIVE",
    "EXACT",
    "FIRST",
    "NAMED",
    "RESAMPLES",
    "Result",
    "best_of",
    "chance_in",
    "confidence_in",
    "mean",
    "not_excluded",
    "rivals_of",
    "shares_of",
    "standard_error",
]

FIRST = 0.3  # share of the excess that the first cause must explain

NAMED = 0.5  # of all the excess, by all causes together, or the cause is unknown

EXACT = 0.75  # a fitted distribution must explain this much of what remained, or all causes together must

_TIE = 0.04  # shares this close are equal

RESAMPLES = 200

DECISIVE = ("weights", "forward", "engine", "singles")  # what is found on the run itself, and not on every set-up


@dataclass(frozen=True, slots=True)
class Result:
    """What a probe explains, over all ranks."""

    probe: Probe
    candidate: Candidate | None  # of this rank
    cause: str
    share: float  # of the excess that remained
    shares: torch.Tensor  # (R,) the same in bootstrap resamples of sequences
    misfit: float  # what is left, dearer by the number of fitted values
    evidence: Evidence
    fix: str = ""  # what mends it, where that is not what mends its cause in general
    most: float = 1.0  # confidence it can have
    unasked: str = ""  # why there is no answer: "time", "failed" or "not possible"; "" where there is one

    @property
    def sure(self) -> float:
        """Share of the excess explained in all but a twentieth of the resamples."""
        return float(self.shares.quantile(0.05))


def mean(sums: torch.Tensor) -> float:
    """Residual per token of (S, 2) sums and counts."""
    return float(sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1))


def standard_error(sums: torch.Tensor) -> float:
    """Of ``mean``, over sequences: sqrt(Σ (x - mean n)² S / (S - 1)) / Σ n. Infinite for a single one."""
    apart = sums[:, 0] - mean(sums) * sums[:, 1]
    few = len(sums) / (len(sums) - 1) if len(sums) > 1 else math.inf
    return math.sqrt(float(apart @ apart) * few) / max(float(sums[:, 1].sum()), 1.0) if few < math.inf else few


def chance_in(sums: torch.Tensor, copies: float) -> float:
    """How far above its expectation ``mean`` is in one of 40 batches: t · ``standard_error`` · sqrt((S - 1) / ν).

    ν = S / copies - 1, of S sequences of which a draw has so many ``copies`` on average; t: Student's quantile of .975
    at ν degrees of freedom. Infinite where all are one draw.
    """
    from scipy.special import stdtrit

    free = len(sums) / copies - 1.0
    if free <= 0.0:
        return math.inf
    return float(stdtrit(free, 0.975)) * standard_error(sums) * math.sqrt((len(sums) - 1.0) / free)


def shares_of(before: torch.Tensor, after: torch.Tensor, floor: float) -> tuple[float, torch.Tensor]:
    """1 - (after - floor)+ / (before - floor), of all sequences and of bootstrap resamples of them."""
    weights = torch.poisson(torch.ones(RESAMPLES, len(before), dtype=torch.float64), torch.Generator().manual_seed(0))
    weights = torch.cat([torch.ones(1, len(before), dtype=torch.float64), weights])

    def mean(sums: torch.Tensor) -> torch.Tensor:
        return (weights @ sums[:, 0]) / (weights @ sums[:, 1]).clamp(min=1)

    b, a = mean(before), mean(after)
    shares = 1.0 - (a - floor).clamp(min=0) / (b - floor).clamp(min=1e-12)
    shares = torch.where(b > floor, shares, 0.0).clamp(-1.0, 1.0)
    return float(shares[0]), shares[1:]


def best_of(results: Sequence[Result]) -> Result | None:
    """The cause that explains most. Of nearly equal ones: found rather than fitted, then the cheapest, or best fit."""
    good = _worth_naming([r for r in results if r.share > 0])
    if not good:
        return None
    top = max(r.share for r in good)
    equal = [r for r in good if r.share >= top - _TIE]
    found = [r for r in equal if not r.probe.fitted]
    return found[0] if found else min(equal, key=lambda r: r.misfit)


def _worth_naming(tried: list[Result]) -> list[Result]:
    """Those that explain enough for their kind; where none does, all.

    A fitted distribution that leaves much is not the one: it is named only where nothing was found on the run itself.
    By elimination (cost "last") a cause is named only where nothing else explains half.
    """
    good = [r for r in tried if r.probe.cost != "last" and r.share >= (EXACT if r.probe.fitted else FIRST)]
    if not good or max(r.share for r in good) < NAMED:
        good += [r for r in tried if r.probe.cost == "last" and r.share >= NAMED]
    return good or tried


def rivals_of(best: Result, results: Sequence[Result]) -> tuple[str, ...]:
    """Other causes whose fitted distributions explain as much as the fitted one that is named."""
    equal = [r for r in results if best.probe.fitted and r.probe.fitted and r.share >= best.share - _TIE]
    return tuple(sorted({r.cause for r in equal} - {best.cause}))


def not_excluded(best: Result, results: Sequence[Result], excluded: frozenset[str]) -> tuple[str, ...]:
    """Other causes whose probes could not be asked, and that nothing speaks against."""
    missing = {r.cause for r in results if r.unasked and r.probe.cost in DECISIVE}
    return tuple(sorted(missing - {r.cause for r in results if r.share > 0} - {best.cause} - excluded))


def confidence_in(best: Result, results: Sequence[Result], unasked: Sequence[str] = ()) -> float:
    """How sure the cause is: the share of resamples in which it wins, less for what could not be asked.

    The mean over resamples of 1 / the number of causes that explain as much as the most, where this is one of them:
    those found on the run itself count before fitted ones, as in ``best_of``, and a resample in which the cause
    explains too little counts 0. Divided by 1 + n d for n causes that could not be asked (``not_excluded``), where
    d = (1 - explained for sure) / (1 - EXACT), 1 at most: what leaves nothing unexplained has no rivals. Of a cause
    by elimination d is 1. At most what its candidate says.
    """
    doubt = 1.0 if best.probe.cost == "last" else min(1.0, (1.0 - best.sure) / (1.0 - EXACT))
    return min(best.most, _wins(best, results) / (1.0 + len(unasked) * doubt))


def _wins(best: Result, results: Sequence[Result]) -> float:
    others = [r for r in results if r.cause != best.cause and (r.probe.cost != "last" or r is best)]
    if not others:
        return float((best.shares >= FIRST).double().mean())
    shares = torch.stack([r.shares for r in others])
    fitted = torch.tensor([r.probe.fitted for r in others])
    rivals = shares if best.probe.fitted else torch.where(fitted[:, None], shares - 2 * _TIE, shares)
    highest = torch.maximum(rivals.amax(0), best.shares)
    near = rivals >= highest - _TIE
    causes = torch.stack([near[[r.cause == c for r in others]].any(0) for c in {r.cause for r in others}]).sum(0)
    good = (best.shares >= FIRST) & (best.shares >= highest - _TIE)
    return float((good / (1.0 + causes)).mean())
