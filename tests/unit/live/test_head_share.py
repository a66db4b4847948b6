"""How many tokens the fp32 head may score: what the budget leaves it, and all of them where something speaks up."""

import statistics

import pytest

from trl_parity.live.head_share import HeadShare
from trl_parity.metrics.sums import MismatchSums


def window(wall, cost, head, share=1.0):
    sums = MismatchSums.zeros()
    sums.bump(wall_seconds=wall, cost_seconds=cost, head_seconds=head, head_seconds_for_all=head / share)
    sums.settle()
    return sums


def test_the_head_gets_what_the_rest_leaves_of_the_budget():
    head = HeadShare(0.01)
    assert head.share == 1  # nothing is known
    head.update(window(wall=100.0, cost=10.2, head=10.0), calm=True)
    assert head.share == pytest.approx((1.0 - 0.2) / 10.0)
    head.update(window(wall=50.0, cost=0.9, head=0.8, share=0.08), calm=True)
    assert head.share == pytest.approx((0.8 * 0.8 + 0.5 - 0.1) / (0.8 * 10 + 10))
    quick = HeadShare(0.005)
    quick.update(window(wall=100.0, cost=0.7, head=0.5), calm=True)
    assert quick.share == pytest.approx(0.3 / 0.5)


def test_a_window_that_is_not_calm_is_followed_by_all_tokens_and_a_calm_one_by_a_sample():
    head = HeadShare(0.01)
    for calm in (True, False, True):
        head.update(window(100.0, 10.2, 10.0), calm=calm)
        assert (head.share < 1) is calm


def test_a_budget_of_one_scores_everything_and_one_that_is_spent_nothing_beyond_the_least():
    for budget, wall, share in ((1.0, 5.0, 1.0), (0.001, 100.0, 0.0), (0.9, 100.0, 1.0)):
        head = HeadShare(budget)
        head.update(window(wall, 10.2, 10.0), calm=True)
        assert head.share == share


def test_without_a_head_that_was_timed_there_is_nothing_to_save():
    head = HeadShare(0.01)
    head.update(window(100.0, 10.0, 0.0), calm=True)
    assert head.share == 1


def test_the_cost_settles_at_the_budget_where_part_of_the_heads_is_the_same_for_any_number_of_tokens():
    head, shares = HeadShare(0.01), []
    for _ in range(60):
        seconds = 0.3 + 9.7 * head.share
        cost = 0.2 + seconds
        shares.append(cost / (100.0 + cost))
        head.update(window(100.0 + cost, cost, seconds, head.share), calm=True)
    assert statistics.median(shares) == pytest.approx(0.01, rel=0.02)
