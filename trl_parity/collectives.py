"""What ranks do together: rows gathered, decisions and failures shared, a gradient dropped. None waits for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["PeerFailed", "drop_gradient", "fail_together", "gather_rows", "on_any", "together"]

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """What ranks do together failed on another one. ``kind``: the name of what it raised."""

    def __init__(self, words: str):
        super().__init__(f"on another rank: {words}")
        self.kind = words.partition(":")[0]


def gather_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks, in rank order, on every rank. Every rank must call it.

    Raises PeerFailed where a rank has failed in the work that this belongs to (``together``).
    """
    return _exchanged(rows, "")


def together(work: Callable[[], T], ranks: int) -> T:
    """What ``work`` returns, where it was done on all ranks; else it raises on all: its own error, or PeerFailed.

    A rank on which it fails says so where the others next gather rows, or where they are done. So nobody waits for it,
    as long as ``work`` meets other ranks in ``gather_rows`` alone. Every rank must call it.
    """
    if ranks == 1:
        return work()
    try:
        result = work()
    except PeerFailed:  # all were told at the same gathering
        raise
    except Exception as e:
        with suppress(PeerFailed):
            _exchanged([], f"{type(e).__name__}: {e}")
        raise
    _exchanged([], "")
    return result


def _exchanged(rows: list[dict[str, Any]], failure: str) -> list[dict[str, Any]]:
    from accelerate.utils import gather_object

    told = gather_object([(rows, failure)])
    if failed := next((words for _, words in told if words), ""):
        raise PeerFailed(failed)
    return [row for rows, _ in told for row in rows]


def on_any(flags: Sequence[bool], accelerator: Accelerator | None) -> list[bool]:
    """Which of the flags are up on any rank: the same on each, to decide by. Every rank must call it with as many."""
    if accelerator is None or accelerator.num_processes == 1:
        return list(flags)
    import torch

    counts = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device), "sum")
    return [count > 0 for count in counts.tolist()]


def fail_together(error: str, world_size: int) -> None:
    """Raise ConfigError on every rank where one has something to say, in its words. Every rank must call it."""
    if world_size > 1:
        error = next((row["error"] for row in gather_rows([{"error": error}]) if row["error"]), "")
    if error:
        raise ConfigError(error)


def drop_gradient(optimizer: Any, accelerator: Accelerator) -> None:
    """Leave the optimizer nothing to apply: parameters without a gradient are skipped, moments and decay included.

    Where that fails on a rank it raises on all. Every rank must call it.
    """

    def drop() -> None:
        scaler = accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            accelerator.unscale_gradients(optimizer)  # fp16: the scaler wants to have seen gradients before it steps
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    together(drop, accelerator.num_processes)
