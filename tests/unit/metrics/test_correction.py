"""The weights TRL's correction gave, and biases that only sequences show."""

import math
import statistics

import pytest
import torch
from support.batches import random_batch, scored

from trl_parity import ParityConfig
from trl_parity.judging.breaker import Breaker
from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import SCALES, MismatchSums


def weighted(delta, mask=None, mode="sequence_mask", cap=3.0):
    """A batch with these Δ, and the weights of TRL 1.16 for them."""
    delta = torch.as_tensor(delta, dtype=torch.float64)
    mask = torch.ones_like(delta, dtype=torch.bool) if mask is None else mask
    rollout = torch.full_like(delta, -1.0)
    w = delta * mask
    w = (w.sum(-1, keepdim=True) if mode.startswith("sequence") else w).exp()
    w = w.clamp(max=cap) if mode.endswith("truncate") else w.masked_fill(w > cap, 0.0)
    return scored(rollout, rollout + delta, mask, entropy=-rollout, weights=w)


def judged(batch, bootstrap_samples=200):
    """With a noise floor of zero."""
    stats = compute(measure(batch, bootstrap_samples=bootstrap_samples))
    floor = {f"floor/{name}": 0.0 for name in ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99")}
    return Breaker.from_config(ParityConfig()).judge(
        1, stats.updated(floor | {"floor/ratio/out_of_band": 0.0, "floor/ess": 1.0})
    )


@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate", "token_mask", "token_truncate"])
def test_every_scalar_of_the_correction_equals_the_fp64_oracle(mode):
    generator = torch.Generator().manual_seed(0)
    total, zeroed, kept, means, long = MismatchSums.zeros(), [], [], [], []
    for rows, columns in ((16, 30), (9, 12)):
        mask = random_batch(generator, rows, columns, 1.0).mask
        batch = weighted(torch.randn(rows, columns, generator=generator, dtype=torch.float64), mask, mode)
        total.add_(measure(batch))
        lengths = [n for n in mask.sum(1).tolist() if n]
        for b in range(rows):
            n = int(mask[b].sum())
            if not n:
                continue
            at = mask[b].nonzero().flatten().tolist()
            row = batch.correction_weights[b]
            w = [float(row[0 if mode.startswith("sequence") else t]) for t in at]
            zeroed.append(sum(x == 0 for x in w) / n)
            kept.append(sum(min(x, 1.0) for x in w) / n)
            means.append(sum(w) / n)
            long.append(n > sum(lengths) / len(lengths))
    stats, n = compute(total), len(means)
    assert stats["correction/zeroed"] == pytest.approx(sum(zeroed) / n)
    assert stats["correction/lost"] == pytest.approx(1 - sum(kept) / n)
    assert stats["correction/ess"] == pytest.approx(sum(means) ** 2 / (n * sum(x * x for x in means)))
    assert stats["correction/weight_median"] == pytest.approx(statistics.median_low(means), rel=0.11)
    assert stats["correction/long/zeroed"] == pytest.approx(
        sum(z for z, x in zip(zeroed, long, strict=True) if x) / sum(long)
    )
    assert stats["correction/long/lost"] == pytest.approx(
        1 - sum(k for k, x in zip(kept, long, strict=True) if x) / sum(long)
    )
    assert stats["trimmed/correction/zeroed"] == pytest.approx(max(0.0, sum(zeroed) - 1) / n)
    assert stats["trimmed/correction/lost"] == pytest.approx(max(0.0, 1 - sum(kept) / (n - 1)))


def test_without_a_correction_nothing_of_it_is_measured():
    stats = compute(measure(random_batch(torch.Generator().manual_seed(0), 9, 9, 0.1)))
    assert all(value is None for name, value in stats.items() if "correction" in name)


def test_a_bias_no_token_shows_breaches_where_it_zeroes_every_sequence():
    """0.0014 nats a token: nothing at 64 tokens, no gradient at all at 1,024."""
    short, full = judged(weighted(torch.full((8, 64), 0.0014))), judged(weighted(torch.full((8, 1024), 0.0014)))
    assert short.breaches == ()
    assert full.breaches == ("seq/bias_gap", "correction/zeroed")
    assert full.warnings == ("correction/lost",)
    assert full.stats["correction/zeroed"] == full.stats["correction/lost"] == 1.0
    assert full.stats["correction/weight_median"] == full.stats["correction/ess"] == 0.0
    assert full.stats["seq/bias_gap"] == pytest.approx(1024 * math.expm1(0.0014), rel=1e-6)


def test_long_sequences_alone_zeroed_breach():
    delta = torch.zeros(16, 2048, dtype=torch.float64)
    mask = torch.arange(2048) < torch.tensor([2048] * 5 + [100] * 11)[:, None]
    delta[:5] = 0.001
    verdict = judged(weighted(delta, mask))
    assert "correction/long/zeroed" in verdict.breaches
    assert "correction/zeroed" not in verdict.breaches


@pytest.mark.parametrize("size", [-1e4, 3.0, 1e4, math.nan])
@pytest.mark.parametrize("rows", [2, 4, 16])
def test_one_token_that_zeroes_its_sequence_never_breaches(size, rows):
    delta = torch.zeros(rows, 200, dtype=torch.float64)
    delta[1, -1] = size
    assert judged(weighted(delta)).breaches == ()


def test_honest_noise_at_length_warns_at_most():
    """sigma .033 at 4,096 tokens: most of the loss's weight is gone, though no side is at fault."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(16, 4096, generator=generator, dtype=torch.float64) * 0.033 - 0.033**2 / 2
    batch = weighted(delta)
    stats = compute(measure(batch))
    readings = [r for r in Breaker.from_config(ParityConfig()).readings(stats) if r.rule.k is None]
    assert not [r.text for r in readings if r.over and not r.rule.warn_only]
    assert stats["correction/weight_median"] < 0.3


# ---- last tokens, rare tokens ------------------------------------------------------------------------------------


def noisy(rows, columns, scale=0.01, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def plain(delta, mask=None):
    rollout = torch.full_like(delta, -1.0)
    mask = torch.ones_like(delta, dtype=torch.bool) if mask is None else mask
    return scored(rollout, rollout + delta, mask, entropy=-rollout)


@pytest.mark.parametrize("off", [-8.0, -3.0, 3.0])
@pytest.mark.parametrize("columns", [20, 999, 2000])
def test_a_wrong_end_token_breaches_at_any_length(columns, off):
    delta, lengths = (
        noisy(16, columns),
        torch.randint(2, columns + 1, (16,), generator=torch.Generator().manual_seed(1)),
    )
    delta[torch.arange(16), lengths - 1] += off
    verdict = judged(plain(delta, torch.arange(columns) < lengths[:, None]))
    assert "last_token/disagreement" in verdict.breaches
    assert verdict.stats["last_token/disagreement"] == 1.0
    assert verdict.stats["last_token/logp_abs_diff/mean"] == pytest.approx(abs(off), abs=0.02)
    healthy = judged(plain(noisy(16, columns), torch.arange(columns) < lengths[:, None]))
    assert healthy.stats["last_token/disagreement"] == 0.0


def test_the_last_token_is_the_last_that_the_engine_generated_whatever_stands_between():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
    delta = torch.tensor(
        [[0, 0, 3, 5], [9, 9, 9, 9], [5, -1.05, 9, 9], [5, 5, 5, math.nan], [-0.95, 9, 9, 9]], dtype=torch.float64
    )
    stats = compute(measure(plain(delta, mask)))
    assert stats["last_token/logp_abs_diff/mean"] == pytest.approx((3 + 1.05 + 0.95) / 3)
    assert stats["last_token/disagreement"] == 2 / 3


@pytest.mark.parametrize("n", [2000, 5000, 20_000, 200_000])
@pytest.mark.parametrize("floor", [0.0, 3e-3])
def test_a_thousandth_of_all_tokens_eight_nats_off_breaches(n, floor):
    delta = noisy(n // 100, 100, 0.01)
    delta.view(-1)[torch.randperm(n, generator=torch.Generator().manual_seed(2))[: n // 1000]] = -8.0
    stats = compute(measure(plain(delta), bootstrap_samples=2)).updated({"floor/kl_k3": floor})
    over = {r.rule.stat for r in Breaker.from_config(ParityConfig()).readings(stats) if r.over}
    assert "ratio/extreme" in over
    assert ("kl_k3" in over) == (floor == 0.0)
    assert stats["ratio/extreme"] == pytest.approx(n // 1000 / n)
    assert stats["trimmed/kl_k3"] == pytest.approx((n // 1000 - 1) * (math.exp(-8) + 7) / n + 5e-5, rel=0.05)


def test_a_few_huge_tokens_of_a_million_count_eight_at_most():
    delta = noisy(1000, 1000, 1e-3)
    delta[0, :5] = 600.0
    stats = compute(measure(plain(delta), bootstrap_samples=2))
    assert stats["trimmed/logp_abs_diff/mean"] == pytest.approx(1e-3 * math.sqrt(2 / math.pi) + 4 * 8e-6, rel=0.01)
    assert stats["trimmed/kl_k3"] == pytest.approx(5e-7 + 4 * 8e-6, rel=0.02)
    assert stats["trimmed/ess"] > 0.999


# ---- sequences of any weight, entropies that are no numbers, large batches ---------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [*(([s] * 16, 1.0) for s in (-100.0, -400.0, -800.0, 299.0, 310.0, 15_000.0, 25_000.0, -25_000.0)),
     ([310.0] * 8 + [600.0] * 8, 0.5),
     *(([s] * 8 + [s + 1.0] * 8, (1 + math.e) ** 2 / (2 * (1 + math.e**2)))
       for s in (-18_000.0, -900.0, 899.5, 18_000.0))],
)  # fmt: skip
def test_the_sequences_effective_sample_size_has_no_scale(weights, expected):
    delta = torch.tensor(weights, dtype=torch.float64)[:, None].expand(-1, 100) / 100
    one, other = measure(plain(delta[::2].contiguous())), measure(plain(delta[1::2].contiguous()))
    one.add_(other)
    assert compute(one)["seq/ess"] == pytest.approx(expected, rel=1e-9)


def test_sequences_of_a_window_that_0_6_0_began_count_as_before():
    expected = measure(plain(noisy(8, 20)))
    began = expected.copy()
    weights = began.parts()["sequence_weights"]
    w, w2 = weights[:, SCALES // 2].tolist()
    began.bump(seq_w=w, seq_w2=w2)
    weights[:] = 0.0
    assert began.parts()["sequence_weights"].sum() == 0.0
    assert compute(began)["seq/ess"] == pytest.approx(compute(expected)["seq/ess"], rel=1e-12)


@pytest.mark.parametrize("shift", [-2.0, -0.5, -1e-9, 0.0, 0.3])
def test_chi_squared_is_never_negative(shift):
    deltas = [torch.full((8, n), shift, dtype=torch.float64) for n in range(1, 20)]  # some sums are rounded down
    found = [compute(measure(scored(0 * x, x, x < 1)))["chi2"] for x in deltas]
    assert found == pytest.approx([math.expm1(shift) ** 2] * 19, abs=1e-15)
    assert min(found) >= 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [4, 16])  # few sequences have no interval
@pytest.mark.parametrize("all_of_them", [False, True])
@pytest.mark.parametrize("law", [False, True])
def test_an_entropy_that_is_no_number_breaches_and_later_windows_are_judged(bad, rows, all_of_them, law):
    from trl_parity.metrics.trends import EntropyWatch

    rollout, entropy = torch.full((rows, 32), -1.0), torch.ones(rows, 32)
    broken = entropy.clone()
    broken.view(-1)[: None if all_of_them else 1] = bad
    mask = torch.ones(rows, 32, dtype=torch.bool)
    batch = scored(rollout, rollout, mask, entropy=entropy if law else broken, law_entropy=broken if law else None)
    verdict = judged(batch)
    assert "entropy/nonfinite_rate" in verdict.breaches
    assert verdict.stats["entropy/nonfinite_rate"] == (1.0 if all_of_them else 1 / (32 * rows))
    assert math.isnan(verdict.stats["entropy/trainer"])
    assert verdict.stats["kl_k3"] == 0.0
    watch = EntropyWatch()
    for value in (1.0, verdict.stats["entropy/trainer"], math.inf, 1.0, 1.0, 1.0, 1.0):
        watch.update(value)
        watch.scalars()
    assert watch.scalars() == {"entropy/trend": 0.0, "entropy/relative": 1.0}


def test_large_batches_are_summed_in_pieces_with_the_same_result(monkeypatch):
    from trl_parity.metrics import statistics as module

    generator = torch.Generator().manual_seed(0)
    batch = random_batch(generator, 7, 37, 0.3)
    whole = measure(batch, first_sequence=5)
    for block in (1000, 100, 10):  # all in one, rows, positions
        monkeypatch.setattr(module, "_BLOCK", block)
        pieces = measure(batch, first_sequence=5)
        torch.testing.assert_close(pieces.additive, whole.additive, rtol=1e-12, atol=1e-12)
        assert torch.equal(pieces.maxima, whole.maxima)
        assert torch.equal(pieces.histogram, whole.histogram)
