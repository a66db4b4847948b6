"""The same engine otherwise: compiled or not, prompts in chunks or whole, cache blocks of another size.

Each is compared with the one it differs from in that setting alone. What is fixed when an engine is built (how the
model is compiled, how large cache blocks are) takes an engine of its own, one after the other. How many tokens a step
takes in is read at each step: the engine at hand is told another number, and one is built only where it can't be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...engine.offline import BenchEngine, Sampled
from ...errors import ParityError
from .invariances import Ask, Noise, asked, gap_row
from .rows import Row, RowVerdict, not_run
from .settings import TITLES

__all__ = ["chunk_for", "variant_rows"]

_FIXES = {
    "compiled": "enforce_eager: true",
    "chunked_prefill": "enable_chunked_prefill: false",
    "block_size": "another block_size or attention_backend",
}


def variant_rows(
    build: Callable[[Mapping[str, Any]], BenchEngine],
    settings: Mapping[str, Any],
    ask: Ask,
    base: Sequence[Sampled],
    noise: Noise,
    seconds_left: Callable[[], float],
    wanted: Sequence[str],
    *,
    chunked: Sequence[Sampled] | None = None,
    other_block: tuple[list[Sampled], int] | None = None,
) -> Iterator[Row]:
    """``settings``: of the engine that gave ``base`` (eager, block_size, chunk_size); ``build``: one with others.

    ``chunked``: what the engine of ``base`` answers with prompts in chunks of ``chunk_for``. ``other_block``: what an
    eager engine with blocks of another size answered, and that size. Without them an engine is built.
    """
    cost = 0.0
    longest, chunk = chunk_for(ask, settings["chunk_size"])
    words = f"prompts of up to {longest} tokens, {settings['chunk_size']:,} and {chunk} tokens a step"
    at_hand = longest <= chunk or chunked is not None
    to_build = [id for id in wanted if id != "chunked_prefill" or not at_hand]

    def answers(over: Mapping[str, Any]) -> tuple[list[Sampled], int]:
        """What the engine built so answers, and its block size."""
        nonlocal cost
        if seconds_left() < cost:
            raise _NoTime
        start = time.perf_counter()
        engine = build(over)
        try:
            return asked(engine, ask), engine.block_size
        finally:
            engine.close()
            cost = time.perf_counter() - start

    # beside an eager engine the others start in a fraction of the time, and differ in nothing but their own setting
    eager = {"enforce_eager": True}
    beside: Sequence[Sampled] = base
    if not settings["eager"] and to_build:
        try:
            beside, _ = answers(eager)
            if "compiled" in wanted:
                yield _row("compiled", base, beside, noise, "the engine as set, and with enforce_eager")
        except (ParityError, _NoTime) as e:
            yield from (_left_out(id, e) for id in to_build)
            wanted = [id for id in wanted if id not in to_build]
    elif "compiled" in wanted:
        yield not_run("compiled", "invariances", TITLES["compiled"], "the engine is set to run eagerly", needed=False)
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": chunk, "max_num_seqs": min(8, chunk)}
    for id in (id for id in ("chunked_prefill", "block_size") if id in wanted):
        if id == "chunked_prefill" and at_hand:
            if chunked is None:
                yield not_run(
                    id, "invariances", TITLES[id], f"no prompt of more than {chunk} tokens fits", needed=False
                )
            else:
                yield _row(id, base, chunked, noise, words)
            continue
        try:
            if id == "chunked_prefill":
                other, _ = answers(chunks | eager)
            else:
                other, block = other_block or _other_block(answers, settings["block_size"])
                words = f"blocks of {settings['block_size']} and {block} tokens"
            yield _row(id, beside, other, noise, words)
        except (ParityError, _NoTime) as e:
            yield _left_out(id, e)


def chunk_for(ask: Ask, chunk_size: int) -> tuple[int, int]:
    """(longest context, tokens a step is to take in): a third of it, but one a request at least."""
    longest = max(map(len, ask.contexts))
    return longest, max(16, len(ask.contexts), min(chunk_size, longest // 3))


def _other_block(
    answers: Callable[[Mapping[str, Any]], tuple[list[Sampled], int]], block: int
) -> tuple[list[Sampled], int]:
    """Half or twice the size: what the platform's attention takes."""
    for other in (block // 2, block * 2):
        try:
            found = answers({"block_size": other, "enforce_eager": True})
        except ParityError:
            continue
        if found[1] != block:
            return found
    raise _NoOther(f"the engine takes no other block size than {block}")


class _NoOther(ParityError):
    """There is no such engine beside this one."""


class _NoTime(Exception):
    def __str__(self) -> str:
        return "no time left for another engine (--budget)"


def _left_out(id: str, why: Exception) -> Row:
    return not_run(id, "invariances", TITLES[id], str(why).splitlines()[0], needed=not isinstance(why, _NoOther))


def _row(id: str, one: Sequence[Sampled], other: Sequence[Sampled], noise: Noise, words: str) -> Row:
    row = gap_row(id, TITLES[id], one, other, noise, words, _FIXES[id])
    assert row.verdict in (RowVerdict.PASS, RowVerdict.FAIL)
    return row
