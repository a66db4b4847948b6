"""trl-parity: is the vLLM engine that samples the same policy as the TRL trainer that learns?

    trainer = GRPOTrainer(..., callbacks=[ParityCallback()])

Importing this package imports neither vllm nor wandb nor matplotlib, and torch only when a name needs it.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .lines import LastResort

if TYPE_CHECKING:
    from .config.parity import ParityConfig
    from .config.rules import Rule
    from .engine.config import load_engine_args, rl_engine_args
    from .errors import ParityError, ParityHalt
    from .live.callback import ParityCallback
    from .live.monitor import ParityMonitor
    from .metrics.rewards import RewardBaseline
    from .records import Diagnosis
    from .verdict import MismatchStats, Status, Verdict

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
    "ParityCallback": "live.callback",
    "ParityConfig": "config.parity",
    "ParityMonitor": "live.monitor",
    "RewardBaseline": "metrics.rewards",
    "Rule": "config.rules",
    "load_engine_args": "engine.config",
    "rl_engine_args": "engine.config",
    "ParityError": "errors",
    "ParityHalt": "errors",
    "Diagnosis": "records",
    "MismatchStats": "verdict",
    "Status": "verdict",
    "Verdict": "verdict",
}


logging.getLogger(__name__).addHandler(LastResort())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
