"""The entropy over windows, the temperature of a phase."""

import math

import pytest

from trl_parity import ParityConfig
from trl_parity.metrics.trends import EntropyWatch, expected_temperature

# ---- entropy, temperature, rewards ------------------------------------------------------------------------------


def test_entropy_trend_is_the_slope_and_relative_the_share_of_the_beginning():
    watch = EntropyWatch()
    for i in range(30):
        watch.update(2.0 - 0.05 * i)
    assert watch.scalars()["entropy/trend"] == pytest.approx(-0.05)
    assert watch.scalars()["entropy/relative"] == pytest.approx((2.0 - 0.05 * 29) / 1.9)
    watch.update(None)  # not measured: no zero
    assert watch.scalars()["entropy/trend"] == pytest.approx(-0.05)


def test_a_trend_is_of_the_last_twenty_windows_from_three_on_and_relative_from_five():
    watch, again = EntropyWatch(), EntropyWatch()
    for i in range(40):
        watch.update(float(i**2))
        known = watch.scalars()
        assert ("entropy/trend" in known) == (i >= 2)
        assert ("entropy/relative" in known) == (i >= 4)
        if i >= 4:
            assert known["entropy/relative"] == i**2 / 4  # over the median of 0, 1, 4, 9, 16
        if i >= 19:
            assert known["entropy/trend"] == pytest.approx(2 * i - 19)  # of squares: twice the middle of the twenty
    again.load_state(watch.state())
    for both in (watch, again):
        both.update(0.5)
    assert again.scalars() == watch.scalars()


@pytest.mark.parametrize(("entropy", "known"), [(0.0, False), (1e-3, True)])
def test_there_is_no_share_of_a_beginning_without_entropy(entropy, known):
    watch = EntropyWatch()
    for _ in range(5):
        watch.update(entropy)
    assert ("entropy/relative" in watch.scalars()) == known


def test_the_temperature_meant_for_a_phase():
    phases = ParityConfig(temperatures={"train": 0.7, "train@10": 1.0, "eval": 0.0}).temperature_phases()
    assert [expected_temperature(phases, "train", step) for step in (0, 9, 10, 99)] == [0.7, 0.7, 1.0, 1.0]
    assert expected_temperature(phases, "eval", 5) == 0.0
    assert expected_temperature({}, "train", 5) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_entropy_that_is_not_finite_is_nan_in_its_window_and_forgotten_after_it(bad):
    watch, spared = EntropyWatch(), EntropyWatch()
    for i in range(8):
        watch.update(2.0 - 0.1 * i)
        spared.update(2.0 - 0.1 * i)
    watch.update(bad)
    assert all(math.isnan(x) for x in watch.scalars().values())
    assert set(watch.scalars()) == set(spared.scalars())
    for both in (watch, spared):
        both.update(1.2)
    assert watch.scalars() == spared.scalars()
    again = EntropyWatch()  # of a version that kept them
    again.load_state({"recent": [2.0, bad, 1.9, 1.8, 1.7], "first": [2.0, bad]})
    assert again.scalars()["entropy/trend"] == pytest.approx(-0.1)
