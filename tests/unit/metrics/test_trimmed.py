"""What trimmed statistics leave out of a bin that holds more tokens than are left out."""

import math

import pytest
import torch
from support.batches import scored

from trl_parity.metrics.statistics import compute, measure


def stats_of(deltas):
    trainer = torch.tensor([deltas], dtype=torch.float64)
    return compute(measure(scored(torch.zeros_like(trainer), trainer, torch.ones_like(trainer, dtype=torch.bool))))


@pytest.mark.parametrize(("tokens", "left"), [(4, 3), (1000, 999), (3000, 2997)])
def test_of_equal_tokens_as_many_are_left_as_there_should_be(tokens, left):
    """All in one bin: the mean of what is left is their own, whatever is left out."""
    assert tokens - max(1, tokens // 1000) == left
    stats = stats_of([0.1] * tokens)
    assert stats["trimmed/logp_abs_diff/mean"] == pytest.approx(0.1, rel=0.019)
    assert stats["trimmed/kl_k3"] == pytest.approx(math.expm1(0.1) - 0.1, rel=0.04)
    assert stats["trimmed/ess"] == pytest.approx(1.0, rel=1e-9)


def test_of_one_token_nothing_is_left_and_of_two_the_smaller():
    one, two = stats_of([0.3]), stats_of([0.3, 0.1])
    assert one["kl_k3"] == pytest.approx(math.expm1(0.3) - 0.3)
    assert one["trimmed/kl_k3"] is one["trimmed/logp_abs_diff/p99"] is None
    assert two["trimmed/logp_abs_diff/mean"] == pytest.approx(0.1, rel=0.019)
    assert two["trimmed/logp_abs_diff/p99"] == pytest.approx(0.1, rel=0.019)


def test_the_worst_are_left_out_and_part_of_their_bin_stays():
    """10 small, 3 large and equal: one large one goes, two of 12 are left."""
    stats = stats_of([0.01] * 10 + [1.0] * 3)
    assert stats["trimmed/logp_abs_diff/mean"] == pytest.approx((10 * 0.01 + 2 * 1.0) / 12, rel=0.02)
    w = [math.exp(0.01)] * 10 + [math.e] * 2
    assert stats["trimmed/ess"] == pytest.approx(sum(w) ** 2 / (12 * sum(x * x for x in w)), rel=0.02)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_of_both_signs_are_seen_apart(sign):
    stats = stats_of([sign * 0.5, sign * 0.25, 0.0])
    assert stats["logp_abs_diff/max"] == 0.5
    assert stats["ratio/max"] == pytest.approx(math.exp(0.5 if sign > 0 else 0.0))
    assert stats["seq/log_ratio_max"] == pytest.approx(0.75)
    stats = stats_of([sign * 0.5, sign * 0.25])  # the same where all are of one sign
    assert stats["ratio/max"] == pytest.approx(math.exp(0.5 if sign > 0 else -0.25))
