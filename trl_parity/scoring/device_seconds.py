"""How long blocks take where they compute: on the host, or on a GPU behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

__all__ = ["DeviceSeconds", "wait_for_device"]


class DeviceSeconds:
    """Sums up the seconds of blocks. CUDA runs behind the host: there they are those from event to event."""

    def __init__(self) -> None:
        self._host = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """The block counts. Nothing waits."""
        start = time.perf_counter()
        first = _noted() if torch.cuda.is_initialized() else None
        try:
            yield
        finally:
            if first is None:
                self._host += time.perf_counter() - start
            else:
                self._events.append((first, _noted()))

    @property
    def total(self) -> float:
        """Waits for the device."""
        events, self._events = self._events, []
        with suppress(RuntimeError):  # whatever the device could not do: the next call that needs it says so
            for first, last in events:
                last.synchronize()
                self._host += first.elapsed_time(last) / 1e3
        return self._host


def wait_for_device() -> None:
    """Until what was asked of this process's CUDA device is done. What failed there, the next call says."""
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):
            torch.cuda.synchronize()


def _noted() -> torch.cuda.Event:
    """An event behind what was asked of the device so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
