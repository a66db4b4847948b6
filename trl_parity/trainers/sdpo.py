"""From an SDPOTrainer with vLLM to rollout batches. Written against TRL 1.16. It samples as SDFTTrainer does."""

from __future__ import annotations

from collections.abc import Iterator

from .instrumentation import Wrapper
from .sdft import SDFTCapture


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented."""
    from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

    return SDPOCapture.wrapping(SDPOTrainer, "_prepare_training_batch")


class SDPOCapture(SDFTCapture):
    """One generation batch of an SDPOTrainer."""

    def rewards(self) -> list[float]:
        """Weighted sums of this batch's rewards over all ranks. A collective."""
        rewards: list[float] = self.trainer.accelerator.gather(self.output["rewards"]).tolist()
        return rewards
