"""Verdicts from plain numbers."""

import math

import pytest

from trl_parity.breaker import Breaker
from trl_parity.config import Rule
from trl_parity.records import MismatchStats, Status
from trl_parity.scalars import SCALARS


def window(num_errors=0, nonfinite_rate=0.0, **values):
    scalars = dict.fromkeys(SCALARS) | {"nonfinite_rate": nonfinite_rate}
    scalars |= {name.replace("__", "/"): value for name, value in values.items()}
    return MismatchStats(100, 10, 1, num_errors, scalars)


NO_DATA = window(nonfinite_rate=None)
ERROR = window(num_errors=1)


def breaker(*rules, **kwargs):
    return Breaker(rules or (Rule(stat="kl_k3", limit=0.1),), **kwargs)


def statuses(b, windows):
    return [str(b.judge(i + 1, w).status) for i, w in enumerate(windows)]


def test_three_breached_windows_in_a_row_halt_and_fewer_do_not():
    bad, good = window(kl_k3=0.2), window(kl_k3=0.05)
    assert statuses(breaker(), [bad, bad, good, bad, bad, bad]) == [
        "BREACH",
        "BREACH",
        "OK",
        "BREACH",
        "BREACH",
        "HALT",
    ]


def test_the_streak_counts_windows_whatever_rule_they_breach():
    b = breaker(Rule(stat="kl_k3", limit=0.1), Rule(stat="logp_abs_diff/mean", limit=0.1))
    windows = [window(kl_k3=0.2), window(logp_abs_diff__mean=0.2), window(kl_k3=0.2)]
    assert statuses(b, windows) == ["BREACH", "BREACH", "HALT"]


def test_an_immediate_rule_halts_at_once():
    assert statuses(breaker(Rule(stat="kl_k3", limit=0.1, immediate=True)), [window(kl_k3=0.2)]) == ["HALT"]


def test_a_rule_with_its_own_consecutive_is_heeded():
    b = breaker(Rule(stat="kl_k3", limit=0.1, consecutive=2), consecutive=5)
    assert statuses(b, [window(kl_k3=0.2)] * 2) == ["BREACH", "HALT"]


def test_at_the_limit_is_within_the_limit():
    assert statuses(breaker(), [window(kl_k3=0.1)]) == ["OK"]


def test_below_rules_breach_below():
    b = breaker(Rule(stat="ess", limit=0.5, below=True))
    assert statuses(b, [window(ess=0.5), window(ess=0.49)]) == ["OK", "BREACH"]


def test_warn_only_rules_warn_and_leave_the_streak_alone():
    b = breaker(Rule(stat="kl_k3", limit=0.1, warn_only=True))
    verdicts = [b.judge(i, window(kl_k3=0.2)) for i in range(5)]
    assert {v.status for v in verdicts} == {Status.WARN}
    assert verdicts[-1].streak == 0
    assert verdicts[-1].warnings == ("kl_k3",)


def test_no_data_neither_ends_nor_feeds_a_streak():
    bad = window(kl_k3=0.2)
    b = breaker()
    assert statuses(b, [bad, bad, NO_DATA, NO_DATA, bad]) == ["BREACH", "BREACH", "NO_DATA", "NO_DATA", "HALT"]


def test_error_feeds_a_streak_a_breach_began_and_is_never_a_pass():
    bad = window(kl_k3=0.2)
    assert statuses(breaker(), [bad, ERROR, ERROR]) == ["BREACH", "ERROR", "HALT"]
    assert statuses(breaker(), [ERROR, ERROR, bad]) == ["ERROR", "ERROR", "HALT"]


def test_errors_alone_do_not_halt_a_run_unless_asked():
    b = breaker()
    assert statuses(b, [ERROR] * 10) == ["ERROR"] * 10
    assert b.streak == 10
    assert statuses(breaker(halt_on_error=True), [ERROR] * 3) == ["ERROR", "ERROR", "HALT"]


def test_a_window_with_one_failed_batch_is_not_ok():
    assert statuses(breaker(), [window(num_errors=1, kl_k3=0.0)]) == ["ERROR"]
    assert statuses(breaker(), [window(num_errors=1, kl_k3=0.5)]) == ["BREACH"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_statistic_breaches(value):
    assert statuses(breaker(), [window(kl_k3=value)]) == ["BREACH"]


def test_a_statistic_that_was_not_measured_does_not_breach():
    assert statuses(breaker(), [window(kl_k3=None)]) == ["OK"]


def test_state_survives_a_restart_in_the_middle_of_a_streak():
    bad = window(kl_k3=0.2)
    first, second = breaker(), breaker()
    assert statuses(first, [bad, bad]) == ["BREACH", "BREACH"]
    second.load_state(first.state())
    assert statuses(second, [bad]) == ["HALT"]


def test_the_reason_names_value_and_limit():
    assert breaker().judge(1, window(kl_k3=0.2)).reason == "kl_k3 0.2 > 0.1"
