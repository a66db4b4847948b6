"""One draw handed out several times, told from a policy that has nothing else to say."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_parity.diagnosis.duplicates import collisions, duplicates_in_words


def rollout(rows, logprob):
    """``rows``: prompt and completion of each, a list of ids; all tokens of one log-prob."""
    width = max(len(c) for _, c in rows)
    mask = torch.tensor([[t < len(c) for t in range(width)] for _, c in rows])
    ids = torch.tensor([[*c, *[0] * (width - len(c))] for _, c in rows])
    prompts = torch.tensor([[p] for p, _ in rows])
    return SimpleNamespace(
        engine_mask=mask, completion_mask=mask, completion_ids=ids, prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts), rollout_logprobs=torch.full(mask.shape, logprob), image_keys=None,
    )  # fmt: skip


def test_pairs_are_counted_within_prompts_and_by_all_their_tokens():
    rows = [(1, [5, 6]), (1, [5, 6]), (1, [5, 6, 0]), (2, [5, 6]), (2, [7, 7]), (3, [5, 6])]
    pairs, equal, chance = collisions(rollout(rows, math.log(0.5)))
    assert (pairs, equal) == (3 + 1, 1)
    assert chance == pytest.approx((2 * 0.25 + 0.125) / 3 * 3 + 0.25)


def test_pairs_of_one_text_with_two_pictures_are_of_two_prompts():
    batch = rollout([(1, [5, 6])] * 4, math.log(0.5))
    assert collisions(batch)[:2] == (6, 6)
    batch.image_keys = torch.tensor([7, 7, 7, 8])
    assert collisions(batch)[:2] == (3, 3)


def test_eight_copies_are_one_draw_unless_nothing_else_was_likely():
    copies = [(1, [5, 6, 7, 8])] * 8
    words = duplicates_in_words(*collisions(rollout(copies, -1.0)))
    assert words.startswith("28 of 28 pairs of completions of one prompt are equal, token by token")
    twice = [(1, [i, i, 7, 8]) for i in range(4)] * 2
    assert duplicates_in_words(*collisions(rollout(twice, -1.5))).startswith("4 of 28 pairs")
    assert duplicates_in_words(*collisions(rollout(copies, -0.01))) == ""  # a policy that collapsed
    assert duplicates_in_words(*collisions(rollout([(1, [5]), (1, [6])] * 8, -1.0))) == ""  # short answers
    assert duplicates_in_words(*collisions(rollout([(i, [5, 6]) for i in range(8)], -1.0))) == ""
    assert duplicates_in_words(0, 0, 0.0) == ""
