"""The same engine built otherwise: compiled or not, prompts in chunks or whole, cache blocks of another size.

Each is an engine of its own, one after the other, and is compared with the one it differs from in that setting alone.
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

__all__ = ["variant_rows"]

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
) -> Iterator[Row]:
    """``settings``: of the engine that gave ``base`` (eager, block_size, chunk_size); ``build``: one with others."""
    cost = 0.0

    def answers(over: Mapping[str, Any]) -> tuple[list[Sampled], dict[str, int]]:
        nonlocal cost
        if seconds_left() < cost:
            raise _NoTime
        start = time.perf_counter()
        engine = build(over)
        try:
            return asked(engine, ask), {"block": engine.block_size, "chunk": engine.chunk_size}
        finally:
            engine.close()
            cost = time.perf_counter() - start

    # beside an eager engine the others start in a fraction of the time, and differ in nothing but their own setting
    eager = {"enforce_eager": True}
    beside: Sequence[Sampled] = base
    if not settings["eager"]:
        try:
            beside, _ = answers(eager)
            if "compiled" in wanted:
                yield _row("compiled", base, beside, noise, "the engine as set, and with enforce_eager")
        except (ParityError, _NoTime) as e:
            yield from (_left_out(id, e) for id in wanted)
            return
    elif "compiled" in wanted:
        yield not_run("compiled", "invariances", TITLES["compiled"], "the engine is set to run eagerly", needed=False)
    longest = max(map(len, ask.contexts))
    chunk = max(ask_width(ask), min(settings["chunk_size"], longest // 3))
    others: list[tuple[str, dict[str, Any], str]] = [
        (
            "chunked_prefill",
            {"enable_chunked_prefill": True, "max_num_batched_tokens": chunk, "max_num_seqs": min(8, chunk)},
            f"prompts of up to {longest} tokens, {settings['chunk_size']:,} and {chunk} tokens a step",
        ),
        ("block_size", {}, ""),
    ]
    for id, over, words in others:
        if id not in wanted:
            continue
        if id == "chunked_prefill" and longest <= chunk:
            yield not_run(id, "invariances", TITLES[id], f"no prompt of more than {chunk} tokens fits", needed=False)
            continue
        try:
            if id == "block_size":
                other, seen = _other_block(answers, settings["block_size"])
                words = f"blocks of {settings['block_size']} and {seen['block']} tokens"
            else:
                other, _ = answers(over | eager)
            yield _row(id, beside, other, noise, words)
        except (ParityError, _NoTime) as e:
            yield _left_out(id, e)


def ask_width(ask: Ask) -> int:
    """The least tokens a step must take in: one a request."""
    return max(16, len(ask.contexts))


def _other_block(
    answers: Callable[[Mapping[str, Any]], tuple[list[Sampled], dict[str, int]]], block: int
) -> tuple[list[Sampled], dict[str, int]]:
    """Half or twice the size: what the platform's attention takes."""
    for other in (block // 2, block * 2):
        try:
            found = answers({"block_size": other, "enforce_eager": True})
        except ParityError:
            continue
        if found[1]["block"] != block:
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
