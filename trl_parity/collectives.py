"""What ranks do together: rows gathered, failures raised alike, a gradient dropped alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["drop_gradient", "fail_together", "gather_rows"]


def gather_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks, in rank order, on every rank. Every rank must call it."""
    from accelerate.utils import gather_object

    return gather_object(rows)


def fail_together(error: str, world_size: int) -> None:
    """Raise ConfigError on every rank where one has something to say, in its words. Every rank must call it."""
    if world_size > 1:
        error = next((row["error"] for row in gather_rows([{"error": error}]) if row["error"]), "")
    if error:
        raise ConfigError(error)


def drop_gradient(optimizer: Any, accelerator: Accelerator) -> None:
    """Leave the optimizer nothing to apply: parameters without a gradient are skipped, moments and decay included."""
    scaler = accelerator.scaler
    if scaler is not None and scaler.is_enabled():
        accelerator.unscale_gradients(optimizer)  # fp16: the scaler wants to have seen gradients before it steps
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
