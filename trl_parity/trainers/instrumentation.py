"""Wrapping TRL's trainer classes, once and reversibly, and finding the callback that wants the rollouts.

A trainer without an observer among its callbacks pays one look through that list per call. Subclasses that call
``super()`` are covered, those that replace a wrapped method are not: the callback notices at the first step. Other
libraries may wrap what is wrapped here, be wrapped, or put a class of their own in the place of TRL's.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from ..errors import ConfigError, InterceptionError

if TYPE_CHECKING:
    from ..engine.handle import EngineHandle
    from .capture import Capture, MeasurementSettings
    from .engine_args import TRLEngineArguments

Wrapper = tuple[type, str, Callable[..., Any]]  # class, method name, wrapper that takes the original first

TESTED_TRL = ("1.0", "1.6", "1.12", "1.16")  # minor versions that benchmarks/stack_range.py passes with

# tap -> the module that defines the trainer it wraps; it is wrapped once somebody has imported it
_TAPS = {
    "grpo": "trl.trainer.grpo_trainer",
    "rloo": "trl.trainer.rloo_trainer",
    "ppo": "trl.experimental.ppo.ppo_trainer",
    "async_grpo": "trl.experimental.async_grpo.async_grpo_trainer",
    "distillation": "trl.trainer.distillation_trainer",
    "sdft": "trl.experimental.sdft.sdft_trainer",
    "sdpo": "trl.experimental.sdpo.sdpo_trainer",
    "gold": "trl.experimental.gold.gold_trainer",
    "iw_opd": "trl.experimental.iw_opd.iw_opd_trainer",
}

# arguments -> the trainer that takes them; a trainer's subclass takes these or a subclass of them
_MEASURED = {
    "GRPOConfig": "GRPOTrainer", "RLOOConfig": "RLOOTrainer", "DistillationConfig": "DistillationTrainer",
    "SDFTConfig": "SDFTTrainer", "SDPOConfig": "SDPOTrainer", "GOLDConfig": "GOLDTrainer",
    "IWOPDConfig": "IWOPDTrainer", "AsyncGRPOConfig": "AsyncGRPOTrainer", "PPOConfig": "PPOTrainer",
}  # fmt: skip

_wraps: list[_Wrap] = []  # in the order they were laid on


class Observer(ABC):
    """Base of callbacks that are handed rollouts."""

    measurement: MeasurementSettings
    head_share = 1.0  # of the tokens of a batch, wanted of the fp32 head
    accumulated = 0  # micro-batches whose gradient waits for the update
    engine_handle: EngineHandle  # of the run
    engine_request: TRLEngineArguments | None = None  # what an engine that TRL builds for the trainer has to get

    @abstractmethod
    def on_generation(self, capture: Capture) -> None:
        """Called right after a batch was generated, before anything is learned from it."""

    @abstractmethod
    def on_update(self, new: Any, old: Any, mask: Any) -> None:
        """Called at each loss with log-probs (B, C) of the training policy and of the one that generated."""

    def before_update(self) -> bool:
        """Called before each optimizer step, on every rank: whether the update may not be applied."""
        return False


def observer_of(trainer: Any) -> Observer | None:
    """The observer among the trainer's callbacks, or None. Raises ConfigError for more than one."""
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Observer)]
    if len(found) > 1:
        raise ConfigError(
            f"the trainer has {len(found)} ParityCallbacks. Expected one: the first alone would see the rollouts. "
            "Take the others out of callbacks=, or trainer.remove_callback them."
        )
    return found[0] if found else None


def instrument() -> set[str]:
    """Wrap the rollout methods of every supported TRL trainer class imported so far. Idempotent.

    A method is wrapped where the class that TRL's module holds finds it, and where its bases do; again only where
    something else has been put over it since. Returns the taps that were not wrapped before.
    Raises InterceptionError where the installed TRL lacks a method that has to be wrapped.
    """
    before = {wrap.tap for wrap in _wraps}
    for tap, trainer_module in _TAPS.items():
        if trainer_module not in sys.modules:
            continue
        _warn_untested()
        found = list(importlib.import_module(f".{tap}", __package__).wrappers())
        owners = [(owner, name, wrapper) for cls, name, wrapper in found for owner in _owners(cls, name)]
        ours = [wrap.method for wrap in _wraps]
        for owner, name, wrapper in owners:
            if vars(owner)[name] not in ours:
                _wraps.append(_Wrap(tap, owner, name, wrapper))
    return {wrap.tap for wrap in _wraps} - before


class _Wrap:
    """One method of one class with a wrapper around it."""

    def __init__(self, tap: str, cls: type, name: str, wrapper: Callable[..., Any]):
        self.tap, self._cls, self._name = tap, cls, name
        self._active = True
        self._original = original = vars(cls)[name]

        @functools.wraps(original)
        def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
            # inside another wrapper of the same call (of a base, or under another library's), this one lets through
            running = _running.setdefault(name, set())
            if not self._active or id(owner) in running:
                return original(owner, *args, **kwargs)
            running.add(id(owner))
            try:
                return wrapper(original, owner, *args, **kwargs)
            finally:
                running.discard(id(owner))

        self.method = method
        setattr(cls, name, method)

    def undo(self) -> None:
        """Take it off; where another library has wrapped it, it stays there and does nothing."""
        self._active = False
        if vars(self._cls).get(self._name) is self.method:
            setattr(self._cls, self._name, self._original)


_running: dict[str, set[int]] = {}  # whose method of that name is in a wrapper


def _owners(cls: type, name: str) -> list[type]:
    """The class that a method is found in, and TRL's own where that is another library's over it.

    Raises InterceptionError where TRL has no such method.
    """
    owners = [base for base in cls.__mro__ if name in vars(base)]
    if not owners or owners[0].__module__.startswith(("transformers.", "torch.")):
        raise moved(cls, name)
    return [base for base in owners if base is owners[0] or base.__module__.startswith("trl.")]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside the block."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def require_measured(args: Any) -> None:
    """Raise InterceptionError for arguments of a TRL trainer that nothing is known of: anything else passes."""
    theirs = [cls.__name__ for cls in type(args).__mro__ if cls.__module__.startswith("trl.")]
    if theirs and not any(name in _MEASURED for name in theirs):
        raise InterceptionError(
            f"what a trainer with {theirs[0]} samples can't be measured. Expected one of TRL's "
            f"{', '.join(_MEASURED.values())}, or a subclass. Train this one without ParityCallback."
        )


def not_intercepted(seen: str) -> InterceptionError:
    """The error for a step that nothing was seen of. ``seen``: the step, in words."""
    return InterceptionError(
        f"{seen} but no rollout batch was intercepted. ParityCallback covers TRL's {', '.join(_MEASURED.values())} "
        "(with use_vllm=True where there is that setting), and subclasses that call super() in the method that "
        "samples (_generate_and_score_completions, _prepare_training_batch, _fill_buffer), in compute_loss or train. "
        "Is this another trainer, a subclass that replaces that method, or were the wrappers removed?"
    )


def require_attributes(owner: Any, names: Iterable[str]) -> None:
    """Raise InterceptionError for the first private name that this TRL has moved."""
    for name in names:
        if not hasattr(owner, name):
            raise moved(type(owner), name)


def moved(cls: type, name: str) -> InterceptionError:
    """The error for a private name that this TRL has not."""
    import trl

    return InterceptionError(
        f"{cls.__name__} of trl {trl.__version__} has no {name!r}, which trl-parity needs. Expected a trl it was "
        f"tested with: {', '.join(TESTED_TRL)}. Pin one of these."
    )


def _warn_untested() -> None:
    import trl

    oldest, *_, newest = (Version(version) for version in TESTED_TRL)
    minor = Version(".".join(trl.__version__.split(".")[:2]))
    if not oldest <= minor <= newest and not _wraps:
        warnings.warn(
            f"trl {trl.__version__} was not tested with trl-parity (tested: {', '.join(TESTED_TRL)}), which wraps "
            "private methods of the trainers. Should the first step report that no rollout was seen, pin a tested "
            "version.",
            stacklevel=4,
        )


def uninstrument() -> None:
    """Put TRL's own methods back; what another library has laid over them stays. Idempotent."""
    while _wraps:
        _wraps.pop().undo()
