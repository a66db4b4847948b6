"""The trainer's own line on the console, with those of our scalars that fit on it. Trackers and files get all."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

__all__ = ["SHORT", "shorten_console", "shortened"]

# what a person looks at first: status, drift with floor and limit, sizes, what the loss still has, cost
SHORT = frozenset(
    ("breaker/status", "breaker/streak", "breaker/windows", "breaker/skipped", "breaker/skipped_total", "kl_k3",
     "own_head/kl_k3", "floor/kl_k3", "excess/kl_k3", "limit/kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99",
     "logp_abs_diff/max", "ratio/out_of_band", "ess", "honesty", "honesty_gap", "entropy/trainer", "entropy/relative",
     "truncation/kept_mass", "correction/lost", "nonfinite_rate", "lag", "policy_drift/kl_k3", "cost/share")
)  # fmt: skip


def shortened(logs: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the scalars of ours that are not in ``SHORT``; everybody else's stay."""
    return {name: x for name, x in logs.items() if "parity/" not in name or name.partition("parity/")[2] in SHORT}


def shorten_console(trainer: Any) -> None:
    """Let transformers' progress bar and printer print ``shortened`` rows. Once a trainer."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback | PrinterCallback) and "on_log" not in vars(callback):
            callback.on_log = functools.partial(_on_log, callback.on_log)  # type: ignore[method-assign]


def _on_log(original: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
    return original(args, state, control, logs=logs and shortened(logs), **kwargs)
