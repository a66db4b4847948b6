"""The sequential tests in a run: judged live, replayed and resumed alike, and halting by the rules on them."""

import json
import math

import numpy as np
import pytest
import torch
from support.windows import window

from trl_parity import ParityConfig, ParityMonitor
from trl_parity.errors import ConfigError
from trl_parity.judging.breaker import Breaker
from trl_parity.results.rejudge import read_windows, rejudge
from trl_parity.verdict import Status

ROWS, COLUMNS, SCALE = 32, 32, 0.02


def log_step(monitor, step, rng, bias=0.0, scale=SCALE):
    """A window whose mean ratio is 1 but for ``bias``."""
    delta = torch.from_numpy(rng.normal(bias - scale**2 / 2, scale, (ROWS, COLUMNS)))
    rollout = torch.full_like(delta, -1.0)
    return monitor.log_step(step, rollout_logprobs=rollout, trainer_logprobs=rollout + delta)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_faint_bias_that_no_rule_sees_halts_and_a_replay_says_the_same(tmp_path, rng):
    """The mean ratio is 1.006: the rule on honesty's interval lets 0.005 more than chance be."""
    monitor = ParityMonitor(output_dir=tmp_path, action="log")
    verdicts = [log_step(monitor, step, rng) for step in range(1, 31)]
    assert {v.status for v in verdicts} <= {Status.OK, Status.WARN}
    verdicts += [log_step(monitor, step, rng, bias=0.006) for step in range(31, 61)]
    monitor.close()
    halted = next(v for v in verdicts if v.halted)
    assert halted.breaches == ("evidence/honesty",)
    assert halted.step <= 45
    assert halted.stats["evidence/onset"] == pytest.approx(31, abs=2)
    rows = read_windows(tmp_path)
    replayed = [v for _, v in rejudge(rows, ParityConfig(floor_tokens=0))]
    assert [(v.status, v.breaches, v.reason) for v in replayed] == [(v.status, v.breaches, v.reason) for v in verdicts]
    assert replayed[-1].stats["evidence/honesty"] == verdicts[-1].stats["evidence/honesty"]
    assert not any(v.halted for _, v in rejudge(rows, ParityConfig(floor_tokens=0, evidence_alpha=1e-60)))
    dropped = ParityConfig(floor_tokens=0, rules={"evidence/honesty": None})
    assert not any(v.halted for _, v in rejudge(rows, dropped))
    watched = ParityConfig(floor_tokens=0, rules={"honesty_gap": None, "evidence/honesty": {"warn_only": True}})
    assert {v.status for _, v in rejudge(rows, watched)} <= {Status.OK, Status.WARN}


def test_a_healthy_run_is_silent(rng):
    monitor = ParityMonitor(action="log")
    verdicts = [log_step(monitor, step, rng) for step in range(60)]
    assert {v.status for v in verdicts} == {Status.OK}
    assert max(v.stats["evidence/honesty"] for v in verdicts) < 2


def test_a_run_goes_on_with_its_evidence_after_a_checkpoint_and_an_older_one_has_none(rng):
    first = ParityMonitor(action="log")
    before = first.state()
    assert "evidence" not in before
    for step in range(20):
        log_step(first, step, rng, bias=0.004)
    again, old = ParityMonitor(action="log"), ParityMonitor(action="log")
    state = json.loads(json.dumps(first.state(), allow_nan=False))
    assert again.load_state(state)
    assert again.evidence.scalars() == first.evidence.scalars()
    assert old.load_state({name: part for name, part in state.items() if name != "evidence"})
    assert old.evidence.scalars()["evidence/honesty"] is None


def test_what_was_not_measured_is_no_evidence():
    monitor = ParityMonitor(action="log")
    known = {"ratio__clipped": 0.9, "ratio__clipped_square": 0.01}
    for step, stats in enumerate([None, window(num_errors=1, **known), window(nonfinite_rate=None, **known)] * 5):
        verdict = monitor.judge(step, stats)
        assert not verdict.halted
    assert monitor.evidence.scalars()["evidence/honesty"] is None


def test_evidence_halts_alone_whatever_consecutive_is_and_not_in_the_warm_up():
    decided = window(evidence__honesty=4.1)
    for consecutive in (1, 3, 9):
        breaker = Breaker.from_config(ParityConfig(consecutive=consecutive, floor_tokens=0))
        assert breaker.judge(1, decided).halted
    warming = Breaker.from_config(ParityConfig(warmup=1, floor_tokens=0))
    assert [str(warming.judge(step, decided).status) for step in (1, 2)] == ["BREACH", "HALT"]
    changed = Breaker.from_config(ParityConfig(floor_tokens=0))
    assert [str(changed.judge(step, window(evidence__change=9.0)).status) for step in range(5)] == ["WARN"] * 5


def test_the_rate_of_false_alarms_is_the_limit_unless_the_rule_sets_its_own():
    def limits(**settings):
        rules = {rule.stat: rule for rule in ParityConfig(**settings).resolved_rules()}
        return [rules[f"evidence/{test}"].limit for test in ("honesty", "drift", "change")]

    assert limits() == [4.0] * 3
    assert limits(evidence_alpha=0.01) == pytest.approx([2.0] * 3)
    assert limits(evidence_alpha=1e-6, rules={"evidence/drift": {"limit": 5}}) == pytest.approx([6.0, 5.0, 6.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evidence_alpha": 0}, "more than 0 and less than 1"),
        ({"evidence_alpha": 1.0}, "more than 0 and less than 1"),
        ({"evidence_floor_factor": 0.9}, "a number >= 1"),
        ({"evidence_effects": {"honest": 0.1}}, "did you mean 'honesty'"),
        ({"evidence_effects": {"honesty": -0.1}}, "Expected a number > 0"),
        ({"evidence_effects": {"kl_k3": math.inf}}, "Expected a number > 0"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ParityConfig(**settings)


def test_effects_reach_the_tests(rng):
    monitor = ParityMonitor(action="log", rules={"honesty_gap": None}, evidence_effects='{"honesty": 0.05}')
    assert not any(log_step(monitor, step, rng, bias=0.006).halted for step in range(30))
    assert monitor.config.to_dict()["evidence_effects"] == {"honesty": 0.05}


def test_a_window_that_speaks_against_a_decision_is_not_condemned_by_it_and_one_that_speaks_for_it_is(rng):
    monitor = ParityMonitor(action="log", rules={"honesty_gap": None})
    step = 0
    while not log_step(monitor, step, rng, bias=0.008).halted:
        step += 1
        assert step < 40
    healed = log_step(monitor, 100, rng)
    assert healed.status is Status.OK
    assert healed.stats["evidence/honesty"] == 0.0  # and the decision stands
    assert log_step(monitor, 101, rng, bias=0.008).halted
    for step in range(102, 105):
        assert log_step(monitor, step, rng).status is Status.OK
