"""What trl-parity raises.

    ParityError
    ├── ConfigError (also ValueError)     a setting is wrong: unknown key, value out of range
    ├── DataError (also ValueError)       a rollout batch contradicts itself: lengths, shapes, types
    ├── InterceptionError (RuntimeError)  the rollouts of this run cannot be seen or measured
    └── ParityHalt                        the breaker stopped the run (``action="raise"``)

Every message says what was seen, what was expected, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .verdict import Verdict

__all__ = ["ConfigError", "DataError", "InterceptionError", "ParityError", "ParityHalt"]


class ParityError(Exception):
    """Base of everything raised by trl-parity."""


class ConfigError(ParityError, ValueError):
    """A setting is wrong."""


class DataError(ParityError, ValueError):
    """A rollout batch contradicts itself."""


class InterceptionError(ParityError, RuntimeError):
    """The rollouts of this run cannot be intercepted or measured."""


class ParityHalt(ParityError):
    """Raised by ``action="raise"`` at a HALT verdict, on every rank, before the batch reaches the weights."""

    def __init__(self, verdict: Verdict, message: str):
        super().__init__(message)
        self.verdict = verdict
