"""From an SDFTTrainer with vLLM to rollout batches. Written against TRL 1.16.

With ``generate_from_teacher`` the engine samples after the teacher's prompt, and the student learns after its own:
compared are engine and student on the prompt that the engine was given. Private names used:
``_prepare_training_batch``, ``_last_loaded_step``, ``_step``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .generation import GenerationCapture
from .instrumentation import Wrapper


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented."""
    from trl.experimental.sdft.sdft_trainer import SDFTTrainer

    return SDFTCapture.wrapping(SDFTTrainer, "_prepare_training_batch")


class SDFTCapture(GenerationCapture):
    """One generation batch of an SDFTTrainer."""

    @staticmethod
    def feeds(args: Any) -> int:
        """Micro-batches that one generation feeds."""
        return int(args.steps_per_generation * args.num_iterations)

    def learned(self) -> Sequence[torch.Tensor]:
        """The batch it makes."""
        return list(self.output["completion_ids"])
