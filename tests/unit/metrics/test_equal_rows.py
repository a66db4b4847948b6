"""Equal completions of one prompt: told from what chance makes equal, within a rank and over ranks."""

import itertools
import math

import numpy as np
import pytest
import torch

from trl_parity import ParityConfig
from trl_parity.judging.breaker import Breaker
from trl_parity.metrics.equal_rows import equal_pairs, equal_scalars
from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import MismatchSums
from trl_parity.records import ScoredBatch

NAMES = ("completions/equal_pairs", "completions/duplicates", "completions/probability")


def counted(keys, prompts, logprobs):
    """By hand, pair by pair."""
    pairs = [(i, j) for i, j in itertools.combinations(range(len(keys)), 2) if prompts[i] == prompts[j]]
    expected = sum(0.5 * (math.exp(min(0, logprobs[i])) + math.exp(min(0, logprobs[j]))) for i, j in pairs)
    return len(pairs), sum(keys[i] == keys[j] for i, j in pairs), expected


@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_counted_as_by_hand(seed):
    generator = np.random.default_rng(seed)
    prompts = generator.integers(0, 4, 30)
    keys = 100 * prompts + generator.integers(0, 3, 30)
    logprobs = generator.normal(-2.0, 2.0, 30)
    pairs, equal, expected = equal_pairs(keys, prompts, logprobs)
    by_hand = counted(keys.tolist(), prompts.tolist(), logprobs.tolist())
    assert (pairs, equal) == by_hand[:2]
    assert expected == pytest.approx(by_hand[2])


def batch(keys, prompts, logprob, tokens=4):
    """Both sides agree; all completions of one log-prob."""
    shape = (len(keys), tokens)
    each = torch.full(shape, logprob / tokens)
    return ScoredBatch(
        mask=torch.ones(shape, dtype=torch.bool), rollout_logprobs=each, trainer_logprobs=each, own_logprobs=each,
        entropy=None, keys=torch.tensor(keys), prompts=torch.tensor(prompts),
    )  # fmt: skip


def window(*batches, group=None):
    total = MismatchSums.zeros()
    for one in batches:
        total.add_(measure(one))
    if group is not None:
        total.raise_to(group=group)
    return compute(total)


PROMPTS = [p for p in range(4) for _ in range(8)]


@pytest.mark.parametrize(
    ("keys", "logprob", "warns", "equal"),
    [
        (list(range(32)), -5.0, (), 0.0),  # independent draws
        (PROMPTS, -5.0, ("completions/duplicates",), 1.0),  # one seed for all
        (PROMPTS, -0.02, ("completions/probability",), 1.0),  # a policy with one answer, from its first window on
        ([k // 2 for k in range(32)], -0.7, (), 1 / 7),  # short answers: two of them
    ],
)
def test_a_window_of_equal_completions_warns_of_what_it_is(keys, logprob, warns, equal):
    stats = window(batch(keys, PROMPTS, logprob))
    assert stats["completions/equal_pairs"] == pytest.approx(equal)
    assert stats["completions/probability"] == pytest.approx(math.exp(logprob))
    verdict = Breaker.from_config(ParityConfig()).judge(1, stats)
    assert tuple(name for name in verdict.warnings if name in NAMES) == warns


def test_three_equal_pairs_of_a_few_are_no_duplicates():
    stats = window(batch([0, 0, 0, 1], [0] * 4, -5.0))
    assert stats["completions/equal_pairs"] == 0.5
    assert stats["completions/duplicates"] == 0.0


def test_groups_that_are_spread_over_ranks_are_told_by_the_rows_a_draw_has():
    """Eight ranks, each with one completion of each of 32 prompts."""
    prompts = list(range(32))
    same = [batch(prompts, prompts, -8.0) for _ in range(8)]
    apart = [batch([100 * rank + p for p in prompts], prompts, -8.0) for rank in range(8)]
    stats = window(*same, group=8)
    assert stats["completions/equal_pairs"] > 0.6  # of resamples: 1 in the mean
    assert stats["completions/duplicates"] > 0.5
    stats = window(*apart, group=8)
    assert stats["completions/equal_pairs"] == stats["completions/duplicates"] == 0.0
    assert window(*same)["completions/equal_pairs"] is None  # nobody says how large a group is


def test_without_prompts_or_tokens_nothing_is_told():
    assert equal_scalars(np.zeros(5), 1.0, 8.0) == {}
    alone = window(batch([0, 1, 2], [0, 1, 2], -1.0))
    assert alone["completions/equal_pairs"] is None
    assert alone["completions/probability"] == pytest.approx(math.exp(-1.0))
