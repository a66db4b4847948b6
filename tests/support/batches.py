"""Scored batches with given numbers."""

import torch

from trl_parity.records import ScoredBatch


def scored(
    rollout,
    trainer,
    mask,
    *,
    own=None,
    entropy=None,
    law_entropy=None,
    log_kept=None,
    outside=None,
    replayed=None,
    lag=0,
    weights=None,
):
    return ScoredBatch(
        mask=mask,
        rollout_logprobs=rollout,
        trainer_logprobs=trainer,
        own_logprobs=trainer if own is None else own,
        entropy=torch.zeros_like(trainer) if entropy is None else entropy,
        law_entropy=law_entropy,
        log_kept=log_kept,
        out_of_support=outside,
        replayed_logprobs=replayed,
        lag=lag,
        correction_weights=weights,
    )


def random_batch(generator, rows, columns, scale):
    rollout = -torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 3
    delta = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale
    lengths = torch.randint(0, columns + 1, (rows,), generator=generator)
    return scored(
        rollout,
        rollout + delta,
        torch.arange(columns) < lengths.unsqueeze(1),
        own=rollout + delta * 1.5,
        entropy=torch.rand(rows, columns, generator=generator, dtype=torch.float64),
        law_entropy=torch.rand(rows, columns, generator=generator, dtype=torch.float64),
        log_kept=-torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 0.2,
        outside=torch.rand(rows, columns, generator=generator) < 0.1,
        replayed=rollout + delta * 0.5,
        lag=2,
    )
