"""Wrapping TRL's trainer classes, once and reversibly, and finding the callback that wants the rollouts.

A trainer without an observer among its callbacks pays one look through that list per call. Subclasses that call
``super()`` are covered, those that replace a wrapped method are not: the callback notices at the first step.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from ..errors import InterceptionError

if TYPE_CHECKING:
    from ..engine.handle import EngineHandle
    from .capture import Capture, MeasurementSettings
    from .engine_args import TRLEngineArguments

Wrapper = tuple[type, str, Callable[..., Any]]  # class, method name, wrapper that takes the original first

TESTED_TRL = ("1.0", "1.6", "1.12", "1.16")  # minor versions that benchmarks/trl_range.py passes with

# tap -> the module that defines the trainer it wraps; it is wrapped once somebody has imported it
_TAPS = {
    "grpo": "trl.trainer.grpo_trainer",
    "rloo": "trl.trainer.rloo_trainer",
    "ppo": "trl.experimental.ppo.ppo_trainer",
    "async_grpo": "trl.experimental.async_grpo.async_grpo_trainer",
}

_originals: dict[tuple[type, str], Callable[..., Any]] = {}


class Observer(ABC):
    """Base of callbacks that are handed rollouts."""

    measurement: MeasurementSettings
    accumulated = 0  # micro-batches whose gradient waits for the update
    engine_handle: EngineHandle  # of the run
    engine_request: TRLEngineArguments | None = None  # what an engine that TRL builds for the trainer has to get

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


def instrument() -> set[str]:
    """Wrap the rollout methods of every supported TRL trainer class imported so far. Idempotent.

    Returns the taps that were not wrapped before.
    Raises InterceptionError where the installed TRL lacks a method that has to be wrapped.
    """
    new = set()
    for tap, trainer_module in _TAPS.items():
        if trainer_module not in sys.modules or any(cls.__module__ == trainer_module for cls, _ in _originals):
            continue
        _warn_untested()
        found = list(importlib.import_module(f".{tap}", __package__).wrappers())
        for cls, name, _ in found:
            if name not in cls.__dict__:
                raise _moved(cls, name)
        for cls, name, wrapper in found:
            _originals[cls, name] = original = cls.__dict__[name]
            setattr(cls, name, _wrapped(original, wrapper))
        new.add(tap)
    return new


def require_attributes(owner: Any, names: Iterable[str]) -> None:
    """Raise InterceptionError for the first private name that this TRL has moved."""
    for name in names:
        if not hasattr(owner, name):
            raise _moved(type(owner), name)


def _moved(cls: type, name: str) -> InterceptionError:
    import trl

    return InterceptionError(
        f"{cls.__name__} of trl {trl.__version__} has no {name!r}, which trl-parity needs. Expected a trl it was "
        f"tested with: {', '.join(TESTED_TRL)}. Pin one of these."
    )


def _warn_untested() -> None:
    import trl

    oldest, *_, newest = (Version(version) for version in TESTED_TRL)
    minor = Version(".".join(trl.__version__.split(".")[:2]))
    if not oldest <= minor <= newest and not _originals:
        warnings.warn(
            f"trl {trl.__version__} was not tested with trl-parity (tested: {', '.join(TESTED_TRL)}), which wraps "
            "private methods of the trainers. Should the first step report that no rollout was seen, pin a tested "
            "version.",
            stacklevel=4,
        )


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
