"""From a DistillationTrainer, or a ServerDistillationTrainer, with vLLM to rollout batches. Written against TRL 1.16.

Private names used: ``_generate_and_score_completions``, ``_get_last_hidden_state``, ``_forward_redirection``,
``_last_loaded_step``, ``_step``; of TRL ``kernels.ChunkedLogProbFunction``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..scoring.model_head import materialized_head
from .generation import GenerationCapture
from .instrumentation import Wrapper

_VOCAB = 32768  # logits of a token held at once, as TRL's loss does


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented."""
    from trl.trainer.distillation_trainer import DistillationTrainer

    return DistillationCapture.wrapping(DistillationTrainer, "_generate_and_score_completions")


class DistillationCapture(GenerationCapture):
    """One generation batch of a DistillationTrainer."""

    def learned(self) -> Sequence[torch.Tensor]:
        """The batch it makes."""
        return list(self.output["completion_ids"])

    def logprobs(self, model: Any, ids: torch.Tensor, attention: torch.Tensor, keep: int) -> torch.Tensor:
        """(b, keep) by the fused head that its loss uses, without whole logits; a teacher's server wants those."""
        trainer, policy = self.trainer, self.policy
        if trainer.teacher_model is None:
            return super().logprobs(model, ids, attention, keep)
        from trl.kernels import ChunkedLogProbFunction

        states = trainer._forward_redirection(
            model, policy, trainer._get_last_hidden_state, policy, ids, attention, keep
        )
        with materialized_head(policy, self.temperature) as head:
            logprobs: torch.Tensor = ChunkedLogProbFunction.apply(
                states.flatten(0, 1), head.weight, head.bias, ids[:, -keep:].flatten(), self.temperature, _VOCAB,
                head.softcap, head.logit_scale, (),
            )[0]  # fmt: skip
        return logprobs.view(-1, keep)
