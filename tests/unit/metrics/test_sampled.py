"""Statistics of a sample of tokens against those of all: the same on average, and no surer than they are."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.batches import random_batch

from trl_parity.metrics.histogram import monotone
from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import MismatchSums
from trl_parity.scoring.token_sample import TokenSample

# not linear in a sequence's sum, or of numbers that bets take from one head alone
NONLINEAR = ("third_moment", "second_moment", "clipped", "row_k3_square", "unscored")

COUNTS = {"tokens", "own_tokens", "entropy_tokens", "row_tokens_square"}  # whole numbers of each sequence


def full_batch(rows=24, columns=60, noise=0.05, seed=0):
    """A trainer whose own head is off the fp32 one by rounding, and some numbers that are none."""
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(generator, rows, columns, 0.1)
    rounding = noise * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return replace(batch, own_logprobs=batch.trainer_logprobs + rounding, lag=0)


def sampled(batch, share, seed):
    """As a capture hands it over."""
    rows, columns = batch.mask.nonzero(as_tuple=True)
    kept, drawn = TokenSample(share, seed).draw(rows)
    weights = torch.zeros(batch.mask.shape)
    weights[rows[kept], columns[kept]] = drawn
    out = weights == 0
    return replace(
        batch,
        weights=weights,
        trainer_logprobs=torch.where(out, batch.own_logprobs, batch.trainer_logprobs),
        entropy=batch.entropy.masked_fill(out, math.nan),
        law_entropy=batch.law_entropy.masked_fill(out, math.nan),
        log_kept=batch.log_kept.masked_fill(out, 0.0),
        out_of_support=batch.out_of_support & ~out,
        replayed_logprobs=batch.replayed_logprobs.masked_fill(out, 0.0),
    )


def linear(sums: MismatchSums):
    """What adds over tokens, by name and bin."""
    totals = {k: v for k, v in sums.totals().items() if not k.startswith(NONLINEAR)}
    parts = sums.parts()
    return torch.tensor([*totals.values(), *parts["histogram"].ravel(), *parts["bootstrap"].ravel()])


@pytest.mark.parametrize("spoiled", [False, True])
def test_over_all_draws_of_a_sequence_each_sum_is_that_of_all_its_tokens(spoiled):
    batch = full_batch(rows=1, columns=13, noise=0.3)
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    if spoiled:
        for x, at, value in ((batch.trainer_logprobs, 3, math.nan), (batch.own_logprobs, 5, -math.inf)):
            x[0, at] = value
    draws = {tuple(x.weights[0].tolist()): x for x in (sampled(batch, 0.25, seed) for seed in range(60))}
    assert len(draws) == 4  # 3 of 12: as likely, each
    found = torch.stack([linear(measure(x, bootstrap_samples=2)) for x in draws.values()]).mean(0)
    expected = linear(measure(batch, bootstrap_samples=2))
    if spoiled:  # tokens of a sequence are whole ones
        wrong = torch.nonzero((found - expected).abs() > 1e-9).flatten().tolist()
        names = [k for k in measure(batch, bootstrap_samples=2).totals() if not k.startswith(NONLINEAR)]
        assert {names[i] for i in wrong if i < len(names)} <= COUNTS
        return
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow_unit
def test_on_average_statistics_are_those_of_all_tokens_and_intervals_are_as_wide_as_chance():
    batch = full_batch()
    truth = compute(measure(batch))
    draws = [compute(measure(sampled(batch, 0.1, seed))) for seed in range(80)]
    for name in (
        "kl_k1", "kl_k3", "logp_abs_diff/mean", "ratio/mean", "ratio/out_of_band", "entropy/trainer", "entropy/drift",
        "seq/log_ratio_mean", "truncation/kept_mass", "truncation/log_bias", "truncation/out_of_support",
        "replayed/kl_k3", "replayed/logp_abs_diff/mean", "trimmed/kl_k3", "trimmed/logp_abs_diff/mean",
    ):  # fmt: skip
        x = np.array([stats[name] for stats in draws])
        slack = 0.06 * truth[name] if name.startswith("trimmed") else 0.0  # cut off where the tail begins
        assert abs(x.mean() - truth[name]) < 4 * x.std() / math.sqrt(len(x)) + abs(slack) + 1e-9, name
    for name in ("own_head/kl_k3", "entropy/rollout", "last_token/logp_abs_diff/mean", "nonfinite_rate"):
        assert [stats[name] for stats in draws] == pytest.approx([truth[name]] * len(draws), abs=1e-12), name
    for name in ("kl_k1", "logp_abs_diff/mean", "kl_k3"):
        chance = np.var([stats[name] for stats in draws]) + truth[f"se/{name}"] ** 2
        told = np.mean([stats[f"se/{name}"] ** 2 for stats in draws])
        assert told > truth[f"se/{name}"] ** 2, name
        assert told == pytest.approx(chance, rel=0.3), name
    widths = np.array([stats["honesty_high"] - stats["honesty_low"] for stats in draws])
    assert widths.mean() > truth["honesty_high"] - truth["honesty_low"]
    assert draws[0]["cost/coverage"] == pytest.approx(0.13, abs=0.03)
    assert truth["cost/coverage"] == 1


def test_where_both_heads_agree_a_sample_says_what_all_tokens_say():
    batch = full_batch(noise=0.0)
    truth, stats = (compute(measure(x)) for x in (batch, sampled(batch, 0.1, 0)))
    for name, value in truth.values_by_name.items():
        if name.startswith(("entropy", "se/entropy", "truncation", "replayed", "kl_over", "cost", "concentration")):
            continue
        assert (value is None) == (stats[name] is None), name
        assert value is None or stats[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_what_is_not_linear_in_a_sequences_sum_is_as_little_off_as_the_own_head():
    batch = full_batch(noise=0.15, columns=400)
    own = compute(measure(replace(batch, trainer_logprobs=batch.own_logprobs)))
    for seed in range(5):
        stats = compute(measure(sampled(batch, 0.05, seed)))
        for name in ("seq/ess", "seq/log_ratio_max", "concentration/sequences", "concentration/dispersion"):
            assert stats[name] == pytest.approx(own[name], rel=0.35), name


def test_a_sample_of_everything_is_everything():
    batch = full_batch()
    everything = replace(batch, weights=batch.mask.float())
    sums, expected = measure(everything), measure(batch)
    torch.testing.assert_close(linear(sums), linear(expected), rtol=1e-12, atol=1e-12)
    assert sums.peaks() | {"seq_abs_delta": 0.0} == expected.peaks() | {"seq_abs_delta": 0.0}  # by the own head
    assert compute(sums)["cost/coverage"] == 1


def test_largest_numbers_are_those_that_are_known():
    batch = full_batch()
    one = sampled(batch, 0.1, 0)
    delta = (one.trainer_logprobs - one.rollout_logprobs)[one.mask]
    assert compute(measure(one))["logp_abs_diff/max"] == float(delta.abs().max())


def test_bets_on_honesty_see_the_own_heads_number_of_each_token():
    batch = full_batch()
    own = compute(measure(replace(batch, trainer_logprobs=batch.own_logprobs)))
    stats = compute(measure(sampled(batch, 0.1, 0)))
    for name in ("ratio/clipped", "ratio/clipped_square"):
        assert stats[name] == pytest.approx(own[name], rel=1e-12)


def test_windows_of_a_sample_merge_with_windows_of_all_tokens():
    batch, other = full_batch(), full_batch(seed=1)
    sums = measure(sampled(batch, 0.1, 0))
    sums.add_(measure(other))
    tokens = int(batch.mask.sum()), int(other.mask.sum())
    stats = compute(sums)
    assert stats.num_tokens == sum(tokens)
    assert stats["entropy/trainer"] is not None
    coverage = compute(measure(sampled(batch, 0.1, 0)))["cost/coverage"]
    assert stats["cost/coverage"] == pytest.approx((coverage * tokens[0] + tokens[1]) / sum(tokens))


def test_counts_that_a_sample_made_negative_become_the_nearest_ones_that_are_none():
    histogram = np.zeros((2, 100))
    histogram[1, :50] = 20.0
    fine = histogram.copy()
    assert monotone(fine) is fine
    for low, high in ((90, 91), (91, 90)):  # one token in the tail that stands for 20, in the bins of both heads
        rough = histogram.copy()
        rough[1, low] += 1 - 20
        rough[1, high] += 20
        fixed = monotone(rough)
        assert (fixed >= 0).all()
        assert fixed.sum() == pytest.approx(rough.sum())
        assert fixed[1, 60:].sum() < 3.0
        assert fixed[1, :40] == pytest.approx(rough[1, :40])
