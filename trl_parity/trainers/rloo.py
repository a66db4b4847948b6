"""From an RLOOTrainer with vLLM to rollout batches. Written against TRL 1.16.

It works as GRPOTrainer does, but asks the engine for no log-probs and learns from sums over sequences. So the engine
is asked for those of the sampled tokens, they are kept as they come back from ``VLLMGeneration.generate``, and the
trainer's own per-token log-probs, which TRL sums up and drops, ride along in its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import DataError
from .grpo import GRPOCapture, wrappers_of
from .instrumentation import Wrapper, replaced


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    return wrappers_of(RLOOTrainer, RLOOCapture)


class RLOOCapture(GRPOCapture):
    """One generation batch of an RLOOTrainer."""

    @classmethod
    def require_interceptable(cls, trainer: Any) -> None:
        """Asks the engine for the sampled tokens' log-probs, which TRL does not."""
        if trainer.use_vllm and getattr(trainer.vllm_generation, "logprobs", 0) is None:
            trainer.vllm_generation.logprobs = 0
        super().require_interceptable(trainer)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what the engine handed to this rank."""
        generation = self.generation
        generate = generation.generate
        self._reported: list[list[float | None]] = []

        def recorded(*args: Any, **kwargs: Any) -> Any:
            out = generate(*args, **kwargs)
            self._reported += [[token[0] for token in sequence] for sequence in out[2]]
            return out

        with super().recording(), replaced(generation, "generate", recorded):
            yield
        if self.pass_logprobs is not None:
            self.output["old_per_token_logps"] = self.pass_logprobs

    def _tool_mask(self) -> Sequence[Any]:
        """RLOOTrainer has no tools."""
        return ()

    def rollout_logprobs(self) -> torch.Tensor:
        """(B, C) what the engine reported."""
        ids = self.output["completion_ids"]
        if len(self._reported) != len(ids):
            raise DataError(
                f"the engine's log-probs came for {len(self._reported)} sequences but the trainer has {len(ids)} "
                f"completions (step {self.step}). Expected one list per completion."
            )
        values = torch.zeros(ids.shape, dtype=torch.float32)
        for row, sequence in zip(values, self._reported, strict=True):
            row[: len(sequence)] = torch.tensor([torch.nan if x is None else x for x in sequence])
        return values.to(ids.device)
