"""Prompts to try an engine with, drawn over a tokenizer's own vocabulary.

    vocabulary = Vocabulary.of(tokenizer)
    drawing = batches(vocabulary, max_len=4096, boundaries=(16, 2048), max_batch=8)
    for batch in draw(drawing, 50, seed=0):
        if fails(batch):
            small = shrink(drawing, fails, seed=0, budget_seconds=60, start=batch)
            print(Case(small).to_text())

A prompt is token ids, never text: a text goes through a tokenizer that maps many texts to few of its tokens. Lengths
lean on the places where an engine changes what it does (a new KV block, the next chunk of a prefill, the context
limit), one token before, at and after each. ``batches(...).hypothesis()`` is the same for property-based tests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence

from ...config.fields import at_least
from ...errors import ConfigError
from .cases import Prompt, Vocabulary
from .draws import Drawing, Draws, draw, shrink, stream

__all__ = ["batches", "draw", "prompts", "shrink", "stream"]

_DRAWN = 16  # tokens of a prompt that are drawn one by one, so that they can shrink; the rest comes from a seed


def prompts(vocabulary: Vocabulary, max_len: int, boundaries: Iterable[int] = ()) -> Drawing[Prompt]:
    """One prompt of 1 to ``max_len`` tokens.

    ``boundaries``: lengths at whose multiples the engine does something new, as the KV block size and
    ``max_num_batched_tokens``; half of all prompts are one token shorter than a multiple, at it, or one longer.
    Shrinks to a short repeat of the smallest ids.
    """
    lengths, bodies = _lengths(max_len, boundaries), _bodies(vocabulary)
    return Drawing(lambda draws: _prompt(draws, lengths, bodies))


def batches(
    vocabulary: Vocabulary, max_len: int, boundaries: Iterable[int] = (), max_batch: int = 8
) -> Drawing[tuple[Prompt, ...]]:
    """1 to ``max_batch`` prompts: of any lengths and kinds, all the same one, or behind one shared prefix.

    A shared prefix has a length of its own, at a block's end as often as not; a tail may be empty, so that one prompt
    is the beginning of another. Kinds are then ``shared+<kind>``.
    """
    lengths, bodies = _lengths(max_len, boundaries := tuple(boundaries)), _bodies(vocabulary)
    tails = _lengths(max_len, boundaries, shortest=0)
    _positive("max_batch", max_batch)

    def batch(draws: Draws) -> tuple[Prompt, ...]:
        # Every shape draws prompts in the same way, so that one shape can shrink to another.
        shape, count = draws.pick(("mixed", "same", "shared")), draws.integer(1, max_batch)
        first = _prompt(draws, lengths, bodies)
        if shape == "same":
            return (first,) * count
        if shape == "mixed":
            return (first, *(_prompt(draws, lengths, bodies) for _ in range(count - 1)))
        room = max_len - len(first.ids)
        drawn = [_prompt(draws, tails, bodies) for _ in range(count)]
        return tuple(Prompt(first.ids + tail.ids[:room], f"shared+{tail.kind}") for tail in drawn)

    return Drawing(batch)


_Bodies = dict[str, Callable[[Draws, int], tuple[int, ...]]]


def _prompt(draws: Draws, lengths: Sequence[int], bodies: _Bodies) -> Prompt:
    def made() -> Prompt:
        kind, length = draws.pick(list(bodies)), draws.pick(lengths)
        return Prompt(bodies[kind](draws, length) if length else (), kind)

    return draws.part(made)


def _lengths(max_len: int, boundaries: Iterable[int], shortest: int = 1) -> list[int]:
    """Every length up to the limit, some more often, in rising order: a choice of one shrinks to a shorter one."""
    _positive("max_len", max_len)
    inside = {_positive("a boundary", b) for b in boundaries if b <= max_len}
    ends: list[Collection[int]] = [range(shortest, min(8, max_len) + 1), range(max(1, max_len - 1), max_len + 1)]
    favoured = [(few, 0.2) for few in ends]
    for b in sorted(inside):
        near = {n for at in range(b, max_len + 2, b) for n in (at - 1, at, at + 1) if 1 <= n <= max_len}
        favoured.append((near, 1.5 / len(inside)))
    # shares of the table: 1 for all lengths alike, 0.4 for both ends, 1.5 for the boundaries together
    table = list(range(shortest, max_len + 1))
    for few, share in favoured:
        table += [n for n in few for _ in range(math.ceil(share * max_len / len(few)))]
    return sorted(table)


def _bodies(vocabulary: Vocabulary) -> _Bodies:
    """By kind, what draws n token ids of it; the simplest first, to which a case shrinks."""
    ordinary, special = vocabulary.ordinary, vocabulary.special

    def some(draws: Draws, n: int, ids: Sequence[int]) -> tuple[int, ...]:
        drawn = [draws.pick(ids) for _ in range(min(n, _DRAWN))]
        rest = random.Random(draws.integer(0, 2**32 - 1)).choices(ids, k=n - _DRAWN) if n > _DRAWN else []
        return (*drawn, *rest)

    def repeat(draws: Draws, n: int) -> tuple[int, ...]:
        return _filled(tuple(draws.pick(ordinary) for _ in range(draws.integer(1, 4))), n)

    def sprinkled(draws: Draws, n: int) -> tuple[int, ...]:
        ids = list(some(draws, n, ordinary))
        for _ in range(draws.integer(1, 8)):
            ids[draws.integer(0, n - 1)] = draws.pick(special)
        return tuple(ids)

    def code(draws: Draws, n: int) -> tuple[int, ...]:
        return _filled(draws.pick(vocabulary.code), n)

    def unicode(draws: Draws, n: int) -> tuple[int, ...]:
        texts = [_filled(text, n) for text in vocabulary.text]
        if not vocabulary.unicode or (texts and draws.integer(0, 1)):
            return draws.pick(texts)
        return some(draws, n, vocabulary.unicode)

    def chat(draws: Draws, n: int) -> tuple[int, ...]:
        before, after = draws.pick(vocabulary.chats)
        content = some(draws, max(0, n - len(before) - len(after)), ordinary)
        return (*before, *content, *after)[-n:]  # the end of it, where the model is asked to answer

    bodies: _Bodies = {"repeat": repeat, "random": lambda draws, n: some(draws, n, ordinary)}
    bodies |= {"code": code} if vocabulary.code else {}
    bodies |= {"special": sprinkled} if special else {}
    bodies |= {"unicode": unicode} if vocabulary.unicode or vocabulary.text else {}
    bodies |= {"chat": chat} if vocabulary.chats else {}
    return bodies


def _filled(unit: tuple[int, ...], n: int) -> tuple[int, ...]:
    return (unit * -(-n // len(unit)))[:n]


def _positive(name: str, value: int) -> int:
    bound = at_least(1)
    if not bound.holds(value):
        raise ConfigError(f"{name} is {value!r}. Expected {bound.expected}.")
    return value
