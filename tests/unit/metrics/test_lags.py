"""Statistics by the age of a sample's weights."""

from dataclasses import replace

import pytest
import torch

from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import MismatchSums
from trl_parity.records import ScoredBatch


def test_tokens_by_lag_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    rollout = -torch.rand(7, 9, generator=generator) - 0.1
    trainer = rollout + 0.2 * torch.randn(7, 9, generator=generator)
    trainer[1, 2] = torch.nan
    engine = torch.rand(7, 9, generator=generator) < 0.8
    engine[1, 2] = True
    lags, in_flight = torch.tensor([0, 1, 2, 3, 4, 5, 60]), torch.tensor([0, 1, -1, 0, 1, 0, 0])
    fresh = (lags == 0)[:, None]
    sums = MismatchSums.zeros()
    for rows in (slice(0, 4), slice(4, 7)):  # two batches, merged
        batch = ScoredBatch(
            mask=(engine & fresh)[rows], stale=(engine & ~fresh)[rows], lags=lags[rows], in_flight=in_flight[rows],
            rollout_logprobs=rollout[rows], trainer_logprobs=trainer[rows], own_logprobs=trainer[rows], entropy=None,
        )  # fmt: skip
        sums.add_(measure(batch))
    stats = compute(sums)
    for name, members in {"0": [0], "1": [1], "2": [2], "3_4": [3, 4], "5_up": [5, 6]}.items():
        deltas = [
            float(trainer[i, t] - rollout[i, t])
            for i in members
            for t in range(9)
            if engine[i, t] and (i, t) != (1, 2)
        ]
        assert stats[f"lag/{name}/tokens"] == len(deltas)
        k3 = sum(torch.tensor(d).double().expm1().item() - d for d in deltas) / len(deltas)
        assert stats[f"lag/{name}/kl_k3"] == pytest.approx(k3, rel=1e-6)
    assert stats["kl_k3"] == pytest.approx(stats["lag/0/kl_k3"])
    counts = engine.sum(1)
    assert stats["lag/nonfinite_rate"] == pytest.approx(1 / float(counts[1:].sum()))
    known = counts[[0, 1, 3, 4, 5, 6]].sum()
    assert stats["lag/in_flight_share"] == pytest.approx(float(counts[1] + counts[4]) / float(known))
    assert stats["lag"] == pytest.approx(75 / 7)
    assert compute(measure(replace(batch, in_flight=None)))["lag/in_flight_share"] is None


def test_a_probe_is_compared_and_has_no_lag():
    numbers = torch.full((3, 4), -1.0)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    batch = ScoredBatch(
        mask=mask, rollout_logprobs=numbers, trainer_logprobs=numbers, own_logprobs=numbers, entropy=None, lag=3
    )
    probed, plain = compute(measure(replace(batch, probe=True))), compute(measure(batch))
    assert (probed["lag"], probed["lag/probe_tokens"], probed["lag/0/tokens"]) == (None, 3, 0)
    assert (plain["lag"], plain["lag/probe_tokens"], plain["lag/0/tokens"]) == (3, None, None)
    assert probed.num_tokens == plain.num_tokens == 3
