"""What was measured and is no finite number is never healthy, in a trainer and in a loop of one's own alike."""

import math

import pytest
import torch
from support import trainer_loop
from support.windows import window

from trl_parity import ParityCallback, ParityConfig, ParityMonitor
from trl_parity.judging.breaker import read
from trl_parity.records import ScoredBatch

ROWS, COLUMNS = 8, 64


def entropy_of(bad, which):
    entropy = torch.ones(ROWS, COLUMNS)
    if which == "all":
        entropy[:] = bad
    elif which == "one":
        entropy[3, 5] = bad
    return entropy


def of_monitor(tmp_path, entropies):
    monitor = ParityMonitor(consecutive=9, bootstrap_samples=10, action="log")
    rollout = torch.full((ROWS, COLUMNS), -1.0)
    for step, entropy in enumerate(entropies, 1):
        monitor.log_step(step, rollout_logprobs=rollout, trainer_logprobs=rollout, entropy=entropy)
    return monitor.verdicts


def of_callback(tmp_path, entropies, monkeypatch):
    monkeypatch.setattr("trl_parity.live.callback.prepare_cpu_engine", lambda: False)
    rollout = torch.full((ROWS, COLUMNS), -1.0)
    left = iter(entropies)

    def score(self, batch, token_budget):
        mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
        return ScoredBatch(
            mask=mask, rollout_logprobs=rollout, trainer_logprobs=rollout, own_logprobs=rollout, entropy=next(left)
        )

    monkeypatch.setattr(trainer_loop.GivenCapture, "score", score)
    usual = {"floor_tokens": 0, "diagnose": "never", "rich_every_n_windows": 0}
    watch = ParityCallback(consecutive=9, bootstrap_samples=10, action="log", **usual)
    trainer_loop.Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda _: 0.0).run(len(entropies))
    return watch.verdicts


@pytest.mark.parametrize("which", ["one", "all"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_entropy_that_is_no_number_breaches_and_later_windows_are_judged(tmp_path, monkeypatch, bad, which):
    entropies = [entropy_of(bad, kind) for kind in ("none", "none", "none", which, "none", "none")]
    for verdicts in (of_monitor(tmp_path, entropies), of_callback(tmp_path, entropies, monkeypatch)):
        assert [str(v.status) for v in verdicts] == ["OK"] * 3 + ["BREACH"] + ["OK"] * 2
        assert "entropy/nonfinite_rate" in verdicts[3].breaches


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_rule_takes_what_is_not_finite_for_healthy(value):
    for rule in ParityConfig().resolved_rules():
        for floor in (None, 1e-4):
            stats = window().values_by_name | {rule.stat: value, f"floor/{rule.stat}": floor}
            reading = read(rule, stats)
            assert reading.over, (rule.stat, floor)
