"""Small formulas by themselves, number by number, against the same in fp64 by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from trl_parity.metrics.histogram import log_ratio_histogram
from trl_parity.metrics.intervals import _skewness, _student, intervals
from trl_parity.metrics.statistics import measure
from trl_parity.metrics.sums import BINS, MismatchSums
from trl_parity.metrics.trimmed import EXTREME, trimmed
from trl_parity.records import ScoredBatch

SUMS = {"tokens": 2000.0, "compared": 2005.0, "last_tokens": 10.0, "last_apart": 3.0, "out_of_band": 7.0,
        "confident": 4.0}  # fmt: skip


def rates(extreme=3, **changed):
    histogram = np.zeros((2, BINS))
    histogram[0, 5], histogram[1, EXTREME] = SUMS["tokens"] - extreme, extreme
    found = trimmed(histogram, histogram.sum(0).cumsum(), SUMS | changed)
    return {name.removeprefix("trimmed/"): value for name, value in found.items()}


def test_rates_leave_out_one_token_or_the_worst_thousandth():
    found = rates()
    assert found["nonfinite_rate"] == 4 / 2005
    assert found["last_token/disagreement"] == 2 / 10
    assert found["ratio/out_of_band"] == (7 - 2) / 1998
    assert found["ratio/extreme"] == 2 / 2000
    assert found["confident_disagreement"] == 3 / 2000
    none = rates(extreme=0, compared=2000.0, last_apart=0.0, out_of_band=1.0, confident=0.0)
    names = (
        "nonfinite_rate",
        "last_token/disagreement",
        "ratio/out_of_band",
        "ratio/extreme",
        "confident_disagreement",
    )
    assert [none[name] for name in names] == [0.0] * 5


def test_students_quantile_has_the_degrees_that_sequences_and_resamples_leave():
    sizes, n = np.array([90.0, 110.0, 105.0, 95.0, 100.0]), 100.0
    spread = sum((size - n) ** 2 for size in sizes.tolist())
    t, effective = _student(sizes, n)
    assert effective == pytest.approx(n * n * 5 / spread)  # 200: Σ n² of so many alike
    assert t == pytest.approx(scipy.stats.t.ppf(0.995, 1 / (1 / (effective - 4) + 1 / 5)))
    four, effective = _student(np.array([50.0, 150.0]), n)
    assert effective == 4.0
    assert four == pytest.approx(scipy.stats.t.ppf(0.995, 1 / (1 / 2 + 1 / 2)))  # two are left at least
    two, effective = _student(np.array([100.0 - 50 * 2**0.5, 100.0 + 50 * 2**0.5]), n)
    assert effective == pytest.approx(2.0)
    assert two == pytest.approx(scipy.stats.t.ppf(0.995, 1 / (1 / 1 + 1 / 2)))  # but no more than the variance has
    few, effective = _student(np.array([0.0, 200.0]), n)
    assert effective == 1.0
    assert few == pytest.approx(scipy.stats.t.ppf(0.995, 1 / (1 / 0.5 + 1 / 2)))  # of one draw, none: a half


def test_skewness_is_that_of_residuals_threefold_and_bounded():
    x = np.random.default_rng(0).gamma(2.0, size=(3, 40))
    moments, mean = (x**2) @ x.T, 0.07
    e = x[0] - mean * x[2]
    deviation = math.sqrt(float((e**2).sum()))
    expected = 3 * float((e**3).sum()) / deviation**3
    assert abs(expected) < 3
    assert _skewness(deviation, mean, 0, moments) == pytest.approx(expected)
    assert _skewness(deviation / 9, mean, 0, moments) == 3.0
    assert _skewness(0.0, mean, 0, moments) == 0.0
    assert _skewness(1e-150, mean, 0, (-1e10 * moments).tolist()) == -3.0


@pytest.mark.parametrize("off", [5.0, 100.0])  # of Σ tokens in resamples: 400 sequences, or one
def test_an_intervals_ends_are_students_and_the_one_at_the_long_tail_is_further_out(off):
    s = {"tokens": 100.0, "sequences": 8.0, "w": 103.0, "entropy_tokens": 100.0, "law_entropy": 90.0,
         "rollout_logprob": -92.0}  # fmt: skip
    signs = np.array([1.0, -1.0] * 10)
    bootstrap = np.stack([103.0 + 4 * np.roll(signs, 1), -2 + 3 * signs, 100.0 + off * signs], axis=-1)
    moments = [[30.0, 1.0, 2.0], [1.0, -10.0, 1.5], [3.0, 1.0, 4.0]]  # Σ e³: long tails above 1, and below 0
    found, (t, effective) = intervals(s, bootstrap, moments), _student(bootstrap[:, 2], 100.0)
    for i, (name, mean, expected) in enumerate((("honesty", 1.03, 1.0), ("entropy/drift", -0.02, 0.0))):
        deviation = math.sqrt(np.square(bootstrap[:, i] - mean * bootstrap[:, 2]).mean())
        error = deviation * math.sqrt(effective / max(effective - 1, 0.5)) / 100
        further = (t**2 / 3 + 1 / 6) * abs(_skewness(deviation, mean - expected, i, moments)) * error
        low, high = mean - t * error, mean + t * error
        low, high = (low, high + further) if i == 0 else (low - further, high)
        assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx((low, high))
        assert found[f"{name}_gap"] == pytest.approx(max(0.0, low - expected, expected - high), abs=1e-12)
    assert found["se/entropy/drift"] == pytest.approx(error)
    assert intervals(s | {"sequences": 7.0}, bootstrap, moments) == {}


def test_a_histogram_holds_every_token_between_the_outermost_thousandths():
    delta = torch.linspace(-0.2, 0.3, 4000, dtype=torch.float64).view(40, 100)
    rollout = torch.full_like(delta, -2.0)
    mask = torch.ones_like(delta, dtype=torch.bool)

    def batch(delta):
        return ScoredBatch(
            mask=mask, rollout_logprobs=rollout, trainer_logprobs=rollout + delta, own_logprobs=rollout + delta,
            entropy=None,
        )  # fmt: skip

    counts, edges = log_ratio_histogram(measure(batch(delta)))
    assert (len(counts), counts.sum()) == (64, 4000)
    assert edges[0] == pytest.approx(-0.2, rel=0.04)
    assert edges[-1] == pytest.approx(0.3, rel=0.04)
    counts, edges = log_ratio_histogram(measure(batch(0.5)))
    assert (edges[0], edges[-1]) == (pytest.approx(0.5 - 1e-8, abs=1e-10), pytest.approx(0.5 + 1e-8, abs=1e-10))
    assert counts.sum() == 4000


def test_maxima_only_rise_and_a_copy_is_a_copy():
    sums = MismatchSums.zeros(bootstrap_samples=3)
    for value in (0.5, 0.2, 0.7, 0.1):
        sums.raise_to(delta=value)
    sums.bump(tokens=2.0)
    copy = sums.copy()
    copy.raise_to(delta=9.0)
    copy.bump(tokens=1.0)
    assert (copy.peaks()["delta"], copy.totals()["tokens"]) == (9.0, 3.0)
    assert (sums.peaks()["delta"], sums.totals()["tokens"]) == (0.7, 2.0)
    assert sums.cpu() is sums


def test_sums_come_back_from_json_with_what_is_infinite():
    sums = MismatchSums.zeros(bootstrap_samples=3)
    sums.bump(tokens=2.0, w=math.inf)
    sums.raise_to(neg_delta=0.25, kv_cache_usage=math.inf, teacher_temperature_gap=0.5)  # not the first; the last
    saved = sums.to_sparse()
    assert all(math.isfinite(x) for x in saved["additive"].values() if not isinstance(x, str))
    back = MismatchSums.from_sparse(saved)
    assert torch.equal(back.additive, sums.additive)
    assert torch.equal(back.maxima, sums.maxima)
