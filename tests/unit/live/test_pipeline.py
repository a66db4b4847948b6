"""What follows when a window closes, in its order, without a trainer."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from trl_parity import ParityConfig, ParityMonitor
from trl_parity.judging.noise_floor import SOURCES
from trl_parity.live.judge import RunJudge
from trl_parity.live.pipeline import Pipeline, Surroundings
from trl_parity.live.window import UnloggedWindows
from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch


def scored(noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(16, 40, generator=generator)
    trainer = rollout + noise * torch.randn(16, 40, generator=generator)
    return ScoredBatch(
        mask=torch.ones(16, 40, dtype=torch.bool), rollout_logprobs=rollout, trainer_logprobs=trainer,
        own_logprobs=trainer, entropy=None,
    )  # fmt: skip


class Recording(Surroundings):
    """Tells in which order it was asked."""

    accounts = True

    def __init__(self, judge):
        self.judge, self.seen = judge, []

    def check_engine(self):
        self.seen.append("engine")

    def floor_sums(self):
        self.seen.append("floor")
        return {name: [self.judge.sums_of(scored(1e-3), 0)] for name in SOURCES}

    def on_verdict(self, verdict, sums):
        self.seen.append(f"verdict {verdict.status}")

    def diagnose(self, verdict):
        self.seen.append("diagnose")
        if verdict.halted:
            with self.pipeline.stopwatch.account("diagnosis"):
                time.sleep(0.05)

    def announce(self, verdict):
        self.seen.append("announce")
        return "text"


def run(noises, **settings):
    judge = RunJudge(ParityConfig(**settings), measured_floor=True)
    surroundings = Recording(judge)
    pipeline = surroundings.pipeline = Pipeline(judge, surroundings)
    for step, noise in enumerate(noises, 1):
        pipeline.window.add(judge.sums_of(scored(noise, step), 0), "")
        pipeline.close_window(step)
    return judge, surroundings, pipeline


def test_a_window_goes_from_floor_to_verdict_to_diagnosis_to_announcement():
    _, surroundings, pipeline = run([1.0], consecutive=1)
    assert surroundings.seen == ["engine", "floor", "verdict HALT", "diagnose", "announce"]
    assert (pipeline.window.start, pipeline.window.batches) == (1, 0)


def test_a_healthy_window_is_announced_to_nobody():
    _, surroundings, _ = run([1e-3, 1e-3])
    assert surroundings.seen == ["engine", "floor", "verdict OK", "diagnose", "engine", "verdict OK", "diagnose"]


def test_an_older_floor_is_measured_anew_before_a_breach_that_rests_on_it():
    _, surroundings, _ = run([1e-3, 1.0])
    assert surroundings.seen[4:] == ["engine", "floor", "verdict BREACH", "diagnose", "announce"]


def test_what_measuring_cost_is_in_the_window_but_what_the_floor_took_is_not():
    judge, _, _ = run([1e-3, 1e-3])
    stats = judge.verdicts[0].stats
    assert stats["cost/share"] is not None
    assert judge.floor.seconds > 0
    assert judge.floor.wall >= judge.floor.seconds


def test_what_a_diagnosis_took_is_in_the_next_window_and_in_no_other_account():
    judge, _, _ = run([1.0, 1e-3, 1e-3], consecutive=1, floor_tokens=0)
    told = [v.stats["cost/diagnosis_seconds"] for v in judge.verdicts]
    assert (told[0], told[2]) == (None, None)
    assert told[1] >= 0.05
    assert all(v.stats["cost/incident_seconds"] is None for v in judge.verdicts)
    unlogged = UnloggedWindows()
    for verdict in judge.verdicts:
        unlogged.add(verdict, judge.sums_of(scored(1e-3), 0))
    assert unlogged.scalars(judge)["cost/diagnosis_seconds"] == told[1]
    assert unlogged.scalars(judge)["breaker/status"] == 3


@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_a_loop_of_ones_own_is_judged_by_the_same_pipeline(noise):
    batch = scored(noise)
    monitor = ParityMonitor(consecutive=1)
    verdict = monitor.log_step(
        1, rollout_logprobs=batch.rollout_logprobs, trainer_logprobs=batch.trainer_logprobs, mask=batch.mask
    )
    judge = RunJudge(ParityConfig(consecutive=1), measured_floor=False)
    pipeline = Pipeline(judge, Surroundings())
    pipeline.window.add(judge.sums_of(batch, 0), "")
    assert pipeline.close_window(1) == verdict
    assert verdict.stats["cost/share"] is None  # nobody keeps an account there


class Sampling(Recording):
    """Scores a sample where the head's share says so, and the batch at hand in full when asked."""

    batch = None

    def all_tokens(self):
        self.seen.append("all tokens")
        sums, before = (measure(x) for x in (self.batch, halved(self.batch)))
        sums.additive.sub_(before.additive)
        return sums


def halved(batch):
    """Of which every other token was scored; the own head knows nothing of the noise."""
    weights = torch.zeros(batch.mask.shape)
    weights[:, ::2] = 2.0
    return replace(batch, weights=weights, own_logprobs=batch.rollout_logprobs)


def run_sampled(noises, **settings):
    judge = RunJudge(ParityConfig(**{"cost_budget": 0.005} | settings), measured_floor=True)
    surroundings = Sampling(judge)
    pipeline = surroundings.pipeline = Pipeline(judge, surroundings)
    shares = []
    for step, noise in enumerate(noises, 1):
        shares.append(pipeline.head.share)
        surroundings.batch = replace(scored(noise, step), keys=torch.arange(16))
        batch = surroundings.batch if shares[-1] == 1 else halved(surroundings.batch)
        sums = judge.sums_of(batch, 0)
        sums.bump(head_seconds=10.0, head_seconds_for_all=10.0)
        pipeline.window.add(sums, "")
        pipeline.close_window(step)
    return judge, surroundings, shares


def test_all_tokens_are_scored_again_before_a_sampled_window_is_condemned_and_after_it():
    judge, surroundings, shares = run_sampled([1e-3, 1e-3, 1.0, 1.0, 1e-3, 1e-3], breach_memory=0)
    assert [share < 1 for share in shares] == [False, True, True, False, False, True]
    assert surroundings.seen.count("all tokens") == 1
    third = surroundings.seen.index("all tokens")
    assert surroundings.seen[third - 1 : third + 3] == ["engine", "all tokens", "floor", "verdict BREACH"]
    coverage = [v.stats["cost/coverage"] for v in judge.verdicts]
    assert coverage == [1, 0.5, 1, 1, 1, 0.5]
    full = compute(measure(scored(1.0, 3)))
    for name in ("kl_k3", "trimmed/kl_k3", "honesty_low", "seq/ess", "se/kl_k3"):
        assert judge.verdicts[2].stats[name] == pytest.approx(full[name], rel=1e-9)


def test_after_a_sample_that_was_doubted_for_nothing_all_tokens_are_scored_once():
    """Another pass costs more than the head does."""
    judge, surroundings, shares = run_sampled([1e-3] * 4, rules={"cost/coverage": {"limit": 0.9, "below": True}})
    assert [str(v.status) for v in judge.verdicts] == ["OK"] * 4
    assert [share < 1 for share in shares] == [False, True, False, True]
    assert surroundings.seen.count("all tokens") == 2


def test_while_bets_on_the_entropy_are_winning_all_tokens_are_scored():
    judge, _, shares = run_sampled([1e-3] * 3)
    assert judge.calm
    assert shares[-1] < 1
    bets = judge.evidence.bets["entropy"]
    bets.update(4, np.full(bets.wealth.shape, math.log(50.0)), np.zeros(bets.wealth.shape))
    assert not judge.calm


def test_with_a_budget_of_one_all_tokens_are_scored_in_every_window():
    _, surroundings, shares = run_sampled([1e-3] * 3, cost_budget=1.0)
    assert shares == [1.0] * 3
    assert "all tokens" not in surroundings.seen


def test_a_window_that_a_rule_beside_the_mismatch_warns_of_is_sampled_all_the_same():
    judge, surroundings, shares = run_sampled([1e-3] * 3, rules={"copies": {"limit": 0.5, "warn_only": True}})
    assert {str(v.status) for v in judge.verdicts} == {"WARN"}
    assert max(shares[1:]) < 1
    assert "all tokens" not in surroundings.seen
