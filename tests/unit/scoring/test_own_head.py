"""How far a head of the forward's dtype rounds: which tokens and passes tell it, and what they tell."""

from dataclasses import replace

import pytest
import torch
from support.head import make, oracle_logits

from trl_parity.scoring.head import score_tokens
from trl_parity.scoring.own_head import OwnHeadRounding


def measured(rounding, hidden, targets, head, off=0.0):
    rounding.begin_pass()
    rounding.add(hidden, targets, head, score_tokens(hidden, targets, head).logprobs + off, 1 << 20)
    return rounding.nats


def test_it_is_what_rounding_the_logits_does_to_tokens_all_over_the_pass():
    hidden, targets, head = make(600, 32, 90, std=8.0, dtype=torch.bfloat16)
    hidden[300:] *= 8  # whose logits are rounded far more
    exact = oracle_logits(hidden, head)
    gaps = exact.to(torch.bfloat16).double().log_softmax(-1) - exact.log_softmax(-1)
    gap = gaps.gather(1, targets[:, None])[:, 0].abs()[torch.arange(256) * 600 // 256]
    assert measured(OwnHeadRounding(), hidden, targets, head) == pytest.approx(float(gap.mean()), rel=0.01)
    parts = OwnHeadRounding()
    parts.begin_pass()  # mini-batches: all of the first, of the second as many as are still wanted, of the third none
    for some in (slice(0, 100), slice(100, 600), slice(0, 600)):
        parts.add(hidden[some], targets[some], head, score_tokens(hidden[some], targets[some], head).logprobs, 1 << 20)
    gap = gaps.gather(1, targets[:, None])[:, 0].abs()
    taken = torch.cat([torch.arange(100), 100 + torch.arange(156) * 500 // 156])
    assert parts.nats == pytest.approx(float(gap[taken].mean()), rel=0.01)


def exact_head():
    """Small whole numbers: bf16 rounds none of the logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (9, 8), generator=generator).bfloat16()
    weight = torch.randint(-2, 3, (20, 8), generator=generator).bfloat16()
    return hidden, torch.arange(9), replace(make(1, 8, 20)[2], weight=weight)


def test_the_first_three_passes_are_measured_then_one_of_fifty_and_what_is_older_counts_half():
    rounding, batch = OwnHeadRounding(), exact_head()
    assert rounding.nats == 0.0
    found = [measured(rounding, *batch, off=(-1) ** i * (i + 1.0)) for i in range(101)]
    assert [i for i in range(101) if i == 0 or found[i] != found[i - 1]] == [0, 1, 2, 50, 100]
    moved = tokens = 0.0
    for i in (0, 1, 2, 50, 100):
        moved, tokens = moved / 2 + i + 1, tokens / 2 + 1
        assert found[i] == pytest.approx(moved / tokens, rel=1e-6)


def test_a_head_in_fp32_rounds_nothing_and_autocast_says_what_a_head_computes_in():
    hidden, targets, head = make(40, 16, 90, std=8.0)
    assert measured(OwnHeadRounding(), hidden, targets, head, off=1.0) == 0.0
    with torch.autocast("cpu", torch.bfloat16):
        assert measured(OwnHeadRounding(), hidden, targets, head) > 1e-3


def test_a_token_without_a_number_moves_nothing():
    hidden, targets, head = exact_head()
    hidden[4] = torch.nan
    assert measured(OwnHeadRounding(), hidden, targets, head, off=0.9) == pytest.approx(0.8, rel=1e-6)


def test_a_policy_keeps_its_own():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert OwnHeadRounding.of(one) is OwnHeadRounding.of(one) is not OwnHeadRounding.of(other)
