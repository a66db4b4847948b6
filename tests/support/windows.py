"""Windows, verdicts and runs as they are recorded, with given numbers."""

import torch

from trl_parity.metrics.scalars import SCALARS
from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch
from trl_parity.verdict import MismatchStats, Status, Verdict


def window(num_errors=0, nonfinite_rate=0.0, **values):
    scalars = dict.fromkeys(SCALARS) | {"nonfinite_rate": nonfinite_rate}
    scalars |= {name.replace("__", "/"): value for name, value in values.items()}
    return MismatchStats(100, 10, 1, num_errors, scalars)


def sums_of(delta=0.1, rows=8, columns=4, bootstrap_samples=200):
    rollout = torch.full((rows, columns), -1.0)
    trainer = rollout + delta
    return measure(
        ScoredBatch(
            mask=torch.ones(rows, columns, dtype=torch.bool),
            rollout_logprobs=rollout,
            trainer_logprobs=trainer,
            own_logprobs=trainer,
            entropy=torch.ones(rows, columns),
        ),
        bootstrap_samples=bootstrap_samples,
    )


def verdict(step, **kwargs):
    return Verdict(step=step, status=Status.OK, streak=0, stats=compute(sums_of()), **kwargs)
