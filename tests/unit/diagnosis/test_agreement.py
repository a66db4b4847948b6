"""What is said where engine and trainer agree: nothing, unless the batch teaches nothing for another reason."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_parity.diagnosis import diagnose
from trl_parity.diagnosis.agreement import agreed, counts, sampled_law, unseen_law
from trl_parity.diagnosis.distribution import Distribution, Tokens
from trl_parity.records import NamedCause, SamplingSettings
from trl_parity.scoring.sampling import kept_mask

DETAILS = {"residual": 1e-7, "floor": 2e-7}


def batch(weights, lengths=(3, 3, 2, 0)):
    """Four completions of four prompts; ``weights`` as TRL keeps them, (4, 1) or (4, 3)."""
    mask = torch.tensor([[t < n for t in range(3)] for n in lengths])
    prompts = torch.arange(4)[:, None]
    return SimpleNamespace(
        engine_mask=mask, completion_mask=mask, completion_ids=torch.ones(4, 3, dtype=torch.long), prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts), rollout_logprobs=torch.full((4, 3), -1.0),
        correction_weights=weights, image_keys=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([[0.0], [float("nan")], [0.7], [0.0]]),  # by sequence; the last has no token
        torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.7, 0.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_a_correction_that_drops_most_sequences_is_named_over_ranks(weights):
    row = counts(batch(weights))
    assert row[3:] == [3, 2, 8]
    healthy = counts(batch(torch.ones(4, 1)))
    told = agreed(7, [row, row], DETAILS)
    assert (told.cause, told.confidence, told.step) == ("correction_weights", 1.0, 7)
    assert "4 of 6 sequences, 3 tokens long on average, have weight 0" in told.summary
    assert "engine and trainer are one policy" in told.summary
    assert "token_truncate" in told.fix
    assert agreed(7, [row, healthy], DETAILS).cause == "unknown"  # 2 of 6


def test_without_a_correction_there_is_nothing_to_explain():
    told = agreed(7, [counts(batch(None))], DETAILS)
    assert (told.cause, told.confidence, told.fix) == ("unknown", 0.0, "")
    assert told.summary.startswith("Nothing to explain")


def test_what_the_windows_tell_by_themselves_is_named_after_what_the_batch_tells():
    moved = NamedCause(cause="reference_drift", explained=0.0, confidence=1.0, finding="the base moved", fix="beta=0.")
    told = agreed(7, [counts(batch(None))], DETAILS, health=(moved,))
    assert (told.cause, told.fix, told.confidence) == ("reference_drift", "beta=0.", 1.0)
    assert "The base moved. The drift (1e-07, Huber) is within the noise floor" in told.summary
    assert told.summary.endswith("engine and trainer are one policy.")
    dropped = counts(batch(torch.zeros(4, 1)))
    both = agreed(7, [dropped], DETAILS, health=(moved,))
    assert [cause.cause for cause in both.causes] == ["correction_weights", "reference_drift"]
    assert both.summary.endswith("Then reference_drift: the base moved.")
    again = NamedCause(cause="correction_weights", explained=0.0, confidence=1.0, finding="the same", fix="")
    assert len(agreed(7, [dropped], DETAILS, health=(again,)).causes) == 1


@pytest.mark.parametrize(
    ("asked", "mode", "cause"),
    [
        ({"top_p": 0.7}, "raw_logprobs", "truncated_sampling"),
        ({"min_p": 0.2}, "raw_logits", "truncated_sampling"),
        ({"repetition_penalty": 1.3}, "raw_logprobs", "penalties"),
        ({"top_p": 0.7}, "processed_logprobs", "unknown"),
        ({}, "raw_logprobs", "unknown"),
    ],
)
def test_what_raw_log_probs_know_nothing_of_is_named_by_the_requests(asked, mode, cause):
    rollout = batch(None)
    rollout.sampling = SamplingSettings(**asked)
    engine = SimpleNamespace(settings=lambda: {"logprobs_mode": mode})
    one = SimpleNamespace(rollout=rollout, engine=engine, sharded=True)
    told = agreed(7, [counts(rollout)], DETAILS, unseen_law(one))
    assert told.cause == cause
    assert "one policy" not in told.summary
    one.engine = None
    assert unseen_law(one) == ("", "")


@pytest.mark.parametrize(
    ("settings", "cause", "words"),
    [
        ({}, "", ""),
        ({"top_k": 8}, "truncated_sampling", "keep to top_k 8"),
        ({"top_p": 0.8}, "truncated_sampling", "keep to top_p 0."),
        ({"min_p": 0.1}, "truncated_sampling", "keep to min_p 0.1"),
        ({"temperature": 0.6}, "temperature", "speak for temperature 0."),
        ({"temperature": 2.0}, "temperature", "speak for temperature "),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_what_nobody_asked_for_and_raw_log_probs_hide_is_told_by_the_tokens_themselves(settings, cause, words, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(256, 60, generator=generator) * 1.5
    law = SamplingSettings(**settings)
    scaled = logits / law.temperature
    kept = kept_mask(scaled, law)
    targets = scaled.masked_fill(~kept, -torch.inf).softmax(-1).multinomial(1, generator=generator)[:, 0]
    none = torch.zeros(256, 1, dtype=torch.bool)
    tokens = Tokens(logits, targets, torch.zeros(256), none.long(), none, none, torch.arange(256) // 16)
    found, told = sampled_law(tokens, Distribution(sampling=SamplingSettings()))
    assert found == cause
    assert words in told


def gone():
    raise ConnectionError("the server is gone")


def test_rows_that_are_one_draw_count_as_one_over_ranks(monkeypatch):
    rollout = batch(None, lengths=(3, 3, 3, 3))
    rollout.prompt_ids[:2] = 7  # two rows of one prompt with one completion
    runner = diagnose._ProbeRunner(SimpleNamespace(rollout=rollout), (), None, 1)
    assert runner.copies() == 1.5  # (2² + 1 + 1) / 4
    monkeypatch.setattr(diagnose, "gather_rows", lambda rows: [*rows, {"told": [28, 2, 0.3, 8]}])
    runner = diagnose._ProbeRunner(SimpleNamespace(rollout=rollout), (), None, 2)
    assert runner.copies() == 1.0 + 2.0 * 3.0 / 12.0
    monkeypatch.setattr(diagnose, "gather_rows", lambda rows: [*rows, {"told": [28, 28, 0.3, 8]}])
    assert runner.copies() == math.inf  # one seed for all requests: other prompts' rows hang together, too


@pytest.mark.parametrize("engine", [None, SimpleNamespace(settings=gone)])
def test_a_rank_that_knows_no_engine_says_what_the_others_say(monkeypatch, engine):
    other = {"counts": [0] * 6, "unseen": ["penalties", "words"]}
    monkeypatch.setattr(diagnose, "gather_rows", lambda rows: [*rows, other])
    rollout = batch(None)
    rollout.sampling = SamplingSettings(repetition_penalty=1.3)
    runner = diagnose._ProbeRunner(SimpleNamespace(rollout=rollout, engine=engine), (), None, 2)
    rows, unseen = runner.agreement()
    assert len(rows) == 2
    assert agreed(7, rows, DETAILS, unseen).cause == "penalties"
