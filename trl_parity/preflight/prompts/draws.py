"""Values made of a few random choices: drawn from a seed alone, and shrunk by making the choices fewer and smaller.

    small = Drawing(lambda draws: [draws.integer(0, 9) for _ in range(draws.integer(0, 5))])
    draw(small, 3, seed=0)  # the same in every process

A choice is a whole number within bounds, and 0, the lowest, is the simplest. A value is replayed from its choices:
those beyond a bound are cut to it, missing ones are the simplest. So any shorter or smaller list of choices makes a
value, and mostly a simpler one.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Generic, TypeVar

from ...errors import ConfigError

__all__ = ["Drawing", "Draws", "draw", "shrink", "stream"]

T = TypeVar("T", bound=Hashable)
X = TypeVar("X")

_WIDE = 1 << 20  # a choice among more is a seed: another one is not simpler for being smaller


class Draws(ABC):
    """What a value is made of. ``integer`` is all that a source of choices has to give."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """One of ``low`` to ``high``, each alike."""

    def part(self, make: Callable[[], X]) -> X:
        """What ``make`` draws, as a part that may be left out as a whole."""
        return make()

    def pick(self, options: Sequence[X]) -> X:
        """One of them; the first is the simplest."""
        return options[self.integer(0, len(options) - 1)]


@dataclass(frozen=True, slots=True)
class Drawing(Generic[T]):
    """How one value is made."""

    make: Callable[[Draws], T]

    def hypothesis(self) -> Any:
        """The same as a strategy for property-based tests. Needs hypothesis (the extra ``preflight``)."""
        try:
            from hypothesis import strategies as st
        except ImportError as e:
            raise ConfigError(
                f"drawing prompts as a strategy needs hypothesis, which can't be imported ({e}). "
                "Run: pip install 'trl-parity[preflight]'."
            ) from e

        class Drawn(Draws):
            def __init__(self, given: st.DrawFn):
                self._given = given

            def integer(self, low: int, high: int) -> int:
                return self._given(st.integers(low, high))

        @st.composite
        def made(given: st.DrawFn) -> T:
            return self.make(Drawn(given))

        return made()


class _Choices(Draws):
    """Choices replayed, then drawn, or the simplest; all of them noted, and where parts begin and end."""

    def __init__(self, given: Sequence[int] = (), rng: random.Random | None = None):
        self._given, self._rng = given, rng
        self.made: list[int] = []
        self.widths: list[int] = []
        self.parts: list[tuple[int, int]] = []

    def integer(self, low: int, high: int) -> int:
        at = len(self.made)
        if at < len(self._given):
            choice = min(self._given[at], high - low)
        else:
            choice = 0 if self._rng is None else self._rng.randint(0, high - low)
        self.made.append(choice)
        self.widths.append(high - low)
        return low + choice

    def part(self, make: Callable[[], X]) -> X:
        start = len(self.made)
        value = make()
        self.parts.append((start, len(self.made)))
        return value


def stream(drawing: Drawing[T], seed: int | str) -> Iterator[T]:
    """Endless independent draws, the same for one seed in every process; the first is the simplest there is."""
    return (value for value, _ in _drawn(drawing, seed))


def draw(drawing: Drawing[T], n: int, seed: int | str) -> list[T]:
    """The first ``n`` of ``stream``."""
    return list(islice(stream(drawing, seed), n))


def _drawn(drawing: Drawing[T], seed: int | str) -> Iterator[tuple[T, _Choices]]:
    for number in count():
        choices = _Choices(rng=random.Random(f"{seed}:{number}") if number else None)
        yield drawing.make(choices), choices


def shrink(
    drawing: Drawing[T],
    fails: Callable[[T], bool],
    seed: int | str,
    budget_seconds: float,
    start: T | None = None,
) -> T:
    """The smallest failing value found within the time.

    ``start``: a value that ``draw`` gave for the same drawing and seed, and that fails; those before it are
    passed over without asking ``fails``. Without it the first failing draw is looked for. ``fails`` is asked once a
    value, and not after the time is up (a call under way is waited for); what it raises ends the search. Returns
    ``start`` where nothing smaller fails. Raises ConfigError where nothing fails at all.
    """
    search = _Search(drawing, fails, time.monotonic() + budget_seconds)
    for value, choices in _drawn(drawing, seed):
        if search.over:
            break
        if value == start or (start is None and search.asked(value)):
            search.best, search.choices = value, choices
            search.known[value] = True
            search.run()
            return search.best
    if start is not None:
        return start
    raise ConfigError(f"no draw of seed {seed} failed within {budget_seconds:g} s. Expected a case that fails.")


class _Search(Generic[T]):
    """From one failing value to simpler ones: fewer choices, else smaller ones."""

    best: T
    choices: _Choices

    def __init__(self, drawing: Drawing[T], fails: Callable[[T], bool], ends: float):
        self._drawing, self._fails, self._ends = drawing, fails, ends
        self.known: dict[T, bool] = {}

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._ends

    def asked(self, value: T) -> bool:
        """Whether it fails; no, when the time is up."""
        if value not in self.known:
            if self.over:
                return False
            self.known[value] = bool(self._fails(value))
        return self.known[value]

    def run(self) -> None:
        """Until nothing gets simpler."""
        before: list[int] = []
        while before != self.choices.made and not self.over:
            before = self.choices.made
            for start, end in reversed(self.choices.parts):
                self._try([*self.choices.made[:start], *self.choices.made[end:]])
            self._shorten()
            at = 0
            while at < len(self.choices.made) and not self.over:
                self._lower(at)
                at += 1

    def _try(self, given: Sequence[int]) -> bool:
        """Take over the value of these choices if it is simpler and fails."""
        choices = _Choices(given)
        value = self._drawing.make(choices)
        now = self.choices.made
        if (len(choices.made), choices.made) >= (len(now), now) or not self.asked(value):
            return False
        self.best, self.choices = value, choices
        return True

    def _shorten(self) -> None:
        """The fewest first choices after which all may be the simplest, found by halving."""
        low, high = -1, len(self.choices.made)
        while high - low > 1:
            middle = (low + high) // 2
            given = self.choices.made[:middle]
            simplest = not any(self.choices.made[middle:])
            low, high = (low, middle) if simplest or self._try(given) else (middle, high)

    def _lower(self, at: int) -> None:
        """One choice as low as it goes: 0, else by halving."""

        def lowered(to: int) -> bool:
            return self._try([*self.choices.made[:at], to, *self.choices.made[at + 1 :]])

        if not self.choices.made[at] or lowered(0) or self.choices.widths[at] > _WIDE:
            return
        low, high = 0, self.choices.made[at]
        while high - low > 1 and at < len(self.choices.made):
            middle = (low + high) // 2
            low, high = (low, middle) if lowered(middle) else (middle, high)
