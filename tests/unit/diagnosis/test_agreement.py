"""What is said where engine and trainer agree: nothing, unless the batch teaches nothing for another reason."""

from types import SimpleNamespace

import pytest
import torch

from trl_parity.diagnosis import diagnose
from trl_parity.diagnosis.agreement import agreed, counts, unseen_law
from trl_parity.records import SamplingSettings

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
    told = agreed(7, [counts(rollout)], DETAILS, unseen_law(rollout, engine))
    assert told.cause == cause
    assert "one policy" not in told.summary
    assert unseen_law(rollout, None) == ("", "")


def gone():
    raise ConnectionError("the server is gone")


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
