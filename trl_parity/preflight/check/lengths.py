"""Long contexts: past the target length, and around each length at which an implementation changes what it does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.offline import BenchEngine
from ...records import SamplingSettings
from ...report.format import number
from .aside import Aside
from .reference import Reference, Scored
from .rows import Limits, Row, RowVerdict, not_run, within_floor
from .statistics import Sums, exact_kl

__all__ = ["Point", "length_rows", "points"]

_SHARES = (1.25, 1.5, 2.0)

_WIDTH = 24  # tokens on either side of a point

_SEQUENCES = 3


@dataclass(frozen=True, slots=True)
class Point:
    """A length to be looked at."""

    id: str
    title: str
    length: int
    needed: bool


def points(config: Any, target: int, longest: int, *, asked_for: bool) -> list[Point]:
    """125, 150 and 200 % of the target, and the config's own thresholds that an engine's context can reach.

    ``config``: the text config of the model. ``asked_for``: the target is the user's own, so what is out of the
    engine's reach leaves the check open.
    """
    out = [
        Point(f"length_{share:.0%}".rstrip("%"), f"{share:.0%} of {target:,} tokens", round(share * target), asked_for)
        for share in _SHARES
    ]
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layered = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    thresholds = {
        "original maximum of positions": [r.get("original_max_position_embeddings") for r in layered],
        "maximum of positions": [getattr(config, "max_position_embeddings", None)],
        "sliding window": [_window(config)],
        "attention chunk": [getattr(config, "attention_chunk_size", None)],
    }
    for name, lengths in thresholds.items():
        for length in sorted({n for n in lengths if isinstance(n, int) and 1 < n < longest}):
            out.append(Point(f"length_{name.replace(' ', '_')}", f"{name}, {length:,} tokens", length, True))
    return out


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in kind for kind in kinds):
        return None
    return None if getattr(config, "use_sliding_window", True) is False else getattr(config, "sliding_window", None)


def length_rows(
    engine: BenchEngine,
    reference: Reference,
    looked_at: Sequence[Point],
    vocabulary: Sequence[int],
    limits: Limits,
    aside: Aside,
    *,
    seed: int,
    positional: bool,
    usual: float,
) -> Iterator[Row]:
    """One row a point. ``positional``: the drift of the trials spares first tokens; ``usual``: how much there is.

    Drift that is there at any length is no fault of a length: it must be positional, or four times the usual.
    """
    reach = [p for p in looked_at if p.length + 1 < engine.max_model_len or p.length == engine.max_model_len]
    for point in looked_at:
        if point not in reach:
            why = f"the engine takes {engine.max_model_len:,} tokens (max_model_len)"
            yield not_run(point.id, "lengths", point.title, why, needed=point.needed)
    if not reach:
        return
    longest = min(engine.max_model_len - 1, max(p.length for p in reach) + _WIDTH)
    sequences = _repeating(vocabulary, longest, seed)
    ends = [min(point.length, longest) for point in reach]
    spans = [
        (max(1, end - _WIDTH), min(longest, point.length + _WIDTH) - 1) for end, point in zip(ends, reach, strict=True)
    ]

    def compared(some: list[list[int]]) -> tuple[list[tuple[Sums, Sums]], torch.Tensor | None]:
        """Δ² / 2 of engine and noise at each point, and the reference's laws there in the first sequence."""

        def scores() -> tuple[list[Scored], list[Scored]]:
            plain = reference.score(some, [torch.tensor(ends) - 1, *[None] * (len(some) - 1)])
            with reference.rounded(engine.dtype, engine.head_dtype, seed):
                return plain, reference.score(some)

        scored = aside.begin(scores)
        try:
            theirs = [t.double() for t in engine.rescore(some)]
        finally:
            plain, noisy = scored()  # whatever becomes of the engine, the reference is at rest
        pairs = [(t - p.logprobs, n.logprobs - p.logprobs) for t, n, p in zip(theirs, noisy, plain, strict=True)]
        halves = [
            [
                Sums.of(torch.cat([gap[low - 1 : high] for gap in gaps]).square() / 2)
                for gaps in zip(*pairs, strict=True)
            ]
            for low, high in spans
        ]
        return [(gap, noise) for gap, noise in halves], plain[0].laws

    measured, laws = compared(sequences[:1])
    assert laws is not None
    exact = [
        float(exact_kl(law[None], q[None])[0])
        for law, q in zip(_laws_after(engine, sequences[0], ends), laws, strict=True)
    ]
    lines = [max(limits.least_kl, limits.k * noise.mean) for _, noise in measured]
    if all(_clear(gap.mean, line, 4.0 * usual) for (gap, _), line in zip(measured, lines, strict=True)):
        sequences = sequences[:1]
    else:
        more, _ = compared(sequences[1:])
        measured = [(a + c, b + d) for (a, b), (c, d) in zip(measured, more, strict=True)]
    for point, span, sums, kl in zip(reach, spans, measured, exact, strict=True):
        allowed = 0.0 if positional else 4.0 * usual
        yield _row(point, span, *sums, kl, len(sequences), limits, allowed)


def _row(
    point: Point, span: tuple[int, int], halves: Sums, noise: Sums, kl: float, sequences: int, limits: Limits,
    allowed: float,
) -> Row:  # fmt: skip
    """``allowed``: how much drift there is at any length."""
    over = not within_floor(halves.mean, noise.mean, limits)
    fails = over and halves.mean > allowed
    some = f"{sequences} sequence{'s' if sequences > 1 else ''}"
    words = f"tokens {span[0]:,} to {span[1]:,} of {some}; exact KL at {point.length:,}: {number(kl)}"
    if over and not fails:
        words += "; as everywhere, so no fault of the length"
    return Row(
        id=point.id, group="lengths", title=point.title, statistic="mean Δ²/2, nats", value=halves.mean,
        limit=max(limits.least_kl, limits.k * noise.mean), floor=noise.mean, worst=halves.maximum,
        tokens=halves.count, trials=sequences, verdict=RowVerdict.FAIL if fails else RowVerdict.PASS,
        evidence=words, details={"exact_kl": kl},
        fix="the same rope_parameters, windows and maximum of positions on both sides" if fails else "",
    )  # fmt: skip


def _clear(value: float, limit: float, usual: float) -> bool:
    """Whether one sequence tells: nowhere within a factor of three of what decides.

    Both sides are mean squares over ``2 * _WIDTH`` tokens: if but a third of them are independent, chance moves their
    ratio by three once in fifty times, and noise that makes the limit is a ninth of it to begin with.
    """
    return 3.0 * value <= limit or value >= 3.0 * max(limit, usual)


def _repeating(vocabulary: Sequence[int], length: int, seed: int) -> list[list[int]]:
    """Random tokens that come again after a third: what attends far back has something to find there."""
    rng = random.Random(f"{seed}:lengths")
    unit = max(1, length // 3)
    return [(rng.choices(vocabulary, k=unit) * 4)[:length] for _ in range(_SEQUENCES)]


def _laws_after(engine: BenchEngine, ids: Sequence[int], ends: Sequence[int]) -> list[torch.Tensor]:
    """The law (V,) that is sampled from after the first tokens of a sequence, as many as each of ``ends``."""
    contexts = [list(ids[:end]) for end in ends]
    sampled = engine.sample(contexts, SamplingSettings(), max_tokens=1, seeds=range(len(contexts)), whole=True)
    return [one.laws[0] for one in sampled if one.laws is not None]
