"""How far the trainer's own numbers may be from those of the pass that was watched, and by which tokens."""

import pytest
import torch

from trl_parity.errors import InterceptionError
from trl_parity.scoring.own_head import OwnHeadRounding
from trl_parity.scoring.scorer import CompletionScores
from trl_parity.trainers.own_numbers import behind

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()

nan = float("nan")


class Thing:
    """A policy, or its trainer."""


def scores_of(plain, weights=None):
    return CompletionScores(plain, plain, plain, plain, None, None, weights)


def told(gaps, rounding=0.0, weights=None):
    policy, plain = Thing(), torch.full(MASK.shape, -1.0)
    measured = OwnHeadRounding.of(policy)
    measured._moved, measured._tokens = 8 * rounding, 8.0
    scores = scores_of(plain, weights)
    found = behind(Thing(), policy, scores, plain + torch.tensor(gaps), MASK, replays=False)
    assert found is None or found is scores
    return found is not None


def nearly(x):
    """Mean |gap| x over the nine tokens, of both signs; the one outside counts for nothing."""
    return [[x, -x, x, -x, 99.0], [2 * x, 0.0, x, x, x]]


@pytest.mark.parametrize("rounding", [0.0, 0.02])
def test_the_gap_may_be_three_thousandths_and_three_roundings(rounding):
    most = 0.003 + 3 * rounding
    assert told(nearly(0.99 * most), rounding)
    assert not told(nearly(1.01 * most), rounding)


def test_tokens_that_were_not_scored_or_that_neither_side_has_a_number_for_say_nothing():
    weights = torch.tensor([[2.0, 0, 0, 1, 1], [0, 2, 0, 1, 1]])
    assert told([[0.0, 9.0, 9.0, 0, 9.0], [9.0, 0, 9.0, 0, 0]], weights=weights)
    for place in (0, 3):  # one that stands for two, and one for itself
        gaps = torch.zeros(MASK.shape)
        gaps[0, place] = 0.05
        assert not told(gaps.tolist(), weights=weights)
    assert told(nearly(0.0), weights=torch.zeros(MASK.shape))
    assert not told([[0.0, 0, nan, 0, 0], [0.0, 0, 0, 0, 0]])  # one side alone
    plain = torch.full(MASK.shape, -1.0).index_fill(1, torch.tensor([1]), -torch.inf)
    scores = scores_of(plain)
    assert behind(Thing(), Thing(), scores, plain.clone(), MASK, replays=False) is scores


@pytest.mark.parametrize(
    ("scores", "seen"),
    [(None, "come from no forward"), (scores_of(torch.zeros(2, 4)), r"are \(2, 5\) where the policy's .* \(2, 4\)")],
)
def test_numbers_of_no_pass_or_of_another_shape_are_told_once_a_trainer_and_not_replayed(scores, seen, caplog):
    trainer, own = Thing(), torch.zeros(MASK.shape)
    for _ in range(2):
        assert behind(trainer, Thing(), scores, own, MASK, replays=False) is None
    assert len(caplog.records) == 1
    caplog.clear()
    assert behind(Thing(), Thing(), scores, own, MASK, replays=False) is None
    assert len(caplog.records) == 1
    with pytest.raises(InterceptionError, match=seen):
        behind(trainer, Thing(), scores, own, MASK, replays=True)
