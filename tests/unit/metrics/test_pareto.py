"""k-hat of the ratios of sequences against the estimator as published, in a loop over exact ratios."""

import math

import numpy as np
import pytest
import torch

from trl_parity.metrics.pareto import add_log_ratios, khat, pareto_shape
from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import LOG_RATIO_BINS
from trl_parity.records import ScoredBatch


def published(x):
    """Zhang and Stephens (2009) with the prior of Vehtari et al. (2024), appendix; x ascending."""
    n = len(x)
    m = 30 + int(math.sqrt(n))
    quartile = x[int(n / 4 + 0.5) - 1]
    theta = [1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * quartile) for j in range(1, m + 1)]

    def profile(t):
        k = sum(math.log1p(-t * y) for y in x) / n
        return n * (math.log(-t / k) - k - 1)

    logs = [profile(t) for t in theta]
    weights = [1 / sum(math.exp(min(other - own, 700)) for other in logs) for own in logs]
    mean = sum(w * t for w, t in zip(weights, theta, strict=True))
    k = sum(math.log1p(-mean * y) for y in x) / n
    return (n * k + 10 * 0.5) / (n + 10)


def of_sample(s):
    """k-hat of log-ratios, each as it is."""
    s = np.sort(s)
    size = math.ceil(min(0.2 * len(s), 3 * math.sqrt(len(s))))
    return published((np.exp(s[-size:] - s[-1]) - math.exp(s[-size - 1] - s[-1])).tolist())


def of_bins(*samples):
    part = np.zeros((2, LOG_RATIO_BINS))
    for s in samples:
        add_log_ratios(part, s)
    return khat(part)


@pytest.mark.parametrize("n", [25, 64, 1024, 8192])
@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 3.0])
def test_it_is_the_published_estimate_though_read_from_bins(n, spread):
    s = spread * np.random.default_rng(n).standard_normal(n) - spread**2 / 2
    found = of_bins(s[: n // 3], s[n // 3 :])  # of two ranks
    assert found["seq/khat"] == pytest.approx(of_sample(s), abs=0.06)
    assert found["seq/khat_limit"] == min(1 - 1 / math.log10(n), 0.7)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.2])
def test_a_pareto_laws_own_shape_is_found(k):
    uniform = np.random.default_rng(0).random(2000)
    assert pareto_shape(np.sort((uniform**-k - 1) / k)) == pytest.approx(k, abs=0.08)


def test_ratios_that_few_sequences_weigh_are_flagged_and_near_ones_are_not():
    rng = np.random.default_rng(0)
    heavy = of_bins(rng.pareto(1.0, 1000) * 0.9)  # e^S of a law without a mean
    assert heavy["seq/khat"] > heavy["seq/khat_limit"] == pytest.approx(1 - 1 / 3)
    light = of_bins(0.02 * rng.standard_normal(1000))
    assert light["seq/khat"] < 0.3 < light["seq/khat_limit"]


def test_healthy_sequences_of_a_thousand_tokens_stay_below_the_limit():
    """Honest noise: S ~ N(-s²/2, s²), s² = tokens x variance of Δ."""
    rng, over = np.random.default_rng(0), 0
    for _ in range(200):
        spread = 0.01 * math.sqrt(1024)
        found = of_bins(spread * rng.standard_normal(512) - spread**2 / 2)
        over += found["seq/khat"] > found["seq/khat_limit"]
    assert over == 0


@pytest.mark.parametrize("s", [np.zeros(30), np.full(30, 7.0), np.linspace(-2000, 2000, 30), np.full(24, 0.1)])
def test_equal_ratios_and_huge_ones_give_a_number_and_too_few_none(s):
    found = of_bins(s)
    assert (found == {}) == (len(s) < 25)
    assert all(math.isfinite(x) for x in found.values())


def test_a_window_tells_it_of_its_sequences():
    rollout = torch.full((40, 8), -1.0)
    trainer = rollout + 0.05 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    batch = ScoredBatch(
        mask=torch.ones(40, 8, dtype=torch.bool), rollout_logprobs=rollout, trainer_logprobs=trainer,
        own_logprobs=trainer, entropy=None,
    )  # fmt: skip
    stats = compute(measure(batch))
    s = (trainer.double() - rollout.double()).sum(1).numpy()
    assert stats["seq/khat"] == pytest.approx(of_sample(s), abs=0.06)
    assert stats["seq/khat_limit"] == 1 - 1 / math.log10(40)
