"""Every stage of ours inside a training run, and what its failure comes to: none ends a run or passes for health.

==========  ====================================================================================================
measuring   the window at hand is ERROR, on every rank: the failure is counted in its sums before they are reduced
judging     the window at hand is ERROR, on every rank: they agree on it before anything follows from the verdict
telling     one warning; what was judged, and what follows from it, stands. So with what is only looked at beside
            the mismatch: without a noise floor windows stay CALIBRATING, without a diagnosis a halt has no name
==========  ====================================================================================================

What is meant to be said before the first step (``ConfigError``, ``InterceptionError``) is raised, as is a failure to
drop the gradient of a condemned batch.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from ..collectives import together

__all__ = ["STAGES", "Kind", "Stages"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Kind(enum.StrEnum):
    """What a stage does."""

    MEASURING = "measuring"
    JUDGING = "judging"
    TELLING = "telling"


# by kind each stage, and in words what its failure is; nothing else can be begun
_WORDS = {
    Kind.MEASURING: {
        "rollout": "the rollout could not be read",
        "scores": "the rollout could not be scored",
        "sums": "the batch could not be summed up",
        "policy drift": "the policy drift could not be measured",
    },
    Kind.JUDGING: {
        "statistics": "the window's statistics could not be made",
        "verdict": "the window could not be judged",
    },
    Kind.TELLING: {
        "readings": "temperature or caches cannot be watched",
        "rewards": "rewards cannot be watched",
        "weights": "what the weights are could not be kept for a diagnosis",
        "frozen weights": "the frozen weights cannot be watched",
        "teacher": "the teacher's answers cannot be watched",
        "engine settings": "the engine's settings could not be looked at",
        "noise floor": "the noise floor could not be measured",
        "floor in force": "the noise floor could not be taken over",
        "all tokens": "what a sample was scored of could not be scored in full",
        "head share": "the share of the tokens to score could not be told",
        "diagnosis": "the drift could not be diagnosed",
        "engine arguments": "what the engine was given could not be compared",
        "panels": "the tracker's axes or panels could not be made",
        "console": "the console could not be shortened",
        "start": "the run could not be announced",
        "surroundings": "what the run runs on could not be told",
        "traps": "the settings could not be checked",
        "run file": "run.json was not written",
        "windows file": "the window could not be written",
        "tokens file": "the window's tokens could not be written",
        "last files": "the run's files could not be closed",
        "rewards file": "the run's rewards were not kept",
        "merged windows": "the window is missing in the trainer's log",
        "tables": "the window's tokens could not be shown",
        "tracker": "a tracker could not be told",
        "alert": "an alert could not be sent",
        "incident": "the incident could not be kept",
        "text": "the text of the window could not be made",
        "line": "the window could not be told",
        "advice": "the advice on the settings could not be told",
        "row": "the trainer's log lacks a row of ours",
        "evaluation": "the evaluation could not be told",
        "reminder": "dropped updates could not be told",
        "checkpoint": "the checkpoint lacks our state",
        "ending": "the run's end could not be told",
    },
}

STAGES = {name: kind for kind, words in _WORDS.items() for name in words}


class Stages:
    """The stages of one run, on one rank.

    ``unmeasured``, ``unjudged``: what failed so since ``forget`` in words, the last of it; "" where nothing did.
    """

    def __init__(self) -> None:
        self.unmeasured = self.unjudged = ""
        self._told: set[str] = set()

    def begins(self, name: str) -> None:
        """A stage begins: whatever takes its failure is there."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The block is this stage: what it raises comes to what its kind says, and the run goes on behind it."""
        self.begins(name)
        try:
            yield
        except Exception as e:
            self.failed(name, e)

    def together(self, name: str, ranks: int, work: Callable[[], T]) -> T | None:
        """The result of what ranks do together; None on all where it failed on one. Every rank must call it."""

        def begun() -> T:
            self.begins(name)
            return work()

        try:
            return together(begun, ranks)
        except Exception as e:
            self.failed(name, e)
            return None

    def failed(self, name: str, error: Exception) -> None:
        """Take a failure for what it comes to; it is said once a stage."""
        kind, words = STAGES[name], f"{type(error).__name__}: {error}"
        if kind is Kind.MEASURING:
            self.unmeasured = words
        elif kind is Kind.JUDGING:
            self.unjudged = words
        level = logging.DEBUG if name in self._told else logging.WARNING
        self._told.add(name)
        with suppress(Exception):  # nobody is there to be told, as where stderr is gone
            logger.log(level, "%s: %s", _WORDS[kind][name], words)
            logger.debug("%s", name, exc_info=error)

    def forget(self) -> None:
        """The window is over."""
        self.unmeasured = self.unjudged = ""
