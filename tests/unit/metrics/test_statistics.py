"""Statistics against a naive fp64 oracle: loops over tokens, no vectorisation, no histogram."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import random_batch, scored

from trl_parity.metrics.scalars import SCALARS
from trl_parity.metrics.statistics import compute, log_ratio_histogram, measure, measure_policy_drift
from trl_parity.metrics.sums import MismatchSums
from trl_parity.records import ScoredBatch


def oracle(batches):
    """Every scalar by its formula, token by token."""
    d, own, replayed, ent, law, roll, kept, out, seqs = [], [], [], [], [], [], [], [], []
    for batch in batches:
        for b in range(batch.mask.shape[0]):
            row = []
            for t in range(batch.mask.shape[1]):
                if not batch.mask[b, t]:
                    continue
                r = float(batch.rollout_logprobs[b, t])
                row.append(float(batch.trainer_logprobs[b, t]) - r)
                own.append(float(batch.own_logprobs[b, t]) - r)
                replayed.append(float(batch.replayed_logprobs[b, t]) - r)
                ent.append(float(batch.entropy[b, t]))
                law.append(float(batch.law_entropy[b, t]))
                roll.append(r)
                kept.append(float(batch.log_kept[b, t]))
                out.append(bool(batch.out_of_support[b, t]))
            d += row
            if row:
                seqs.append(math.fsum(row))
    n, w, seq_w = len(d), [math.exp(x) for x in d], [math.exp(x) for x in seqs]
    mean = lambda xs: math.fsum(xs) / len(xs)  # noqa: E731
    return {
        "kl_k1": -mean(d),
        "kl_k3": mean([math.expm1(x) - x for x in d]),
        "logp_abs_diff/mean": mean([abs(x) for x in d]),
        "logp_abs_diff/max": max(abs(x) for x in d),
        "ratio/mean": mean(w),
        "ratio/max": max(w),
        "ratio/out_of_band": mean([x < 0.9 or x > 1.1 for x in w]),
        "ess": sum(w) ** 2 / (n * sum(x * x for x in w)),
        "chi2": mean([(x - 1) ** 2 for x in w]),
        "seq/log_ratio_mean": mean(seqs),
        "seq/log_ratio_max": max(abs(x) for x in seqs),
        "seq/ess": sum(seq_w) ** 2 / (len(seqs) * sum(x * x for x in seq_w)),
        "entropy/trainer": mean(ent),
        "entropy/rollout": -mean(roll),
        "entropy/drift": mean(law) + mean(roll),
        "honesty": mean(w),
        "truncation/kept_mass": mean([math.exp(x) for x in kept]),
        "truncation/log_bias": mean(kept),
        "truncation/out_of_support": mean(out),
        "own_head/kl_k3": mean([math.expm1(x) - x for x in own]),
        "own_head/logp_abs_diff/mean": mean([abs(x) for x in own]),
        "replayed/kl_k3": mean([math.expm1(x) - x for x in replayed]),
        "replayed/logp_abs_diff/mean": mean([abs(x) for x in replayed]),
        "confident_disagreement": mean([r >= math.log(0.5) and x < -2.0 for r, x in zip(roll, d, strict=True)]),
        "nonfinite_rate": 0.0,
        "lag": 2.0,
    }, d


def merged(batches, shards):
    """The batches' rows dealt unevenly to ``shards`` ranks, measured there and merged."""
    total = MismatchSums.zeros()
    parts = []
    for seed, batch in enumerate(batches):
        cuts = sorted({0, batch.mask.shape[0], *(batch.mask.shape[0] * i * i // shards**2 for i in range(shards))})
        for low, high in itertools.pairwise(cuts):
            rows = {
                f: v[low:high] if isinstance(v := getattr(batch, f), torch.Tensor) else v
                for f in ScoredBatch.__dataclass_fields__
            }
            parts.append(measure(ScoredBatch(**rows), first_sequence=seed * 100 + low))
    for part in reversed(parts):
        total.add_(part)
    return total


@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0])
def test_every_scalar_equals_the_fp64_oracle_on_ragged_batches_in_any_sharding(shards, scale):
    generator = torch.Generator().manual_seed(shards)
    batches = [random_batch(generator, rows, columns, scale) for rows, columns in ((16, 30), (9, 1), (31, 77))]
    stats = compute(merged(batches, shards))
    expected, deltas = oracle(batches)
    assert stats.num_tokens == len(deltas)
    assert stats.num_sequences == sum(int(b.mask.any(1).sum()) for b in batches)
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-9, abs=1e-15), name
    # quantiles come from a log histogram: half a bin (1.8 %) and one rank of slack
    for name, q, values in (
        ("logp_abs_diff/p99", 0.99, np.abs(deltas)),
        ("ratio/p01", 0.01, np.array(deltas)),
        ("ratio/p50", 0.50, np.array(deltas)),
        ("ratio/p99", 0.99, np.array(deltas)),
    ):
        exact = np.sort(values)[max(0, math.ceil(q * len(values)) - 1)]
        got = stats[name] if "abs" in name else math.log(stats[name])
        assert got == pytest.approx(exact, rel=0.0182, abs=2e-9), name


def test_the_names_computed_are_exactly_the_documented_scalars():
    assert set(compute(MismatchSums.zeros())) == set(SCALARS)


@given(rows=st.integers(1, 12), columns=st.integers(1, 20), scale=st.floats(1e-8, 3), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_merging_is_the_same_in_any_order(rows, columns, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (measure(random_batch(generator, rows, columns, scale), first_sequence=i * 20) for i in range(3))
    left, right = MismatchSums.zeros(), MismatchSums.zeros()
    for part in (a, b, c):
        left.add_(part)
    for part in (c, a, b):
        right.add_(part)
    torch.testing.assert_close(left.additive, right.additive, rtol=1e-12, atol=1e-12)
    assert torch.equal(left.maxima, right.maxima)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (4, 0), (4, 5)])
def test_nothing_to_compare_is_not_measured_rather_than_zero(shape):
    empty = torch.zeros(shape)
    stats = compute(measure(scored(empty, empty, torch.zeros(shape, dtype=torch.bool))))
    assert stats.num_tokens == 0
    assert all(value is None for name, value in stats.items() if name not in ("lag", "cost/seconds"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["rollout", "trainer"])
def test_nonfinite_logprobs_are_counted_and_leave_the_other_tokens_exact(bad, side):
    rollout, trainer = torch.full((8, 10), -1.0), torch.full((8, 10), -1.1)
    (rollout if side == "rollout" else trainer)[0, 3] = bad
    mask = torch.ones(8, 10, dtype=torch.bool)
    sums = measure(scored(rollout, trainer, mask))
    stats = compute(sums)
    mask[0, 3] = False
    without = compute(measure(scored(rollout, trainer, mask)))
    assert {k: v for k, v in stats.items() if "nonfinite" not in k} == {
        k: v for k, v in without.items() if "nonfinite" not in k
    }
    assert stats["nonfinite_rate"] == pytest.approx(1 / 80)
    assert stats.num_tokens == int(sums.histogram.sum()) == 79
    assert stats["kl_k1"] == pytest.approx(0.1, rel=1e-6)
    assert stats["ratio/max"] == pytest.approx(math.exp(-0.1), rel=1e-6)  # no Δ of 0 in its place
    assert all(value is None or math.isfinite(value) for value in stats.values())


def test_all_tokens_nonfinite_is_full_rate_not_no_data():
    nan = torch.full((2, 3), math.nan)
    stats = compute(measure(scored(nan, nan, torch.ones(2, 3, dtype=torch.bool))))
    assert stats["nonfinite_rate"] == 1.0
    assert stats["kl_k3"] is None


def test_a_window_without_variance_has_finite_statistics():
    same = torch.full((16, 4), -0.5)
    stats = compute(measure(scored(same, same.clone(), torch.ones(16, 4, dtype=torch.bool))))
    assert (stats["kl_k3"], stats["ess"], stats["honesty"], stats["honesty_gap"]) == (0.0, 1.0, 1.0, 0.0)
    assert log_ratio_histogram(measure(scored(same, same.clone(), torch.ones(16, 4, dtype=torch.bool)))) is not None


def test_a_huge_log_ratio_neither_raises_nor_hides():
    rollout, trainer = torch.full((2, 3), -2000.0), torch.full((2, 3), -1.0)
    stats = compute(measure(scored(rollout, trainer, torch.ones(2, 3, dtype=torch.bool))))
    assert stats["ratio/max"] == math.inf
    assert stats["kl_k3"] == pytest.approx(math.exp(300), rel=1e-9)  # Δ is clamped there in e^Δ
    assert stats["trimmed/kl_k3"] > 1e100
    assert stats["logp_abs_diff/max"] == pytest.approx(1999.0)


def draw(generator, law, law_reported, trainer_law, rows, columns):
    """Tokens sampled from ``law``, reported with ``law_reported``, scored with ``trainer_law`` (all (V,))."""
    tokens = torch.multinomial(law, rows * columns, replacement=True, generator=generator).view(rows, columns)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    return scored(law_reported.log()[tokens], trainer_law.log()[tokens], mask)


def test_honesty_interval_holds_1_for_two_different_honest_models():
    generator = torch.Generator().manual_seed(0)
    law = torch.softmax(torch.randn(50, generator=generator, dtype=torch.float64), 0)
    other = torch.softmax(law.log() + 0.3 * torch.randn(50, generator=generator, dtype=torch.float64), 0)
    inside = 0
    for i in range(40):
        stats = compute(measure(draw(generator, law, law, other, 64, 32), first_sequence=i * 64))
        inside += stats["honesty_low"] <= 1.0 <= stats["honesty_high"]
        assert stats["kl_k3"] > 0.01  # and the drift itself is seen
    assert inside >= 38


def test_honesty_interval_excludes_1_for_raw_logprobs_and_for_truncation():
    generator = torch.Generator().manual_seed(1)
    raw = torch.softmax(2 * torch.randn(50, generator=generator, dtype=torch.float64), 0)
    hot = torch.softmax(raw.log() / 0.7, 0)
    stats = compute(measure(draw(generator, hot, raw, hot, 64, 32)))
    assert stats["honesty_low"] > 1.0
    assert stats["honesty_gap"] > 0.0
    kept = raw * (raw > raw.median())
    kept = kept / kept.sum()
    stats = compute(measure(draw(generator, kept, kept, raw, 64, 32)))
    assert stats["honesty_high"] < 1.0
    assert stats["honesty"] == pytest.approx(float(raw[kept > 0].sum()), rel=1e-6)


def test_one_outlier_token_does_not_move_the_honesty_gap():
    rollout = torch.full((16, 24), -1.0)
    trainer = rollout.clone()
    trainer[3, 5] = 6.0  # Δ = 7 nats: w = 1097
    stats = compute(measure(scored(rollout, trainer, torch.ones(16, 24, dtype=torch.bool))))
    assert stats["honesty"] > 3.0
    assert stats["honesty_gap"] == 0.0


def test_too_few_sequences_have_no_honesty_interval():
    rollout = torch.full((7, 24), -1.0)
    stats = compute(measure(scored(rollout, rollout - 1, torch.ones(7, 24, dtype=torch.bool))))
    assert stats["honesty_gap"] is None
    assert stats["honesty"] == pytest.approx(math.exp(-1))


def test_measuring_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    measure(random_batch(torch.Generator().manual_seed(0), 8, 8, 0.1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_policy_drift_is_apart_from_mismatch():
    sums = MismatchSums.zeros()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    old = torch.full((2, 4), -1.0)
    new = torch.where(mask.bool(), old + 0.5, 9.0)
    new[0, 2] = torch.nan  # left out, as what is masked is
    measure_policy_drift(sums, new, old, mask)
    measure_policy_drift(sums, old[:, :2], old[:, :2], mask[:, :2])
    stats = compute(sums)
    assert stats["policy_drift/kl_k3"] == pytest.approx((math.expm1(0.5) - 0.5) / 2)
    assert stats["kl_k3"] is None


def test_reduced_bytes_are_constant_in_tokens_and_under_64_kib():
    sizes = set()
    for rows, columns in ((1, 1), (64, 512)):
        sums = measure(random_batch(torch.Generator().manual_seed(0), rows, columns, 0.1))
        sizes.add(sums.additive.nbytes + sums.maxima.nbytes)
    assert len(sizes) == 1
    assert sizes.pop() <= 64 * 1024


def test_sums_with_another_number_of_resamples_are_refused():
    with pytest.raises(ValueError, match="bootstrap"):
        MismatchSums.zeros(bootstrap_samples=10).add_(MismatchSums.zeros(bootstrap_samples=20))


def test_histogram_counts_every_token():
    batch = random_batch(torch.Generator().manual_seed(3), 20, 20, 0.1)
    counts, edges = log_ratio_histogram(measure(batch))
    assert counts.sum() == int(batch.mask.sum())
    assert len(edges) == len(counts) + 1


# ---- trimmed statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 0.5])
@pytest.mark.parametrize("n", [40, 5000])
def test_trimmed_statistics_leave_out_the_worst_tokens(n, scale):
    generator = torch.Generator().manual_seed(n)
    delta = torch.randn(1, n, generator=generator, dtype=torch.float64) * scale
    rollout = torch.full_like(delta, -1.0)
    stats = compute(measure(scored(rollout, rollout + delta, torch.ones_like(delta, dtype=torch.bool))))
    kept = sorted(delta.flatten().tolist(), key=abs)[: n - max(1, n // 1000)]
    w = [math.exp(x) for x in kept]
    expected = {
        "kl_k3": sum(math.expm1(x) - x for x in kept) / len(kept),
        "logp_abs_diff/mean": sum(map(abs, kept)) / len(kept),
        "logp_abs_diff/p99": abs(kept[math.ceil(0.99 * len(kept)) - 1]),
        "ess": sum(w) ** 2 / (len(w) * sum(x * x for x in w)),
    }
    for name, value in expected.items():  # bins are 3.7 % wide, and a square of Δ doubles that
        assert stats[f"trimmed/{name}"] == pytest.approx(value, rel=0.04), name
    share = sum(abs(math.expm1(x)) > 0.1 for x in kept) / len(kept)
    assert stats["trimmed/ratio/out_of_band"] == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("size", [-1e4, -30.0, -3.0, 3.0, 30.0, 700.0, 1e4, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (8, 2), (64, 400)])
def test_one_outlier_token_of_any_size_never_breaches_a_default_rule(size, rows, columns):
    from trl_parity import ParityConfig
    from trl_parity.judging.breaker import Breaker

    generator = torch.Generator().manual_seed(rows)
    rollout = -torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    delta = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 2e-3
    delta[rows // 2, columns // 2] = size
    rollout[rows // 2, columns // 2] = -0.1  # the engine was sure of it
    batch = scored(rollout, rollout + delta, torch.ones_like(delta, dtype=torch.bool), entropy=-rollout)
    stats = compute(measure(batch))
    floor = {f"floor/{name}": 0.0 for name in ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99")}
    stats = stats.updated(floor | {"floor/ratio/out_of_band": 0.0, "floor/ess": 1.0})
    verdict = Breaker.from_config(ParityConfig()).judge(1, stats)
    assert verdict.breaches == (), verdict.reason


def test_entropy_drift_has_an_interval_that_holds_zero_when_the_law_is_the_trainers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50, 30, generator=generator, dtype=torch.float64) * 2
    logprobs = logits.log_softmax(-1)
    tokens = torch.multinomial(logprobs.exp().view(-1, 30), 1, generator=generator).view(64, 50)
    taken = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    mask = torch.ones_like(taken, dtype=torch.bool)
    clean = compute(measure(scored(taken, taken, mask, entropy=entropy)))
    assert clean["entropy/drift_low"] < 0 < clean["entropy/drift_high"]
    assert clean["entropy/drift_gap"] == 0
    half = (logits / 2).log_softmax(-1)  # what a trainer at twice the temperature thinks
    other = -(half.exp() * half).sum(-1)
    warm = compute(measure(scored(taken, taken, mask, entropy=other)))
    assert warm["entropy/drift_gap"] == pytest.approx(warm["entropy/drift_low"])
    assert warm["entropy/drift_gap"] > 0.1


def test_unknown_entropy_is_not_measured_rather_than_zero():
    x = torch.full((8, 3), -1.0)
    batch = ScoredBatch(
        mask=torch.ones(8, 3, dtype=torch.bool), rollout_logprobs=x, trainer_logprobs=x, own_logprobs=x, entropy=None
    )
    none, half = measure(batch), measure(scored(x, x, batch.mask, entropy=-x), first_sequence=8)
    half.add_(none)
    for sums in (none, half):
        stats = compute(sums)
        assert stats["entropy/trainer"] is None
        assert stats["entropy/drift_gap"] is None
        assert stats["entropy/rollout"] == 1.0


def test_sums_survive_json_exactly():
    import json

    sums = measure(random_batch(torch.Generator().manual_seed(1), 9, 20, 0.3))
    back = MismatchSums.from_sparse(json.loads(json.dumps(sums.to_sparse(), allow_nan=False)))
    assert torch.equal(back.additive, sums.additive)
    assert torch.equal(back.maxima, sums.maxima)


def test_nothing_is_read_back_from_the_device_before_the_window_ends():
    """On a device that holds no data, whatever had to wait for it raises."""

    def on_meta(**more):
        numbers = torch.zeros(6, 9, device="meta")
        return ScoredBatch(
            mask=numbers.bool(), rollout_logprobs=numbers, trainer_logprobs=numbers, own_logprobs=numbers,
            entropy=numbers, law_entropy=numbers, **more,
        )  # fmt: skip

    sums = measure(on_meta())
    zeros = torch.zeros(6, 9, device="meta")
    sums.add_(measure(on_meta(log_kept=zeros, out_of_support=on_meta().mask, replayed_logprobs=zeros)))
    lags = torch.zeros(6, dtype=torch.long, device="meta")
    sums.add_(measure(on_meta(lags=lags, stale=on_meta().mask, in_flight=lags)))
    measure_policy_drift(sums, on_meta().entropy, on_meta().entropy, on_meta().mask)
    sums.bump(cost_seconds=1.0)
    sums.raise_to(temperature_gap=0.1)
    assert sums.histogram.device.type == "meta"
    # torch's own error, of whatever asks a meta tensor for numbers: at the window's end they are asked for
    with pytest.raises(NotImplementedError, match="meta tensor"):
        compute(sums)
