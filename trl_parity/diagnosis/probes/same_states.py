"""Two ways to make logits of the same hidden states: another one, and the trainer's head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from ...scoring.head import logits_chunk
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..forward_passes import ForwardPass
from .asking import Whole
from .base import recomputed

__all__ = ["SameStates", "on_same_states"]

_TOKENS = 64  # of a sequence, whose whole logits are made

# last hidden states (n, H), and logits (n, V) made of them, of tokens at these places (n,) of a sequence, from 1 on
Ask = Callable[[Whole, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class SameStates:
    """Logits of n tokens, and the batch as if the trainer's had been the others."""

    counterfactual: Counterfactual
    over: torch.Tensor  # (N,) bool: the n tokens
    others: torch.Tensor  # (n, V) in the dtype they came in
    heads: torch.Tensor  # (n, V) by the trainer's head, fp32
    gap: torch.Tensor  # (n,) log-prob by the others - by the head, nats
    picked: torch.Tensor  # (n,) which of the batch's tokens
    by_head: torch.Tensor  # (n,) log-probs by the head on these states


def on_same_states(batch: DiagnosedBatch, current: Counterfactual, sequences: Iterable[Whole], ask: Ask) -> SameStates:
    """What ``ask`` makes of some tokens of these sequences, held against the trainer's head on the states it names."""
    base = recomputed(current)
    reported, over = base.reported.clone(), torch.zeros(len(batch), dtype=torch.bool)
    others, heads, gaps, picked, by_head = [], [], [], [], []
    with batch.passes.head(ForwardPass(), batch.temperature) as head:
        for whole in sequences:
            n = len(whole.tokens)
            some = whole.tokens[torch.linspace(0, n - 1, min(_TOKENS, n)).long().unique()]
            states, logits = ask(whole, whole.start + batch.column[some])
            made = logits_chunk(states.to(head.weight.device), head).cpu()
            logits = logits[:, : made.shape[1]].cpu()
            targets = batch.targets[some].cpu()[:, None]
            laws = (x.float().div(batch.temperature).double().log_softmax(-1) for x in (logits, made))
            said = [law.gather(1, targets)[:, 0] for law in laws]
            gaps.append(said[0] - said[1])
            reported[some] -= gaps[-1]
            over[some] = True
            others.append(logits)
            heads.append(made)
            picked.append(some)
            by_head.append(said[1])
    moved = replace(base, distribution=batch.plain, reported=reported, kept=base.kept & over)
    return SameStates(moved, over, *map(torch.cat, (others, heads, gaps, picked, by_head)))
