"""Prompts to try an engine with: hypothesis strategies over a tokenizer's own vocabulary, and a user's own file.

    vocabulary = Vocabulary.of(tokenizer)
    strategy = batches(vocabulary, max_len=4096, boundaries=(16, 2048), max_batch=8)
    for batch in draw(strategy, 50, seed=0):
        if fails(batch):
            small = shrink(strategy, fails, seed=0, budget_seconds=60, start=batch)
            print(Case(small).to_text())

A prompt is token ids, never text: a text goes through a tokenizer that maps many texts to few of its tokens. Lengths
lean on the places where an engine changes what it does (a new KV block, the next chunk of a prefill, the context
limit), one token before, at and after each. Needs hypothesis (the extra ``preflight``) from the strategies on;
``Vocabulary``, ``Case`` and ``read_jsonl`` do without.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from ...errors import ConfigError
from .cases import Prompt, Vocabulary

__all__ = ["batches", "draw", "prompts", "shrink", "stream"]

try:
    import hypothesis
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky, HypothesisWarning, NoSuchExample
    from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS
except ImportError as e:
    raise ConfigError(
        f"drawing prompts needs hypothesis >= 6.140, which can't be imported ({e}). "
        "Run: pip install 'trl-parity[preflight]'."
    ) from e

T = TypeVar("T")

_DRAWN = 16  # tokens of a prompt that are drawn one by one, so that they can shrink; the rest comes from a seed

_ROUND = 64  # examples of one run of hypothesis

# ---- strategies -----------------------------------------------------------------------------------------------------


def prompts(vocabulary: Vocabulary, max_len: int, boundaries: Iterable[int] = ()) -> st.SearchStrategy[Prompt]:
    """One prompt of 1 to ``max_len`` tokens.

    ``boundaries``: lengths at whose multiples the engine does something new, as the KV block size and
    ``max_num_batched_tokens``; half of all prompts are one token shorter than a multiple, at it, or one longer.
    Shrinks to a short repeat of the smallest ids.
    """
    lengths, bodies = _lengths(max_len, boundaries), _bodies(vocabulary)

    @st.composite
    def prompt(draw: st.DrawFn) -> Prompt:
        return _prompt(draw, lengths, bodies)

    return prompt()


def batches(
    vocabulary: Vocabulary, max_len: int, boundaries: Iterable[int] = (), max_batch: int = 8
) -> st.SearchStrategy[tuple[Prompt, ...]]:
    """1 to ``max_batch`` prompts: of any lengths and kinds, all the same one, or behind one shared prefix.

    A shared prefix has a length of its own, at a block's end as often as not; a tail may be empty, so that one prompt
    is the beginning of another. Kinds are then ``shared+<kind>``.
    """
    lengths, bodies = _lengths(max_len, boundaries := tuple(boundaries)), _bodies(vocabulary)
    tails = _lengths(max_len, boundaries, shortest=0)
    _positive("max_batch", max_batch)

    @st.composite
    def batch(draw: st.DrawFn) -> tuple[Prompt, ...]:
        # Every shape draws prompts in the same way, so that one shape can shrink to another.
        shape, count = draw(st.sampled_from(("mixed", "same", "shared"))), draw(st.integers(1, max_batch))
        first = _prompt(draw, lengths, bodies)
        if shape == "same":
            return (first,) * count
        if shape == "mixed":
            return (first, *(_prompt(draw, lengths, bodies) for _ in range(count - 1)))
        room = max_len - len(first.ids)
        drawn = [_prompt(draw, tails, bodies) for _ in range(count)]
        return tuple(Prompt(first.ids + tail.ids[:room], f"shared+{tail.kind}") for tail in drawn)

    return batch()


_Bodies = dict[str, Callable[[st.DrawFn, int], tuple[int, ...]]]


def _prompt(draw: st.DrawFn, lengths: st.SearchStrategy[int], bodies: _Bodies) -> Prompt:
    kind = draw(st.sampled_from(list(bodies)))
    length = draw(lengths)
    return Prompt(bodies[kind](draw, length) if length else (), kind)


def _lengths(max_len: int, boundaries: Iterable[int], shortest: int = 1) -> st.SearchStrategy[int]:
    """Of every length up to the limit, some more often. One choice in rising order: it shrinks like a whole number."""
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
    return st.sampled_from(sorted(table))


def _bodies(vocabulary: Vocabulary) -> _Bodies:
    """By kind, what draws n token ids of it; the simplest first, to which a case shrinks."""
    ordinary, special = st.sampled_from(vocabulary.ordinary), vocabulary.special
    seeds = st.integers(0, 2**32 - 1)

    def some(draw: st.DrawFn, n: int, ids: Sequence[int]) -> tuple[int, ...]:
        drawn = draw(st.lists(st.sampled_from(ids), min_size=min(n, _DRAWN), max_size=min(n, _DRAWN)))
        rest = random.Random(draw(seeds)).choices(ids, k=n - _DRAWN) if n > _DRAWN else []
        return (*drawn, *rest)

    def repeat(draw: st.DrawFn, n: int) -> tuple[int, ...]:
        return _filled(tuple(draw(st.lists(ordinary, min_size=1, max_size=4))), n)

    def sprinkled(draw: st.DrawFn, n: int) -> tuple[int, ...]:
        ids = list(some(draw, n, vocabulary.ordinary))
        for at in draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8)):
            ids[at] = draw(st.sampled_from(special))
        return tuple(ids)

    def code(draw: st.DrawFn, n: int) -> tuple[int, ...]:
        return _filled(draw(st.sampled_from(vocabulary.code)), n)

    def unicode(draw: st.DrawFn, n: int) -> tuple[int, ...]:
        texts = [_filled(text, n) for text in vocabulary.text]
        if not vocabulary.unicode or (texts and draw(st.booleans())):
            return draw(st.sampled_from(texts))
        return some(draw, n, vocabulary.unicode)

    def chat(draw: st.DrawFn, n: int) -> tuple[int, ...]:
        before, after = draw(st.sampled_from(vocabulary.chats))
        content = some(draw, max(0, n - len(before) - len(after)), vocabulary.ordinary)
        return (*before, *content, *after)[-n:]  # the end of it, where the model is asked to answer

    bodies = {"repeat": repeat, "random": lambda draw, n: some(draw, n, vocabulary.ordinary)}
    bodies |= {"code": code} if vocabulary.code else {}
    bodies |= {"special": sprinkled} if special else {}
    bodies |= {"unicode": unicode} if vocabulary.unicode or vocabulary.text else {}
    bodies |= {"chat": chat} if vocabulary.chats else {}
    return bodies


def _filled(unit: tuple[int, ...], n: int) -> tuple[int, ...]:
    return (unit * -(-n // len(unit)))[:n]


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}. Expected a whole number >= 1.")
    return value


# ---- running a strategy ---------------------------------------------------------------------------------------------


def stream(strategy: st.SearchStrategy[T], seed: int | str) -> Iterator[T]:
    """Endless independent draws, the same for one seed in every process; the first is the simplest there is.

    (For one version of hypothesis.) Values may repeat where the strategy has few.
    """
    for number in range(1 << 62):
        found: list[T] = []

        def collect(value: T, found: list[T] = found) -> bool:
            found.append(value)
            if len(found) == _ROUND:
                raise _Over
            return False

        _find(strategy, collect, f"{seed}:{number}", shrinking=False)
        if not found:
            raise ConfigError("the strategy gave no example. Expected one that can be satisfied.")
        yield from found[min(number, 1, len(found) - 1) :]  # every round begins with the simplest example


def draw(strategy: st.SearchStrategy[T], n: int, seed: int | str) -> list[T]:
    """The first ``n`` of ``stream``."""
    return list(islice(stream(strategy, seed), n))


def shrink(
    strategy: st.SearchStrategy[T],
    fails: Callable[[T], bool],
    seed: int | str,
    budget_seconds: float,
    start: T | None = None,
) -> T:
    """The smallest failing value that hypothesis finds within the time.

    ``start``: a value that ``draw`` gave for the same strategy and seed, and that fails; those before it are
    passed over without asking ``fails``. Without it the first failing draw is looked for. ``fails`` is asked once a
    value, and not after the time is up (a call under way is waited for); what it raises ends the search. Returns
    ``start`` where nothing smaller fails. Raises ConfigError where nothing fails at all.
    """
    ends = time.monotonic() + budget_seconds
    known: dict[T, bool] = {}
    best: list[T] = []
    broke: list[Exception] = []

    def failing(value: T) -> bool:
        if not best and start is not None and value != start:
            return False
        if value not in known:
            if value != start and time.monotonic() >= ends:
                raise _Over
            try:
                known[value] = value == start or bool(fails(value))
            except Exception as e:  # hypothesis would take it for a failure to shrink
                broke.append(e)
                raise _Over from e
        if known[value]:
            best[:] = [value]
        return known[value]

    number = 0
    while not best and not broke and (time.monotonic() < ends or not number):
        _find(strategy, failing, f"{seed}:{number}", shrinking=True)
        number += 1
    if broke:
        raise broke[0]
    if best:
        return best[0]
    if start is not None:
        return start
    raise ConfigError(f"no draw of seed {seed} failed within {budget_seconds:g} s. Expected a case that fails.")


class _Over(BaseException):
    """Ends a run of hypothesis at once: it takes an Exception for a failure of what is tried."""


def _find(strategy: st.SearchStrategy[T], condition: Callable[[T], bool], seed: str, *, shrinking: bool) -> None:
    """Let hypothesis look for a value that meets the condition, which keeps what it has seen."""
    AVAILABLE_PROVIDERS["trl-parity"] = "trl_parity.preflight.prompts.draws.PlainDraws"
    phases = [hypothesis.Phase.generate] + ([hypothesis.Phase.shrink] if shrinking else [])
    settings = hypothesis.settings(
        max_examples=_ROUND + 1, database=None, deadline=None, derandomize=False, phases=phases, backend="trl-parity",
        verbosity=hypothesis.Verbosity.quiet, print_blob=False,
    )  # fmt: skip
    # Flaky: a value that failed, and passed when it was run again; whoever asks keeps what failed
    with contextlib.suppress(_Over, NoSuchExample, Flaky), warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # of long prompts in its own report, which nobody sees
        hypothesis.find(strategy, condition, settings=settings, random=random.Random(seed))
