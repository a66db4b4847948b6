"""What follows when a window closes, in its order, without a trainer."""

import time

import pytest
import torch

from trl_parity import ParityConfig, ParityMonitor
from trl_parity.judging.noise_floor import SOURCES
from trl_parity.live.judge import RunJudge
from trl_parity.live.pipeline import Pipeline, Surroundings
from trl_parity.live.window import UnloggedWindows
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
