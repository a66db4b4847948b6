"""Whether the engine's numbers can be the log-probs of the law it sampled from, whatever the trainer's are."""

from __future__ import annotations

import torch

__all__ = ["excess"]

_MOST = 2.0  # a ratio counts so much at most: no heavy tail, and the mean is bounded all the same

_SURE = 3.0  # standard errors

_ROUNDING = 0.005  # of the ratio: a noise of .1 nats makes it so much larger


def excess(delta: torch.Tensor, kept: torch.Tensor, row: torch.Tensor, floor: float) -> float | None:
    """The mean of min(p / q, 2) where it is beyond 1 for sure; None where the numbers may be honest.

    q: what was reported, p: the trainer's, ``delta`` = log p - log q, (N,). E[min(p / q, 2)] <= E[p / q] <= 1 over
    tokens drawn from q, for any two laws p and q: with more, q is not what was drawn from. The standard error is over
    sequences (``row``). ``floor``: the noise floor of mean Huber(Δ), whose noise alone raises the ratio by as much.
    """
    good = kept & torch.isfinite(delta)
    over = delta[good].exp().clamp(max=_MOST) - 1.0
    if not len(over):
        return None
    sequences = row[good].unique(return_inverse=True)[1]
    m = int(sequences.max()) + 1
    zeros = torch.zeros(m, dtype=torch.float64)
    sums = zeros.scatter_add(0, sequences, over.double())
    counts = zeros.scatter_add(0, sequences, torch.ones_like(over, dtype=torch.float64))
    mean = float(sums.sum() / counts.sum())
    error = float((sums - mean * counts).square().sum().sqrt() / counts.sum()) * (m / max(1, m - 1)) ** 0.5
    return 1.0 + mean if m > 1 and mean > _SURE * error + _ROUNDING + 2.0 * floor else None
