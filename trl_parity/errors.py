"""What trl-parity raises.

    ParityError
    ├── ConfigError (also ValueError)     a setting is wrong: unknown key, value out of range
    ├── DataError (also ValueError)       a rollout batch contradicts itself: lengths, shapes, types
    ├── InterceptionError (RuntimeError)  the rollouts of this run cannot be seen or measured
    └── ParityHalt                        the breaker halted the run (``action="raise"``, ``raise_if_halted()``)

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
    """The run is halted. ``verdict``: its last HALT. The last line of its text is the reason.

    Raised on every rank: with ``action="raise"`` before the batch reaches the weights, and by
    ``ParityCallback.raise_if_halted``. Uncaught, the process ends with exit code 1.
    """

    def __init__(self, verdict: Verdict, message: str):
        super().__init__(message)
        self.verdict = verdict
