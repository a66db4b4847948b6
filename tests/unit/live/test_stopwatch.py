"""Where a run's seconds go."""

import time

import pytest

from trl_parity.live.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_an_inner_account_is_no_part_of_the_outer_one(clock):
    stopwatch = Stopwatch()
    clock(5)
    with stopwatch.account("cost"):
        clock(1)
        with stopwatch.account("floor"):
            clock(10)
        clock(2)
    clock(4)
    assert stopwatch.lap() == ({"cost": 3.0, "floor": 10.0}, 22.0)


def test_a_lap_inside_an_account_splits_it(clock):
    stopwatch = Stopwatch()
    with stopwatch.account("cost"):
        clock(1)
        assert stopwatch.lap() == ({"cost": 1.0}, 1.0)
        clock(2)
    clock(3)
    stopwatch.add("cost", 0.5)
    assert stopwatch.lap() == ({"cost": 2.5}, 5.0)
    assert stopwatch.lap() == ({}, 0.0)


def test_an_error_closes_its_account(clock):
    stopwatch = Stopwatch()

    def fail():
        with stopwatch.account("cost"), stopwatch.account("floor"):
            clock(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock(7)
    assert stopwatch.lap() == ({"cost": 0.0, "floor": 1.0}, 8.0)
