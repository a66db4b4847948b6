"""Wrapping TRL's trainer classes, once and reversibly, and finding the callback that wants the rollouts.

A trainer without an observer among its callbacks pays one look through that list per call. Subclasses that call
``super()`` are covered, those that replace a wrapped method are not: the callback notices at the first step.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from ..engine.live import Request
    from ..recompute import CompletionScorer, CompletionScores
    from ..records import RolloutBatch, SamplingSettings, ScoredBatch

TESTED_TRL = ("1.16",)  # minor versions that the real runs in tests/ were made with
_originals: dict[tuple[type, str], Callable[..., Any]] = {}


class Capture(Protocol):
    """One generation batch, just made. Nothing is computed before ``rollout`` and ``score`` are called."""

    trainer: Any
    training: bool
    sampling: SamplingSettings
    step: int  # optimizer steps done
    last_in_step: bool  # no further generation before the next optimizer step
    requests: list[Request]  # what was really sent to the engine, and until it is measured what came back
    batch_seconds: float  # host seconds that generating and scoring took the trainer
    generation_period: int  # optimizer steps that one generation batch feeds
    output: dict[str, Any]  # the trainer's batch

    @property
    def engine_temperatures(self) -> list[float]:
        """The temperature of each call the engine got, from what was really sent."""

    @property
    def sharded(self) -> bool:
        """Whether the policy's weights may be spread over ranks, so that a pass over it is a collective."""

    @property
    def seconds(self) -> float:
        """Host seconds the scoring took inside the trainer's own pass."""

    def rollout(self) -> RolloutBatch:
        """What the engine handed over. Raises InterceptionError or DataError."""

    def score(self, rollout: RolloutBatch, token_budget: int) -> ScoredBatch:
        """The trainer's side of it; runs a forward of its own only where the trainer made none."""

    def rows_within(self, rollout: RolloutBatch, token_budget: int) -> torch.Tensor:
        """Rows of the batch that fit a budget of tokens."""

    def forward(
        self,
        rollout: RolloutBatch,
        rows: torch.Tensor,
        *,
        batch_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> CompletionScores:
        """Scores of some rows from a no-grad pass of our own."""

    def run_policy(
        self, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None = None
    ) -> torch.Tensor:
        """The trainer's own no-grad pass over given sequences: log-probs (B, keep) of its own head."""

    def rewards(self) -> list[float]:
        """Rewards of this batch over all ranks, the same on each; NaN where none was given."""


class Observer(ABC):
    """Base of callbacks that are handed rollouts."""

    @abstractmethod
    def observes(self, training: bool) -> bool:
        """Whether training (or evaluation) rollouts are wanted."""

    @abstractmethod
    def scorer(
        self,
        model: Any,
        logits_to_keep: int,
        temperature: float,
        sampling: SamplingSettings,
        logits_dtype: torch.dtype | None = None,
    ) -> CompletionScorer:
        """A scorer for one pass over the policy."""

    @abstractmethod
    def on_generation(self, capture: Capture) -> None:
        """Called right after a batch was generated, before anything is learned from it."""

    @abstractmethod
    def on_update(self, new: Any, old: Any, mask: Any) -> None:
        """Called at each loss with log-probs (B, C) of the training policy and of the one that generated."""


def observer_of(trainer: Any) -> Observer | None:
    """The first observer among the trainer's callbacks, or None."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Observer):
            return callback
    return None


def instrument() -> None:
    """Wrap the rollout methods of TRL's trainer classes. Idempotent."""
    if _originals:
        return
    import trl

    from . import grpo

    if ".".join(trl.__version__.split(".")[:2]) not in TESTED_TRL:
        warnings.warn(
            f"trl {trl.__version__} was not tested with trl-parity (tested: {', '.join(TESTED_TRL)}), which wraps "
            "private methods of the trainers. Should the first step report that no rollout was seen, pin a tested "
            "version.",
            stacklevel=3,
        )
    for cls, name, wrapper in list(grpo.wrappers()):
        _originals[cls, name] = original = cls.__dict__[name]
        setattr(cls, name, _wrapped(original, wrapper))


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    return method


def original(cls: type, name: str) -> Callable[..., Any]:
    """TRL's own method behind a wrapped one, as ``cls`` would find it."""
    for base in cls.__mro__:
        if (base, name) in _originals:
            return _originals[base, name]
    raise KeyError(f"{cls.__name__}.{name} is not instrumented")


def uninstrument() -> None:
    """Put TRL's own methods back. Idempotent."""
    while _originals:
        (cls, name), method = _originals.popitem()
        setattr(cls, name, method)
