"""From an IWOPDTrainer with vLLM to rollout batches. Written against TRL 1.16.

It fills a buffer as GOLDTrainer does. Private name used beside GOLD's: ``_buffer_step``.
"""

from __future__ import annotations

from collections.abc import Iterator

from .gold import GOLDCapture
from .instrumentation import Wrapper


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented."""
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

    return IWOPDCapture.wrapping(IWOPDTrainer, "_fill_buffer")


class IWOPDCapture(GOLDCapture):
    """What an IWOPDTrainer samples for one buffer."""

    done = "_buffer_step"
