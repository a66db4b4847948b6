"""What a language-model head is, and what scoring with it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Head", "HeadScores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What turns a hidden state into logits: z = softcap(logit_scale * (W h + b)), then / temperature.

    Gradients never flow through it, and the tensors are read where they are: nothing is copied as a whole.
    """

    weight: torch.Tensor  # W, (V, H), any float dtype
    bias: torch.Tensor | None = None  # b, (V,); -inf takes a token out
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None  # softcap * tanh(z / softcap)
    vocab_size: int | None = None  # rows from here on are padding, left out (None: all rows count)
    logits_dtype: torch.dtype | None = None  # round W h + b to this dtype, as a head of that dtype does (None: fp32)
    # LoRA on the head: (A (r, H), B (V, r), scaling), each adds scaling * B A to W
    low_rank: tuple[tuple[torch.Tensor, torch.Tensor, float], ...] = ()
    # hidden (n, H) to logits (n, V) in fp32, instead of W h + b: of a head that is more than a matrix
    module: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def vocab_used(self) -> int:
        """V_used, the number of vocabulary entries that count."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size


class HeadScores(NamedTuple):
    """What `score_tokens` returns, one number a token."""

    logprobs: torch.Tensor  # (N,) fp32, log p(target), nats
    entropy: torch.Tensor  # (N,) fp32, -sum_v p(v) log p(v) over the whole used vocabulary, nats
