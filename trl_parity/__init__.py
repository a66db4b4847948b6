"""trl-parity: is the vLLM engine that samples the same policy as the TRL trainer that learns?

    trainer = GRPOTrainer(..., callbacks=[ParityCallback()])

Importing this package imports neither vllm nor wandb nor matplotlib, and torch only when a name needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .callback import ParityCallback
    from .config import ParityConfig
    from .engine.config import load_engine_args, rl_engine_args
    from .errors import ParityError, ParityHalt
    from .monitor import ParityMonitor
    from .records import Diagnosis, MismatchStats, Status, Verdict
    from .rewards import RewardBaseline
    from .rules import Rule

__all__ = [
    "Diagnosis",
    "MismatchStats",
    "ParityCallback",
    "ParityConfig",
    "ParityError",
    "ParityHalt",
    "ParityMonitor",
    "RewardBaseline",
    "Rule",
    "Status",
    "Verdict",
    "__version__",
    "load_engine_args",
    "rl_engine_args",
]

_HOME = {
    "ParityCallback": "callback",
    "ParityConfig": "config",
    "ParityMonitor": "monitor",
    "RewardBaseline": "rewards",
    "Rule": "rules",
    "load_engine_args": "engine.config",
    "rl_engine_args": "engine.config",
    "ParityError": "errors",
    "ParityHalt": "errors",
    "Diagnosis": "records",
    "MismatchStats": "records",
    "Status": "records",
    "Verdict": "records",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
