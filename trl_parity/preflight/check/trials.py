"""One equivalence trial: the engine answers a batch of prompts, the reference scores the very same tokens.

A trial leaves mergeable sums, so a check can be killed after any of them and go on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.offline import BenchEngine, Sampled
from ...records import SamplingSettings
from .drift import Gaps, bucket, sampled_kl
from .reference import Reference, Scored
from .rows import Limits
from .statistics import Sums, at_temperature, exact_kl, scale_curve

__all__ = ["Answered", "Batch", "Trial", "answer", "compare", "compared", "score", "whole_laws"]

_PREFILLED = 4  # of as many trials one asks for whole laws by prefill too, of a small vocabulary

LAW_ENTRIES = 1_000_000  # numbers asked of the engine as whole laws at a time: Python lists, a third of a second

_SAMPLED_ENTRIES = 8 * LAW_ENTRIES  # the same of what a trial samples: its exact KL is what most rows are made of


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


def whole_laws(requests: int, vocab: int, max_tokens: int) -> int:
    """Of how many requests of a trial the whole laws are asked for."""
    return min(requests, max(1, _SAMPLED_ENTRIES // (vocab * max_tokens)))


def sample(engine: BenchEngine, batch: Batch, turn: int = 0) -> list[Sampled]:
    """Have the engine sample after each prompt, as a run's requests do.

    Whole laws are asked for as far as they may go, beginning with request ``turn`` modulo their number.
    """
    count = len(batch.prompts)
    few = whole_laws(count, engine.vocab_size, batch.max_tokens)
    return engine.sample(
        batch.prompts, SamplingSettings(temperature=batch.temperature), max_tokens=batch.max_tokens, seeds=batch.seeds,
        whole=[(i - turn) % count < few for i in range(count)], cold=False,
    )  # fmt: skip


def answer(engine: BenchEngine, batch: Batch, turn: int = 0) -> Answered:
    """Have the engine sample after each prompt, and score the whole again by prefill.

    Whole laws by prefill too where ``turn`` is a multiple of four and ``LAW_ENTRIES`` allow it.
    """
    vocab, sampled = engine.vocab_size, sample(engine, batch, turn)
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


def compare(answered: Answered, reference: Reference, limits: Limits) -> Gaps:
    """The engine's numbers against the reference's, as it stands now."""
    return compared(answered, score(answered, reference), limits)


def compared(answered: Answered, scored: list[Scored], limits: Limits) -> Gaps:
    """The engine's numbers against scores of the reference."""
    return _gaps(answered, _engine_side(answered), scored, limits)


def drift_of_samples(engine: BenchEngine, reference: Reference, batch: Batch) -> float:
    """The mean KL of what the engine samples, and nothing of how it scores that by prefill."""
    sampled = sample(engine, batch)
    sequences = [[*p, *one.token_ids] for p, one in zip(batch.prompts, sampled, strict=True)]
    answered = Answered(batch, sampled, sequences, [torch.zeros(0)] * len(sampled), None)
    gaps = Gaps()
    _add_sampled(gaps, _pairs(answered, _engine_side(answered), score(answered, reference)), batch.temperature)
    return sampled_kl(gaps)


def against_itself(answered: Answered, one: list[Scored], plain: list[Scored], limits: Limits) -> Gaps:
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


def score(answered: Answered, reference: Reference) -> list[Scored]:
    """The reference's scores of the answered sequences."""
    return reference.score(answered.sequences, answered.positions(), temperature=answered.batch.temperature)


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


_Pair = tuple[torch.Tensor, _Side, Scored]  # sampled ids; scores of the engine (or a noisy reference); the reference's


def _pairs(answered: Answered, side: Sequence[_Side], scored: Sequence[Scored]) -> list[_Pair]:
    return [
        (torch.tensor(ids[len(prompt) :]), mine, theirs)
        for prompt, ids, mine, theirs in zip(answered.batch.prompts, answered.sequences, side, scored, strict=True)
    ]


def _gaps(answered: Answered, side: Sequence[_Side], scored: Sequence[Scored], limits: Limits) -> Gaps:
    gaps = Gaps(trials=1)
    pairs = _pairs(answered, side, scored)
    kl = _add_sampled(gaps, pairs, answered.batch.temperature)
    _add_prefill(gaps, pairs)
    gaps.over = int((~(kl <= limits.max_kl)).sum())
    gaps.over_squares, gaps.over_cross = float(gaps.over**2), float(gaps.over * len(kl))
    gaps.sizes = float(len(kl) ** 2)
    gaps.worst = sampled_kl(gaps)
    return gaps


def _add_sampled(gaps: Gaps, pairs: Sequence[_Pair], temperature: float) -> torch.Tensor:
    """What was sampled, in place. The exact KL of each token whose law both sides know."""
    exact = [(ids, mine, theirs) for ids, mine, theirs in pairs if mine.laws is not None and theirs.laws is not None]
    d = [
        theirs.tempered[len(theirs.tempered) - len(ids) :] - mine.sampled
        for ids, mine, theirs in pairs
        if mine.laws is None or theirs.laws is None
    ]
    kl, delta = torch.zeros(0, dtype=torch.float64), [x.abs() for x in d]
    if exact:
        p = torch.cat([mine.laws for _, mine, _ in exact if mine.laws is not None])
        q = torch.cat([theirs.laws[-len(ids) :] for ids, _, theirs in exact if theirs.laws is not None])
        law = at_temperature(q, temperature)
        kl = exact_kl(p, law)
        taken = law.gather(-1, torch.cat([ids for ids, _, _ in exact])[:, None])[:, 0]
        delta.append((taken - torch.cat([mine.sampled for _, mine, _ in exact])).abs())
        if temperature == 1.0 and all(mine.prefill_laws is None for _, mine, _ in pairs):
            some = max(1, LAW_ENTRIES // p.shape[1])  # a factor is the same on all of them
            gaps.curve = scale_curve(p[:some], q[:some]).tolist()
    gaps.kl, gaps.k3, gaps.delta = Sums.of(kl), Sums.of(_cat(torch.expm1(x) - x for x in d)), Sums.of(_cat(delta))
    return kl


def _add_prefill(gaps: Gaps, pairs: Sequence[_Pair]) -> None:
    """What was scored by prefill, in place; whole laws of it tell the scale, else those of what was sampled."""
    whole = [(mine.prefill_laws, theirs.laws) for _, mine, theirs in pairs if mine.prefill_laws is not None]
    if whole:
        p, q = (torch.cat(laws) for laws in zip(*whole, strict=True))
        gaps.prefill_kl = Sums.of(exact_kl(p, q))
        gaps.curve = scale_curve(p, q).tolist()
    away = torch.cat([(theirs.logprobs - mine.prefill).abs() for _, mine, theirs in pairs])
    lengths = [len(mine.prefill) + 1 for _, mine, _ in pairs]
    bucket_of = torch.tensor([bucket(n) for n in range(max(lengths))])
    key = torch.cat([bucket_of[1:length] for length in lengths])
    gaps.positions = {int(k): Sums.of(away[key == k]) for k in key.unique()}


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
