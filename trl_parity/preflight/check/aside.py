"""Two at a time: the reference scores while the engine answers the next, where each has a core or a device."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["Aside"]

T = TypeVar("T")


class Aside:
    """One thread beside this one, for the reference; no thread where it would take the engine's cores.

    What is begun is done in order. Nothing else may touch the reference, or change its world, before it is over.
    """

    def __init__(self, engine_device: str, reference_device: str):
        spare = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > torch.get_num_threads()
        apart = torch.device(engine_device).type != torch.device(reference_device).type or spare
        self._pool = ThreadPoolExecutor(1, "trl-parity-reference") if apart else None

    def begin(self, work: Callable[[], T]) -> Callable[[], T]:
        """Asked for its result, what is returned waits for it, or does the work now."""
        return work if self._pool is None else self._pool.submit(work).result

    def close(self) -> None:
        """Wait for what is under way."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
