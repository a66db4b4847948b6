"""Answers that stopped and are masked as truncated; a reference that is not the model training began with."""

from types import SimpleNamespace

import pytest
import torch

from trl_parity import ParityConfig
from trl_parity.engine.requests import Request
from trl_parity.judging.breaker import Breaker
from trl_parity.metrics.statistics import compute
from trl_parity.metrics.sums import MismatchSums
from trl_parity.report.messages import alert_text
from trl_parity.trainers.grpo import GRPOCapture
from trl_parity.verdict import MismatchStats

EOS, PAD, STOP = 2, 0, 9


def capture_of(completions=(), masks=True, output=None):
    """``completions``: tokens and vLLM's reason."""
    capture = object.__new__(GRPOCapture)
    capture.trainer = SimpleNamespace(
        mask_truncated_completions=masks, eos_token_ids=[EOS], processing_class=SimpleNamespace(pad_token_id=PAD)
    )
    outputs = [
        SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, finish_reason=reason)])
        for tokens, reason in completions
    ]
    capture.requests, capture.output = [Request(1.0, None, outputs)], output or {}
    return capture


def judged(found, name):
    sums = MismatchSums.zeros()
    sums.bump(**found)
    stats = MismatchStats(1, 1, 1, 0, {name: compute(sums).get(name), "nonfinite_rate": 0.0})
    return Breaker.from_config(ParityConfig(floor_tokens=0)).judge(1, stats)


def test_answers_that_end_by_a_stop_string_are_flagged():
    completions = [((5, STOP), "stop"), ((5, 6, EOS), "stop"), ((5, 6, 7, 8), "length"), ((7, STOP), "stop")]
    found = capture_of(completions).stopped()
    assert found == {"stopped": 3, "stopped_masked": 2}
    verdict = judged(found, "completions/stopped_but_masked")
    assert verdict.warnings == ("completions/stopped_but_masked",)
    assert "67% of the completions that the engine ended are masked" in alert_text(verdict)


def test_answers_that_were_cut_off_are_not_flagged():
    completions = [((5, 6, 7, 8), "length"), ((5, EOS), "stop")]
    found = capture_of(completions).stopped()
    assert found == {"stopped": 1, "stopped_masked": 0}
    assert not judged(found, "completions/stopped_but_masked").warnings


@pytest.mark.parametrize("masks", [True, False])
def test_it_is_not_known_of_a_server_and_nothing_is_wrong_where_nothing_is_masked(masks):
    capture = capture_of([((5, STOP), "stop")], masks)
    if masks:
        capture.requests = [Request(1.0, {}, {"completion_ids": [[5, STOP]]})]
    assert capture.stopped() == {}
    assert judged({}, "completions/stopped_but_masked").stats["completions/stopped_but_masked"] is None
    capture.requests = []
    assert capture.stopped() == {}


@pytest.mark.parametrize(("gap", "warns"), [(0.5, True), (0.01, False), (0.0, False)])
def test_a_reference_that_is_not_the_first_policy_is_flagged(gap, warns):
    policy = torch.full((2, 3), -1.0)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    output = {"old_per_token_logps": policy, "ref_per_token_logps": policy - gap, "completion_mask": mask}
    found = capture_of(output=output).start_of_reference()
    assert found["reference_tokens"] == 5
    verdict = judged(found, "reference/start_kl_k3")
    k3 = torch.expm1(torch.tensor(-gap, dtype=torch.float64)) + gap
    assert verdict.stats["reference/start_kl_k3"] == pytest.approx(float(k3), abs=1e-7)
    assert verdict.warnings == (("reference/start_kl_k3",) if warns else ())
    assert ("Before any update the policy is 0.107 nats" in alert_text(verdict)) == warns


def test_without_a_reference_nothing_is_known():
    assert capture_of(output={"old_per_token_logps": torch.zeros(1, 1)}).start_of_reference() == {}
