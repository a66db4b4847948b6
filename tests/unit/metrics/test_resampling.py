"""Which resamples a sequence is in: by its number over batches and ranks, never twice the same by accident."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.batches import random_batch, scored

from trl_parity import ParityMonitor
from trl_parity.metrics import sequences
from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import MismatchSums
from trl_parity.trainers.row_keys import row_keys


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
    weights = torch.from_numpy(sequences._resample_weights(200)).double()
    assert weights.shape == (4096, 200)
    assert float(weights.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(weights.var()) == pytest.approx(1.0, abs=0.02)
    many = batch(10)
    wrapped = torch.cat([weights[4090:], weights[:4]])
    held = wrapped.t() @ many.mask.sum(1).double()
    assert torch.equal(measure(many, first_sequence=4090).bootstrap[:, 2], held)
    assert torch.equal(measure(many, first_sequence=4096 + 4090).bootstrap[:, 2], held)
    assert not torch.equal(measure(many, first_sequence=4091).bootstrap[:, 2], held)


def test_a_resample_holds_w_drift_and_tokens_of_each_sequence_as_often_as_its_weight():
    one = batch(rows=3)
    sums = measure(one, bootstrap_samples=5, first_sequence=11)
    weights = torch.from_numpy(sequences._resample_weights(5)).double()[11:14]
    delta = torch.where(one.mask, one.trainer_logprobs - one.rollout_logprobs, 0.0)
    w = torch.where(one.mask, delta.exp(), 0.0).sum(1)
    drift = torch.where(one.mask, one.law_entropy + one.rollout_logprobs, 0.0).sum(1)
    expected = weights.t() @ torch.stack([w, drift, one.mask.sum(1).double()], 1)
    torch.testing.assert_close(sums.bootstrap, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [None, torch.arange(6), torch.tensor([5, 7, 5, 4101, 7, 5])])
def test_third_moments_are_those_of_equal_sequences_together(keys):
    one = batch()
    delta = torch.where(one.mask, one.trainer_logprobs - one.rollout_logprobs, 0.0)
    drift = torch.where(one.mask, one.law_entropy + one.rollout_logprobs, 0.0)
    x = torch.stack([delta.expm1().sum(1), drift.sum(1), one.mask.sum(1).double()], 1)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    numbers = range(6) if keys is None else (keys % 4096).tolist()
    for number in set(numbers):
        whole = sum(row for row, n in zip(x, numbers, strict=True) if n == number)
        expected += torch.outer(whole**2, whole)
    totals = measure(replace(one, keys=keys)).totals()
    found = torch.tensor([totals[f"third_moment/{i}{j}"] for i in range(3) for j in range(3)], dtype=torch.float64)
    torch.testing.assert_close(found.view(3, 3), expected, rtol=1e-12, atol=1e-12)


def test_ranks_and_batches_of_a_monitor_have_numbers_of_their_own():
    """Every rank with the same weights would make intervals of two ranks as wide as those of one."""
    monitors = [ParityMonitor() for _ in range(3)]
    found = [monitor.sums_of(batch(), rank) for rank, monitor in enumerate(monitors)]
    for rank, sums in enumerate(found):
        assert torch.equal(sums.bootstrap, measure(batch(), first_sequence=1009 * rank).bootstrap)
    assert not torch.equal(found[0].bootstrap, found[1].bootstrap)
    assert not torch.equal(found[1].bootstrap, found[2].bootstrap)
    second = monitors[1].sums_of(batch(4, seed=1), 1)
    assert torch.equal(second.bootstrap, measure(batch(4, seed=1), first_sequence=1009 + 6).bootstrap)


def means(x, lengths, keys=None):
    """A batch whose sequences have the given Σ (H + rollout log-prob)."""
    lengths = torch.as_tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    rollout = torch.full(mask.shape, -1.0, dtype=torch.float64)
    one = scored(rollout, rollout, mask, entropy=1.0 + (x / lengths)[:, None].expand(mask.shape))
    return replace(one, keys=keys)


def test_an_interval_is_students_where_nothing_is_skewed():
    """Σ e² and Σ n² from 200 resamples: each within three of its standard errors, of a tenth."""
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).repeat(4)
    stats = compute(measure(means(x, [10] * 64)))
    error = float((x**2).sum().sqrt()) / 640 * (64 / 63) ** 0.5
    assert stats["entropy/drift_high"] == pytest.approx(2.66 * error, rel=0.16)
    assert stats["entropy/drift_low"] == pytest.approx(-stats["entropy/drift_high"], rel=1e-6)
    assert stats["entropy/drift_gap"] == 0.0
    shifted = compute(measure(means(x + 100.0, [10] * 64)))
    assert shifted["entropy/drift_gap"] == pytest.approx(shifted["entropy/drift_low"])
    assert shifted["entropy/drift_low"] == pytest.approx(10.0 + stats["entropy/drift_low"], rel=1e-6)


def test_a_skewed_mean_has_room_where_the_tail_may_be():
    x = torch.zeros(32, dtype=torch.float64)
    x[3] = 10.0
    right, left = (compute(measure(means(sign * x, [10] * 32))) for sign in (1, -1))
    mean = float(x.sum()) / 320
    assert right["entropy/drift_high"] - mean > 1.5 * (mean - right["entropy/drift_low"])
    assert right["entropy/drift_high"] == pytest.approx(-left["entropy/drift_low"], rel=1e-6)


def test_seven_sequences_have_no_interval_and_eight_a_wide_one():
    x = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)
    assert compute(measure(means(x[:7], [5] * 7)))["entropy/drift_low"] is None
    widths = [compute(measure(means(x[:n], [5] * n)))["entropy/drift_high"] * n**0.5 for n in (8, 16)]
    assert widths[0] > 1.3 * widths[1]


def test_copies_of_a_sequence_are_one_piece_of_evidence_in_whatever_batch_or_rank():
    generator = torch.Generator().manual_seed(5)
    x, keys = torch.linspace(-1, 1, 12, dtype=torch.float64), torch.arange(12) * 7919

    def width(*parts):
        total = MismatchSums.zeros()
        for rank, part in enumerate(parts):
            total.add_(measure(means(x[part], [10] * len(part), keys[part]), first_sequence=1009 * rank))
        stats = compute(total)
        return stats["entropy/drift_high"] - stats["entropy/drift_low"]

    once = width(torch.arange(12))
    for parts in (
        [torch.arange(12).repeat(8)],  # eight copies of each, side by side
        [torch.arange(12)] * 8,  # a copy a batch, or a rank
        [torch.arange(6).repeat(8), torch.arange(6, 12).repeat_interleave(8)],
    ):
        assert width(*parts) == pytest.approx(once, rel=0.05)
    # other sequences on each rank: twice as many are more, not as if both ranks were resampled with the same weights
    other = compute_width(torch.cat([x, torch.randn(84, generator=generator, dtype=torch.float64)]))
    assert other < 0.5 * once


def test_two_draws_that_happen_to_agree_are_no_finding_however_many_copies_there_are():
    """A variance of two draws has one degree of freedom: its 99 % are 64 standard errors."""
    x = torch.tensor([-3.5, -3.1], dtype=torch.float64).repeat(8)
    stats = compute(measure(means(x, [10] * 16, torch.arange(2).repeat(8) * 7919)))
    assert stats["se/entropy/drift"] == pytest.approx(0.02, rel=0.3)
    assert stats["entropy/drift"] == pytest.approx(-0.33)
    assert stats["entropy/drift_gap"] == 0.0


def compute_width(x):
    stats = compute(measure(means(x, [10] * len(x), torch.arange(len(x)) * 104729 + 3)))
    return stats["entropy/drift_high"] - stats["entropy/drift_low"]


def test_ranks_together_have_an_interval_as_narrow_as_one_rank_with_all_sequences():
    """With the same weights on every rank it would be as wide as that of one rank."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    monitors = [ParityMonitor() for _ in range(4)]
    total = MismatchSums.zeros()
    for rank, monitor in enumerate(monitors):
        total.add_(monitor.sums_of(means(x[rank], [10] * 32), rank))
    together = compute(total)
    alone = compute(measure(means(x.flatten(), [10] * 128)))
    widths = [s["entropy/drift_high"] - s["entropy/drift_low"] for s in (together, alone)]
    assert widths[0] == pytest.approx(widths[1], rel=0.2)


def draws(law, count, generator):
    if law == "lognormal":
        return torch.randn(count, generator=generator, dtype=torch.float64).exp() - math.exp(0.5)
    normal = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return normal[:, 0] if law == "normal" else normal[:, 0] / normal[:, 1:].square().mean(1).sqrt()


@pytest.mark.slow_unit
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    ("law", "count", "least"),
    [("normal", 8, 0.985), ("normal", 16, 0.985), ("normal", 64, 0.985), ("t3", 8, 0.985), ("t3", 16, 0.985),
     ("t3", 64, 0.985), ("lognormal", 8, 0.965), ("lognormal", 16, 0.975), ("lognormal", 64, 0.985)],
)  # fmt: skip
def test_a_99_percent_interval_covers(law, count, least, equal):
    generator, windows, covered = torch.Generator().manual_seed(count), 1500, 0
    for i in range(windows):
        lengths = torch.full((count,), 16)
        if not equal:
            lengths = (16 * (0.7 * torch.randn(count, generator=generator)).exp()).long().clamp(min=1)
        x = draws(law, count, generator) * lengths.double().sqrt()
        stats = compute(measure(means(x, lengths), first_sequence=i * count))
        covered += stats["entropy/drift_low"] <= 0.0 <= stats["entropy/drift_high"]
    assert covered / windows >= least


def test_equal_rows_have_equal_keys_whatever_their_padding():
    def batch_of(*rows, prompt=6, completion=8):
        prompts, completions = torch.zeros(len(rows), prompt, dtype=torch.long), torch.zeros(len(rows), completion)
        masks = torch.zeros_like(prompts), torch.zeros_like(completions)
        completions = completions.long()
        for i, (p, c) in enumerate(rows):
            prompts[i, prompt - len(p) :], masks[0][i, prompt - len(p) :] = torch.tensor(p), 1
            completions[i, : len(c)], masks[1][i, : len(c)] = torch.tensor(c), 1
        return SimpleNamespace(
            prompt_ids=prompts, prompt_mask=masks[0], completion_ids=completions, completion_mask=masks[1],
            image_keys=None,
        )  # fmt: skip

    rows = [([5, 6], [7, 8]), ([5, 6], [7, 8]), ([5, 6], [8, 7]), ([6, 5], [7, 8]), ([5], [6, 7, 8]),
            ([5, 6], [7, 8, 0]), ([0, 5, 6], [7, 8]), ([5, 6], [7])]  # fmt: skip
    keys, wider = row_keys(batch_of(*rows)), row_keys(batch_of(*rows, prompt=11, completion=30))
    assert keys.dtype == torch.int64
    assert torch.equal(keys, wider)
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == len(rows) - 1
    # spread over the pool: of 4,096 random rows no resampling number is drawn far more often than chance has it
    many = [([int(a)], [int(b)]) for a, b in torch.randint(0, 50_000, (4096, 2))]
    assert (row_keys(batch_of(*many)) % 4096).bincount().max() < 10


def test_merged_sums_keep_each_part():
    a, b = measure(batch(seed=2)), measure(batch(seed=3), first_sequence=6)
    total = MismatchSums.zeros()
    total.add_(a)
    total.add_(b)
    assert torch.equal(total.additive, a.additive + b.additive)
    assert torch.equal(total.maxima, torch.maximum(a.maxima, b.maxima))
