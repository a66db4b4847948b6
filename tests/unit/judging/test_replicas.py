"""One sick rank among 2, 64 or 1,024 halts and is named; healthy ranks are silent, however skew their noise."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from trl_parity import ParityConfig
from trl_parity.judging.breaker import Breaker
from trl_parity.judging.replicas import Replicas
from trl_parity.metrics.sums import MismatchSums
from trl_parity.verdict import MismatchStats

SCALE, TOKENS = 0.02, 64  # of Δ, nats: mean |Δ| 0.016, k3 2e-4


def a_window(rng, ranks, sequences, scales=None, spread=0.0):
    """What is known of a window: by rank, and of all together. ``scales``: of Δ by rank."""
    size = np.exp(spread * rng.standard_normal((ranks, sequences, 1)) - spread**2 / 2)
    delta = SCALE * size * rng.standard_normal((ranks, sequences, TOKENS))
    delta *= (np.ones(ranks) if scales is None else scales)[:, None, None]
    k3, nats = np.expm1(delta) - delta, np.abs(delta)
    by_rank = np.stack(
        [np.full(ranks, float(sequences * TOKENS)), k3.sum((1, 2)), nats.sum((1, 2)), delta.max((1, 2)),
         (-delta).max((1, 2))], axis=-1,
    )  # fmt: skip
    n, m = delta.size, ranks * sequences
    floor = {"floor/kl_k3": 2.2e-4 * np.exp(spread**2), "floor/logp_abs_diff/mean": 0.0165}
    stats = {"effective_sequences": float(m), "nonfinite_rate": 0.0}
    stats |= {"logp_abs_diff/mean": nats.mean(), "kl_k3": k3.mean()} | floor
    for name, x in (("kl_k3", k3.sum(2)), ("logp_abs_diff/mean", nats.sum(2))):
        residual = x - x.mean()
        stats[f"se/{name}"] = float(np.sqrt((residual**2).sum() * m / (m - 1)) / n)
    return by_rank, stats


def run(windows, **settings):
    """Statuses and ranks named."""
    config = ParityConfig(**settings)
    breaker, replicas, seen = Breaker.from_config(config), Replicas(config.consecutive, config.breach_memory), []
    for step, (by_rank, stats) in enumerate(windows):
        scalars = stats | replicas.add(by_rank, stats)
        verdict = breaker.judge(step, MismatchStats(1, 1, 1, 0, scalars))
        seen.append((str(verdict.status), verdict.breaches, scalars.get("replica/rank")))
    return seen


def test_a_checkpoint_keeps_what_ranks_were_seen_doing(rng):
    scales = np.array([1.0, 10.0])
    windows = [a_window(rng, 2, 16, scales) for _ in range(3)]
    windows[1][0][0, 0] = 0.0  # rank 0 had no token: no bound
    whole, resumed = Replicas(3, 20), Replicas(3, 20)
    for by_rank, stats in windows[:2]:
        whole.add(by_rank, stats)
    resumed.load_state(json.loads(json.dumps(whole.state(), allow_nan=False)))
    assert resumed.add(*windows[2]) == pytest.approx(whole.add(*windows[2]), rel=1e-5)
    assert resumed.scalars["replica/rank"] == 1
    resumed.load_state(whole.state())
    assert resumed.add(*a_window(rng, 4, 16)) == {}  # of other ranks: nothing is known of them


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("ranks", "sequences"), [(2, 16), (64, 8), (1024, 4)])
def test_one_stale_rank_halts_at_the_third_window_and_is_named(rng, ranks, sequences):
    sick = ranks // 2
    scales = np.ones(ranks)
    scales[sick] = 10.0
    seen = run([a_window(rng, ranks, sequences, scales) for _ in range(3)], rules={"kl_k3": None})
    assert [status for status, *_ in seen] == (["BREACH", "BREACH", "HALT"] if ranks == 2 else ["OK", "OK", "HALT"])
    assert {"replica/kl_k3", "replica/logp_abs_diff/mean"} <= set(seen[-1][1])
    assert seen[-1][2] == sick
    if ranks > 2:  # and no other rule sees it
        assert set(seen[-1][1]) == {"replica/kl_k3", "replica/logp_abs_diff/mean"}


@pytest.mark.parametrize(("ranks", "sequences", "spread"), [(2, 4, 0.5), (64, 8, 0.5), (1024, 8, 0.5), (1024, 1, 1.0)])
def test_healthy_ranks_are_silent(rng, ranks, sequences, spread):
    seen = run(a_window(rng, ranks, sequences, spread=spread) for _ in range(25))
    assert {status for status, *_ in seen} == {"OK"}


@pytest.mark.parametrize(
    ("ranks", "sequences", "every"), [(2, 16, 2), (2, 16, 4), (64, 8, 2), (64, 8, 3), (64, 8, 4), (1024, 4, 3)]
)
def test_a_rank_that_is_stale_now_and_then_halts_at_its_third_window_and_is_named(rng, ranks, sequences, every):
    sick = ranks - 1
    scales = np.ones(ranks)
    scales[sick] = 10.0
    windows = [a_window(rng, ranks, sequences, None if i % every else scales) for i in range(2 * every + 2)]
    seen = run(windows, rules={"kl_k3": None})
    between = [status for i, (status, *_) in enumerate(seen) if i % every]
    assert set(between) == {"OK"}  # the one after the halt too: no window is condemned for what others were
    assert [status for status, *_ in seen[::every]] == (["BREACH"] * 2 if ranks == 2 else ["OK"] * 2) + ["HALT"]
    assert {"replica/kl_k3", "replica/logp_abs_diff/mean"} <= set(seen[2 * every][1])
    assert seen[2 * every][2] == sick


def test_a_rank_at_three_times_the_noise_now_and_then_halts_while_two_are_sick(rng):
    windows = []
    for i in range(25):
        scales = np.ones(64)
        scales[7], scales[9] = (5.0, 1.0) if i % 3 == 0 else (1.0, 5.0)
        windows.append(a_window(rng, 64, 8, scales, spread=0.5))
    seen = run(windows, rules=dict.fromkeys(("kl_k3", "logp_abs_diff/mean")))
    halted = [i for i, (status, *_) in enumerate(seen) if status == "HALT"]
    assert halted
    assert halted[0] <= 8
    assert {seen[i][2] for i in halted} == {7, 9}


def test_bad_windows_far_apart_or_on_a_floor_of_few_sequences_are_not_remembered(rng):
    scales = np.ones(64)
    scales[3] = 10.0
    far = [a_window(rng, 64, 8, scales if i % 12 == 0 else None) for i in range(37)]
    assert {status for status, *_ in run(far)} == {"OK"}
    every_second = [a_window(rng, 64, 8, scales if i % 2 == 0 else None) for i in range(9)]
    assert {status for status, *_ in run(every_second, breach_memory=0)} == {"OK"}
    replicas = Replicas(3, 20)
    found = [replicas.add(*window, settled=False) for window in every_second]
    assert all(one["replica/logp_abs_diff/mean"] < 0.02 for one in found[2:])


@pytest.mark.slow_unit
def test_heavy_tails_that_every_rank_has_are_chance(rng):
    """A sequence a rank, whose noise differs by a lognormal factor: the worst of 64 ranks is often far out."""
    config = ParityConfig()
    breaker, replicas, over = Breaker.from_config(config), Replicas(config.consecutive, config.breach_memory), 0
    for step in range(600):
        nats = TOKENS * np.exp(rng.standard_normal(64) - 0.5) * 0.016
        by_rank = np.stack([np.full(64, float(TOKENS)), nats * 0.02, nats, nats / TOKENS, nats / TOKENS], axis=-1)
        error = nats.std(ddof=1) / TOKENS / 8.0
        stats = {"effective_sequences": 64.0, "nonfinite_rate": 0.0, "floor/kl_k3": 1.0, "se/kl_k3": 1.0}
        stats |= {"floor/logp_abs_diff/mean": 0.0165, "se/logp_abs_diff/mean": error}
        found = replicas.add(by_rank, stats)
        over += max(replicas._bounds[-1][:, 1]) > 3 * 0.0165
        assert str(breaker.judge(step, MismatchStats(1, 1, 1, 0, stats | found)).status) == "OK"
    assert over > 60  # of one rank or another, in that window


def test_another_rank_each_time_is_chance_and_one_token_of_any_size_is_nothing(rng):
    windows = []
    for step in range(12):
        scales = np.ones(64)
        scales[step % 64] = 10.0
        windows.append(a_window(rng, 64, 8, scales))
    assert {status for status, *_ in run(windows)} == {"OK"}
    windows = [a_window(rng, 64, 8) for _ in range(12)]
    for by_rank, _ in windows:
        by_rank[5] += 0.0, np.expm1(20.0) - 20.0, 20.0, 20.0, 0.0
        by_rank[6] += 0.0, np.expm1(-30.0) + 30.0, 30.0, 0.0, 30.0
    assert {status for status, *_ in run(windows)} == {"OK"}


def test_the_number_of_windows_is_the_settings_and_other_ranks_begin_anew(rng):
    scales = np.array([1.0, 1.0, 10.0, 1.0])
    sick = [a_window(rng, 4, 16, scales) for _ in range(6)]
    only = {"kl_k3": None, "logp_abs_diff/mean": None}
    assert run(sick[:1], consecutive=1, rules=only)[0][0] == "HALT"
    replicas = Replicas(2)
    assert [bool(replicas.add(*window)) for window in sick[:2]] == [False, True]
    assert not replicas.add(*a_window(rng, 8, 16))  # resumed on other ranks
    assert not replicas.add(None, sick[0][1])
    assert not replicas.add(sick[0][0], {})


def test_a_rank_without_tokens_is_none_of_them(rng):
    by_rank, stats = a_window(rng, 4, 16)
    by_rank[1] = 0.0, 0.0, 0.0, -np.inf, -np.inf
    replicas = Replicas(1)
    found = replicas.add(by_rank, stats)
    assert found["replica/kl_k3"] < 2e-4
    assert found["replica/rank"] != 1


def test_sums_know_what_is_told_of_their_rank():
    sums = MismatchSums.zeros()
    sums.bump(tokens=3, k3=0.5, abs_delta=0.25)
    assert sums.replica.tolist() == [3.0, 0.5, 0.25]
    assert sums.by_rank is None
    sums.by_rank = torch.ones(2, 5)
    assert sums.cpu().by_rank is not None


def test_a_ranks_lower_bound_by_hand():
    by_rank = [  # tokens, Σ k3, Σ |Δ|, max Δ, max -Δ
        [50.0, 0.9, 6.0, 0.2, 0.1], [30.0, 0.4, 4.0, 0.05, 0.4], [2.0, 0.5, 1.4, 0.7, 0.7],
        [9.0, 0.1, 1e3, 400.0, 0.0], [1.0, 0.4, 0.6, 0.6, -0.6], [0.0, 0.0, 0.0, -math.inf, -math.inf],
    ]  # fmt: skip
    stats = {"effective_sequences": 12.5, "se/kl_k3": 1e-3, "se/logp_abs_diff/mean": 4e-3}
    replicas = Replicas(1)
    replicas.add(np.array(by_rank), stats)
    t, n = scipy.stats.t.ppf(1 - 0.01 / 6, 11.5), sum(row[0] for row in by_rank)
    for found, (tokens, k3, nats, most, least) in zip(replicas.state()[0], by_rank, strict=True):
        if tokens < 2:
            assert found == [None, None]
            continue
        worst = max(math.expm1(min(most, 300)) - min(most, 300), math.expm1(-least) + least)
        for bound, total, largest, error in ((found[0], k3, worst, 1e-3), (found[1], nats, max(most, least), 4e-3)):
            mean = max(total - largest, 0.0) / (tokens - 1)
            assert bound == pytest.approx(mean - t * error * math.sqrt(n / tokens), rel=1e-5)


@pytest.mark.parametrize(("ranks", "windows", "seed"), [(5, 12, 3), (5, 12, 4), (5, 12, 5), (5, 12, 8), (2, 20, 4)])
def test_what_a_rank_reaches_now_and_then_is_judged_as_a_loop_judges_it(ranks, windows, seed):
    """Of the fewest windows, from ``consecutive`` on, that are too many for chance: what the rank reached in them."""
    bounds, sick = np.random.default_rng(seed).standard_normal((windows, ranks, 2)), ranks // 2 + (ranks > 2)
    bounds[seed % 2 :: 2, sick] += 3.0 + seed % 6
    bounds[-1, sick] += 3.0
    found, told = Replicas(3, 10)._now_and_then(bounds)
    expected, reached_in = np.full((ranks, 2), -np.inf), np.zeros(ranks)
    for i in range(2):
        for m in range(3, windows + 1):
            reached = [min(sorted(bounds[:, r, i])[-m], bounds[-1, r, i]) for r in range(ranks)]
            rank = int(np.argmax(reached))
            own = (bounds[:, rank, i] >= reached[rank]).sum()
            others = (np.delete(bounds[..., i], rank, axis=1) >= reached[rank]).sum()
            if ranks * scipy.stats.poisson.sf(own - 1, others / (ranks - 1)) <= 1e-6:
                expected[rank, i], reached_in[rank] = reached[rank], own
                break
    assert np.isfinite(expected).any()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(told, reached_in)
