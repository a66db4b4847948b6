"""Which sequences of a batch stand apart from all others, and where two models' layers part."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from trl_parity.diagnosis.distribution import Distribution, Tokens
from trl_parity.diagnosis.probes import some_requests
from trl_parity.diagnosis.probes.base import Unexplained
from trl_parity.diagnosis.probes.parted_layers import first_parted
from trl_parity.diagnosis.probes.some_requests import set_apart
from trl_parity.records import SamplingSettings

FLOOR = 1e-4


@dataclass
class Part:
    distribution: Distribution


def sums_of(means, tokens=20.0):
    means = torch.tensor(means, dtype=torch.float64)
    return torch.stack([means * tokens, torch.full_like(means, tokens)], dim=1)


def noise(count, seed, scale=1e-5):
    """Mean squares of normal noise, as a healthy sequence's drift is spread."""
    normal = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * normal.square().mean(1)).tolist()


@pytest.mark.parametrize("affected", [2, 8, 30])
def test_sequences_that_drift_where_others_do_not_are_found(affected):
    torch.manual_seed(0)
    where = torch.randperm(32)[:affected]
    means = torch.tensor(noise(32, 1))
    means[where] = torch.linspace(0.002, 0.05, affected)
    expected = torch.zeros(32, dtype=torch.bool)
    expected[where] = True
    found = set_apart(sums_of(means.tolist()), FLOOR)
    assert torch.equal(found, expected)


def test_no_sequence_stands_apart_where_all_drift_or_none():
    for seed in range(50):
        assert set_apart(sums_of(noise(32, seed)), FLOOR) is None  # healthy: all below the floor
        assert set_apart(sums_of(noise(32, seed, 1e-2)), FLOOR) is None  # all drift
    spread = torch.logspace(-5, -1, 32).tolist()  # over four decades, without a gap
    assert set_apart(sums_of(spread), FLOOR) is None


def test_one_sequence_is_no_kind_of_request_and_none_without_tokens_counts():
    means = noise(31, 2)
    assert set_apart(sums_of([*means, 0.05]), FLOOR) is None
    assert set_apart(sums_of([1e-5, 1e-5, 0.05]), FLOOR) is None
    sums = sums_of([*noise(30, 2), 0.05, 0.05, 0.0, 0.0])
    sums[-2:] = 0.0
    assert set_apart(sums, FLOOR).nonzero()[:, 0].tolist() == [30, 31]


def test_the_layer_at_which_two_models_part():
    gaps = {"layers.0.self_attn": 0.004, "layers.0.mlp": 0.005, "layers.0": 0.006, "layers.1.self_attn": 0.2,
            "layers.1": 0.1, "layers.2.mlp": 0.3}  # fmt: skip
    words = first_parted(gaps, 0.03)
    assert "part at layers.1.self_attn" in words
    assert "differs by 0.2 of its size" in words
    assert "by 0.006 of its size at most" in words


@pytest.mark.parametrize(
    "gaps",
    [
        {},
        {"layers.0": 0.004, "layers.1": 0.02},  # rounding
        {"layers.0": 0.01, "layers.1": 0.02, "layers.2": 0.04, "layers.3": 0.08},  # grows, and begins nowhere
    ],
)
def test_no_layer_is_named_where_none_stands_out(gaps):
    assert first_parted(gaps, 0.03) == ""


def test_a_first_output_that_parts_has_nothing_before_it():
    words = first_parted({"h.0.ln_1": 0.5, "h.0.attn": 0.1}, 0.03)
    assert words.endswith("part at h.0.ln_1, whose output differs by 0.5 of its size")


@pytest.mark.parametrize(
    ("drawn", "raw_left", "tokens", "cause", "most"),
    [
        (1.0, 0.0, 800, "temperature", 1.0),  # what a raw mode reports, too, but drawn so
        (0.5, 0.0, 800, "raw_logprobs", 1.0),
        (0.5, 0.8, 800, None, None),  # nor raw: the numbers are of some other law than the tokens
        (0.7, 0.0, 4, "temperature", 0.5),
        (0.7, 0.8, 4, "temperature", 1.0),
    ],
)
def test_some_sequences_drawn_as_configured_report_raw_log_probs(monkeypatch, drawn, raw_left, tokens, cause, most):
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(tokens, 30, generator=generator)
    targets = (logits / drawn).softmax(-1).multinomial(1, generator=generator)[:, 0]
    none = torch.zeros(tokens, 1, dtype=torch.bool)
    of_part = Tokens(logits, targets, torch.zeros(tokens), none.long(), none, none, torch.arange(tokens) // 2)
    plain = Distribution(sampling=SamplingSettings(temperature=0.5))
    law = replace(plain, sampling=SamplingSettings(temperature=1.0))
    monkeypatch.setattr(
        some_requests, "mean_residual", lambda _, part: raw_left if part.distribution.report != plain.report else 1.0
    )
    batch = SimpleNamespace(floor=0.001, words=lambda law, plain: "temperature 1")
    part = Part(plain)
    if cause is None:
        with pytest.raises(Unexplained, match="their tokens speak for 0"):
            some_requests._drawn_or_said(batch, part, of_part, law)
        return
    found, told, bound = some_requests._drawn_or_said(batch, part, of_part, law)
    assert (found, bound) == (cause, most)
    assert told.report == ("raw_logprobs" if cause == "raw_logprobs" else plain.report)
