"""Which resamples a sequence is in: by its number over batches and ranks, never twice the same by accident."""

import pytest
import torch
from support.batches import random_batch, scored

from trl_parity import ParityMonitor
from trl_parity.metrics import statistics
from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import MismatchSums


def batch(rows=6, seed=0):
    return random_batch(torch.Generator().manual_seed(seed), rows, 9, 0.1)


def test_sequences_are_resampled_by_their_number():
    first, again, later = (measure(batch(), first_sequence=n) for n in (0, 0, 6))
    assert torch.equal(first.bootstrap, again.bootstrap)
    assert not torch.equal(first.bootstrap, later.bootstrap)
    # two batches measured apart are resampled as one
    both = batch(12)
    rows = [{name: getattr(both, name)[part] if isinstance(getattr(both, name), torch.Tensor) else getattr(both, name)
             for name in both.__dataclass_fields__} for part in (slice(0, 5), slice(5, 12))]  # fmt: skip
    halves = [measure(type(both)(**one), first_sequence=n) for one, n in zip(rows, (40, 45), strict=True)]
    torch.testing.assert_close(
        halves[0].bootstrap + halves[1].bootstrap, measure(both, first_sequence=40).bootstrap, rtol=1e-12, atol=1e-12
    )


def test_the_weights_are_one_poisson_draw_each_and_begin_again_after_the_pool():
    weights = statistics._weights_of(4096, 0, 200, torch.device("cpu")).double()
    assert weights.shape == (4096, 200)
    assert float(weights.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(weights.var()) == pytest.approx(1.0, abs=0.02)
    wrapped = statistics._weights_of(10, 4090, 200, torch.device("cpu"))
    assert torch.equal(wrapped.double(), torch.cat([weights[4090:], weights[:4]]))
    assert torch.equal(statistics._weights_of(3, 4096 + 7, 200, torch.device("cpu")).double(), weights[7:10])


def test_a_resample_holds_w_drift_and_tokens_of_each_sequence_as_often_as_its_weight():
    one = batch(rows=3)
    sums = measure(one, bootstrap_samples=5, first_sequence=11)
    weights = statistics._weights_of(3, 11, 5, torch.device("cpu")).double()
    delta = torch.where(one.mask, one.trainer_logprobs - one.rollout_logprobs, 0.0)
    w = torch.where(one.mask, delta.exp(), 0.0).sum(1)
    drift = torch.where(one.mask, one.law_entropy + one.rollout_logprobs, 0.0).sum(1)
    expected = weights.t() @ torch.stack([w, drift, one.mask.sum(1).double()], 1)
    torch.testing.assert_close(sums.bootstrap, expected, rtol=1e-12, atol=1e-12)


def test_ranks_and_batches_of_a_monitor_have_numbers_of_their_own():
    """Every rank with the same weights would make intervals of two ranks as wide as those of one."""
    monitors = [ParityMonitor() for _ in range(3)]
    found = [monitor.measure(batch(), rank) for rank, monitor in enumerate(monitors)]
    for rank, sums in enumerate(found):
        assert torch.equal(sums.bootstrap, measure(batch(), first_sequence=1009 * rank).bootstrap)
    assert not torch.equal(found[0].bootstrap, found[1].bootstrap)
    assert not torch.equal(found[1].bootstrap, found[2].bootstrap)
    second = monitors[1].measure(batch(4, seed=1), 1)
    assert torch.equal(second.bootstrap, measure(batch(4, seed=1), first_sequence=1009 + 6).bootstrap)


def test_intervals_are_the_resamples_outermost_half_percents():
    """200 resamples: one is left out at each end."""
    rollout = torch.full((16, 5), -1.0, dtype=torch.float64)
    trainer = rollout + torch.linspace(-0.3, 0.3, 16, dtype=torch.float64)[:, None]
    mask = torch.ones(16, 5, dtype=torch.bool)
    sums = measure(scored(rollout, trainer, mask, entropy=torch.ones_like(rollout)))
    stats = compute(sums)
    means = (sums.bootstrap[:, 0] / sums.bootstrap[:, 2]).sort().values
    assert (stats["honesty_low"], stats["honesty_high"]) == (float(means[1]), float(means[-2]))
    assert stats["honesty_gap"] == max(0.0, stats["honesty_low"] - 1.0, 1.0 - stats["honesty_high"])
    few = measure(scored(rollout[:7], trainer[:7], mask[:7]))
    assert compute(few)["honesty_low"] is None
    assert compute(measure(scored(rollout[:8], trainer[:8], mask[:8])))["honesty_low"] is not None


def test_merged_sums_keep_each_part():
    a, b = measure(batch(seed=2)), measure(batch(seed=3), first_sequence=6)
    total = MismatchSums.zeros()
    total.add_(a)
    total.add_(b)
    assert torch.equal(total.additive, a.additive + b.additive)
    assert torch.equal(total.maxima, torch.maximum(a.maxima, b.maxima))
