"""The trials' early end: planned by counts alone, taken only where it decides, no more often wrong than without."""

import math

import numpy as np
import pytest
import torch

from trl_parity.preflight.check.drift import Drift, Floors, Gaps
from trl_parity.preflight.check.equivalence import limit_rows, pass_rate_interval
from trl_parity.preflight.check.rows import Limits, RowVerdict
from trl_parity.preflight.check.sequential import LEAST_TRIALS, planned_look, settled
from trl_parity.preflight.check.statistics import Sums

ERROR = 0.005


def test_the_look_is_where_an_engine_at_the_limit_comes_once_in_two_hundred():
    needed = math.log(ERROR) / math.log(0.995)
    assert planned_look([64] * 50, 0.995, ERROR) == math.ceil(needed / 64) == 17
    assert planned_look([1000] * 50, 0.995, ERROR) == LEAST_TRIALS
    assert planned_look([64] * 17, 0.995, ERROR) is None  # the last trial is no early end
    assert planned_look([16] * 50, 0.995, ERROR) is None
    for rate, error in ((0.995, 0.0), (1.0, ERROR), (0.0, ERROR)):
        assert planned_look([64] * 50, rate, error) is None


def trial(kl, over=0, tokens=64, prefill=1.0):
    one = Gaps(kl=Sums.of(torch.full((tokens,), kl)), over=over, trials=1, worst=kl)
    one.over_squares, one.over_cross, one.sizes = over**2, over * tokens, tokens**2
    one.positions = {1: Sums.of(torch.full((tokens,), math.sqrt(2 * kl * prefill)))}
    return one


def trials(kl, over=(), **more):
    rng = np.random.default_rng(0)
    return [trial(kl * (0.8 + 0.4 * rng.random()), over[i % len(over)] if over else 0, **more) for i in range(17)]


def drift_of(each, floor=1e-12, trainer=None):
    floors = Floors(trial(floor if trainer is None else trainer), trial(floor), "float32", "float32")
    return Drift(sum(each, Gaps()), floors, Limits(), ERROR)


@pytest.mark.parametrize(
    ("each", "floor", "decides"),
    [
        (trials(3e-12), 1e-12, True),  # nothing wrong
        (trials(1e-5), 1e-12, True),  # a drift, and no limit missed
        (trials(0.02, over=[40]), 1e-12, True),  # everything missed
        (trials(3e-12, over=[1, 0, 0]), 1e-12, False),  # a few tokens over: a matter of how many
        (trials(9.7e-4), 1e-5, False),  # close under the limit of the mean
        (trials(9e-9), 1e-9, False),  # close to what noise makes
        (trials(3e-12, prefill=3000.0), 1e-9, False),  # the same by prefill
        ([trial(math.nan), *trials(0.02, over=[40])], 1e-12, True),  # it will not get finite again
        (trials(0.02, over=[40])[:1], 1e-12, False),  # no spread is known of one
        ([Gaps(trials=1)] * 17, 1e-12, False),  # no law is known at all
    ],
)
def test_trials_end_where_more_would_change_no_row(each, floor, decides):
    assert settled(drift_of(each, floor), each, ERROR) is decides


def test_noise_of_the_trainers_dtype_is_a_line_too():
    each = trials(9e-9)
    assert settled(drift_of(each, 1e-7, 1e-7), each, ERROR)
    assert not settled(drift_of(each, 1e-7, 1e-9), each, ERROR)  # row `dtype` hangs on it


def test_an_engine_at_the_limit_passes_no_more_often_than_one_time_in_forty():
    """Both ways to pass together; and one look less, at the last trial alone, is as it was."""
    rng, limits, count, tokens = np.random.default_rng(0), Limits(), 50, 64
    look, passed, repeats = planned_look([tokens] * count, limits.pass_rate, ERROR), 0, 20_000
    assert look == 17
    failed = rng.binomial(tokens, 1 - limits.pass_rate, (repeats, count))
    early = failed[:, :look].sum(1) == 0
    assert early.mean() < 1.2 * ERROR
    z = Drift(Gaps(), Floors(Gaps(), Gaps(), "float32", "float32"), limits, ERROR).z
    for over in failed[~early][:4000]:
        gaps = Gaps(kl=Sums(count=count * tokens), over=int(over.sum()))
        gaps.over_squares, gaps.over_cross = float((over**2).sum()), float(over.sum() * tokens)
        gaps.sizes = float(count * tokens**2)
        passed += pass_rate_interval(gaps, z)[0] > limits.pass_rate
    assert early.mean() + (1 - early.mean()) * passed / 4000 < 0.025


def test_without_a_look_intervals_are_of_95_percent():
    each = trials(3e-12)
    with_look = drift_of(each)
    without = Drift(with_look.gaps, with_look.floors, Limits())
    assert without.z == pytest.approx(1.959964, abs=1e-6)
    assert with_look.z == pytest.approx(2.053749, abs=1e-6)
    rows = {row.id: row for row in limit_rows(with_look)}
    assert rows["pass_rate"].verdict is RowVerdict.PASS
    assert rows["pass_rate"].interval[0] < {r.id: r for r in limit_rows(without)}["pass_rate"].interval[0]
