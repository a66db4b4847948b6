"""From a GOLDTrainer with vLLM to rollout batches. Written against TRL 1.16.

It fills a buffer with micro-batches, some sampled (``lmbda``), some of the data; where none is sampled there is
nothing to compare. Private names used: ``_fill_buffer``, ``_buffered_inputs``, ``_buffered_text_logs``,
``_last_vllm_sync_step``, ``_step``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .generation import GenerationCapture
from .instrumentation import Wrapper


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented."""
    from trl.experimental.gold.gold_trainer import GOLDTrainer

    return GOLDCapture.wrapping(GOLDTrainer, "_fill_buffer")


class GOLDCapture(GenerationCapture):
    """What a GOLDTrainer samples for one buffer."""

    synced = "_last_vllm_sync_step"

    def learned(self) -> Sequence[torch.Tensor]:
        """The buffer's sampled micro-batches, of which alone it keeps texts."""
        slices = zip(self.trainer._buffered_inputs, self.trainer._buffered_text_logs, strict=True)
        sampled = [some for some, texts in slices if texts is not None]
        return [row[some["prompts"].shape[1] :] for some in sampled for row in some["input_ids"]]
