"""One equivalence trial: the engine answers a batch of prompts, the reference scores the very same tokens.

A trial leaves mergeable sums, so a check can be killed after any of them and go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...engine.offline import BenchEngine, Sampled
from ...records import SamplingSettings
from .reference import Reference
from .rows import Limits
from .statistics import SCALES, Sums, added, at_temperature, exact_kl, scale_curve

__all__ = ["Batch", "Gaps", "Trial", "bucket", "compare", "run_trial"]

_PREFILLED = 4  # of as many trials one asks for whole laws by prefill too, of a small vocabulary

LAW_ENTRIES = 1_000_000  # numbers a trial asks the engine for as whole laws: Python lists, a third of a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a trial asks: everything needed to ask it again."""

    prompts: tuple[tuple[int, ...], ...]
    seed: int  # of the first request; the others count on
    max_tokens: int
    temperature: float

    @property
    def seeds(self) -> list[int]:
        """One a request."""
        return [self.seed + i for i in range(len(self.prompts))]

    def to_json(self) -> dict[str, Any]:
        """As ``--case`` takes it."""
        return {
            "prompts": [list(p) for p in self.prompts],
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }


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


@dataclass(slots=True)
class Trial:
    """One trial's result."""

    index: int
    gaps: Gaps
    sequences: int
    tokens: int  # in prompts and answers: what was scored
    mean_kl: float
    engine_seconds: float
    seconds: float
    cached: int = 0  # prompt tokens read from the prefix cache

    def to_json(self) -> dict[str, Any]:
        """A line of trials.jsonl."""
        out = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return out | {"gaps": self.gaps.to_json(), "mean_kl": _finite(self.mean_kl)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trial:
        """Back from ``to_json``."""
        return cls(**{**value, "gaps": Gaps.from_json(value["gaps"]), "mean_kl": float(value["mean_kl"])})


def _finite(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)


def bucket(length: int) -> int:
    """Of a context length: 1 alone (attention sees one token: position can't matter), then four-fold steps."""
    return 0 if length <= 1 else 1 + int(math.log2(length)) // 2


def bucket_name(key: int) -> str:
    """The context lengths of a bucket."""
    return "1" if key == 0 else f"{max(2, 4 ** (key - 1)):,} to {4**key - 1:,}"


@dataclass(slots=True)
class Answered:
    """A batch as the engine answered it, ready to be scored by whatever it is compared with."""

    batch: Batch
    sampled: list[Sampled]
    sequences: list[list[int]]
    prefill: list[torch.Tensor]  # (len - 1,) log-probs of tokens
    prefill_laws: list[torch.Tensor] | None  # (len - 1, V)

    def positions(self) -> list[torch.Tensor | None]:
        """Where the reference's whole laws are needed."""
        out: list[torch.Tensor | None] = []
        for prompt, one, ids in zip(self.batch.prompts, self.sampled, self.sequences, strict=True):
            if self.prefill_laws is not None:
                out.append(torch.arange(len(ids) - 1))
            elif one.laws is not None:
                out.append(torch.arange(len(prompt) - 1, len(ids) - 1))
            else:
                out.append(None)
        return out


def answer(engine: BenchEngine, batch: Batch, turn: int = 0) -> Answered:
    """Have the engine sample after each prompt, as a run's requests do, and score the whole again by prefill.

    Whole laws are asked for as far as ``LAW_ENTRIES`` go, beginning with request ``turn`` modulo their number; by
    prefill too where ``turn`` is a multiple of four.
    """
    count, vocab = len(batch.prompts), engine.vocab_size
    few = max(1, LAW_ENTRIES // (vocab * batch.max_tokens))
    whole = [(i - turn) % count < few for i in range(count)]
    settings = SamplingSettings(temperature=batch.temperature)
    sampled = engine.sample(
        batch.prompts, settings, max_tokens=batch.max_tokens, seeds=batch.seeds, whole=whole, cold=False
    )
    sequences = [[*p, *one.token_ids] for p, one in zip(batch.prompts, sampled, strict=True)]
    laws = None
    if turn % _PREFILLED == 0 and sum(map(len, sequences)) * vocab <= LAW_ENTRIES:
        laws = engine.prefill_laws(sequences)
        taken = [
            law.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].double()
            for law, ids in zip(laws, sequences, strict=True)
        ]
    else:
        taken = [scores.double() for scores in engine.rescore(sequences)]
    return Answered(batch, sampled, sequences, taken, laws)


def compare(answered: Answered, reference: Reference, limits: Limits, batch_tokens: int | None = None) -> Gaps:
    """The engine's numbers against the reference's, as it stands now."""
    scored = _score(answered, reference, batch_tokens)
    return _gaps(answered, _engine_side(answered), scored, limits)


def against_itself(answered: Answered, one: list[Any], plain: list[Any], limits: Limits) -> Gaps:
    """A noisy reference in the engine's place."""
    side = []
    for prompt, ids, noisy, positions in zip(
        answered.batch.prompts, answered.sequences, one, answered.positions(), strict=True
    ):
        start = len(prompt) - 1
        decode = None
        if noisy.laws is not None and positions is not None:
            decode = at_temperature(noisy.laws[-(len(ids) - len(prompt)) :], answered.batch.temperature)
        prefill = noisy.laws if answered.prefill_laws is not None else None
        sampled = noisy.tempered[start:]
        if decode is not None:
            sampled = decode.gather(-1, torch.tensor(ids[len(prompt) :])[:, None])[:, 0]
        side.append(_Side(sampled, decode, noisy.logprobs, prefill))
    return _gaps(answered, side, plain, limits)


def score(answered: Answered, reference: Reference, batch_tokens: int | None = None) -> list[Any]:
    """The reference's scores of the answered sequences."""
    return _score(answered, reference, batch_tokens)


def _score(answered: Answered, reference: Reference, batch_tokens: int | None) -> list[Any]:
    more = {} if batch_tokens is None else {"batch_tokens": batch_tokens}
    return reference.score(answered.sequences, answered.positions(), temperature=answered.batch.temperature, **more)


@dataclass(slots=True)
class _Side:
    sampled: torch.Tensor  # (K,) at the trial's temperature
    laws: torch.Tensor | None  # (K, V)
    prefill: torch.Tensor  # (L - 1,)
    prefill_laws: torch.Tensor | None


def _engine_side(answered: Answered) -> list[_Side]:
    laws: Sequence[torch.Tensor | None] = answered.prefill_laws or [None] * len(answered.sequences)
    return [
        _Side(one.logprobs, one.laws, taken, law)
        for one, taken, law in zip(answered.sampled, answered.prefill, laws, strict=True)
    ]


def _gaps(answered: Answered, side: Sequence[_Side], scored: Sequence[Any], limits: Limits) -> Gaps:
    temperature = answered.batch.temperature
    p, q, reported, tokens, d, gap, at, prefill_p, prefill_q = ([] for _ in range(9))
    for prompt, ids, mine, theirs in zip(answered.batch.prompts, answered.sequences, side, scored, strict=True):
        sampled = torch.tensor(ids[len(prompt) :])
        if mine.laws is not None and theirs.laws is not None:
            p.append(mine.laws)
            q.append(theirs.laws[-len(sampled) :])
            reported.append(mine.sampled)
            tokens.append(sampled)
        else:
            d.append(theirs.tempered[len(prompt) - 1 :] - mine.sampled)
        gap.append((theirs.logprobs - mine.prefill).abs())
        at.append(torch.arange(1, len(ids)))
        if mine.prefill_laws is not None:
            prefill_p.append(mine.prefill_laws)
            prefill_q.append(theirs.laws)
    gaps = Gaps(trials=1)
    kl, delta = torch.zeros(0, dtype=torch.float64), [x.abs() for x in d]
    if p:
        law = at_temperature(torch.cat(q), temperature)
        kl = exact_kl(torch.cat(p), law)
        delta.append((law.gather(-1, torch.cat(tokens)[:, None])[:, 0] - torch.cat(reported)).abs())
    if prefill_p:
        gaps.prefill_kl = Sums.of(exact_kl(torch.cat(prefill_p), torch.cat(prefill_q)))
        gaps.curve = scale_curve(torch.cat(prefill_p), torch.cat(prefill_q)).tolist()
    elif p and temperature == 1.0:
        gaps.curve = scale_curve(torch.cat(p), torch.cat(q)).tolist()
    gaps.kl, gaps.k3, gaps.delta = Sums.of(kl), Sums.of(_cat(torch.expm1(x) - x for x in d)), Sums.of(_cat(delta))
    key = torch.tensor([bucket(int(n)) for n in range(int(max(map(len, at))) + 1)])[torch.cat(at)]
    away = torch.cat(gap)
    gaps.positions = {int(k): Sums.of(away[key == k]) for k in key.unique()}
    gaps.over = int((~(kl <= limits.max_kl)).sum())
    gaps.over_squares, gaps.over_cross = float(gaps.over**2), float(gaps.over * len(kl))
    gaps.sizes = float(len(kl) ** 2)
    means = gaps.kl if gaps.kl.count + gaps.kl.bad else gaps.k3
    gaps.worst = means.mean
    return gaps


def _cat(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    found = [part.double() for part in parts]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def engine_alone(engine: BenchEngine, batch: Batch) -> int:
    """The same requests without whole laws and without a reference, for their time; tokens scored."""
    settings = SamplingSettings(temperature=batch.temperature)
    given = engine.sample(batch.prompts, settings, max_tokens=batch.max_tokens, seeds=batch.seeds, cold=False)
    sequences = [[*p, *one.token_ids] for p, one in zip(batch.prompts, given, strict=True)]
    engine.rescore(sequences)
    return sum(map(len, sequences))


def run_trial(index: int, batch: Batch, engine: BenchEngine, reference: Reference, limits: Limits) -> Trial:
    """Ask, score, compare."""
    start = time.perf_counter()
    answered = answer(engine, batch, turn=index)
    asked = time.perf_counter()
    gaps = compare(answered, reference, limits)
    return Trial(
        index=index, gaps=gaps, sequences=len(batch.prompts), tokens=sum(map(len, answered.sequences)),
        mean_kl=gaps.worst, engine_seconds=asked - start, seconds=time.perf_counter() - start,
        cached=sum(one.cached for one in answered.sampled),
    )  # fmt: skip
