"""Verdicts from plain numbers."""

import math

import pytest
from support.windows import window

from trl_parity.config.rules import Rule
from trl_parity.judging.breaker import Breaker
from trl_parity.verdict import Status

NO_DATA = window(nonfinite_rate=None)
ERROR = window(num_errors=1)


def breaker(*rules, **kwargs):
    return Breaker(rules or (Rule(stat="kl_k3", limit=0.1),), **kwargs)


def statuses(b, windows):
    return [str(b.judge(i + 1, w).status) for i, w in enumerate(windows)]


def test_three_breached_windows_in_a_row_halt_and_fewer_do_not():
    bad, good = window(kl_k3=0.2), window(kl_k3=0.04)
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


def test_at_the_limit_is_within_the_limit_and_at_half_of_it_not_even_a_warning():
    assert statuses(breaker(), [window(kl_k3=0.1), window(kl_k3=0.051), window(kl_k3=0.05)]) == ["WARN", "WARN", "OK"]


def test_below_rules_breach_below():
    b = breaker(Rule(stat="ess", limit=0.5, below=True))
    assert statuses(b, [window(ess=0.5), window(ess=0.49)]) == ["OK", "BREACH"]


def test_warn_only_rules_warn_and_leave_the_streak_alone():
    b = breaker(Rule(stat="kl_k3", limit=0.1, warn_only=True))
    verdicts = [b.judge(i, window(kl_k3=0.2)) for i in range(5)]
    assert {v.status for v in verdicts} == {Status.WARN}
    assert verdicts[-1].streak == 0
    assert verdicts[-1].warnings == ("kl_k3",)


def test_a_warn_window_holds_the_streak_so_that_a_run_swinging_about_its_limit_halts():
    bad, near, good = window(kl_k3=0.2), window(kl_k3=0.08), window(kl_k3=0.01)
    assert statuses(breaker(), [bad, near, bad, near, bad]) == ["BREACH", "WARN", "BREACH", "WARN", "HALT"]
    assert statuses(breaker(), [bad, good, bad, good, bad]) == ["BREACH", "OK", "BREACH", "OK", "BREACH"]
    after_halt = breaker()
    assert statuses(after_halt, [bad] * 3 + [near, bad, good, bad]) == [
        "BREACH", "BREACH", "HALT", "WARN", "HALT", "OK", "BREACH",
    ]  # fmt: skip


def test_in_the_warm_up_only_immediate_rules_halt():
    bad, good = window(kl_k3=0.2), window(kl_k3=0.01)
    b = breaker(warmup=4)
    assert statuses(b, [good, bad, bad, bad, bad]) == ["CALIBRATING", "BREACH", "BREACH", "BREACH", "HALT"]
    assert statuses(breaker(Rule(stat="kl_k3", limit=0.1, immediate=True), warmup=4), [bad]) == ["HALT"]


def test_people_are_alerted_once_per_level_and_episode():
    bad, near, good = window(kl_k3=0.2), window(kl_k3=0.08), window(kl_k3=0.01)
    b = breaker()
    windows = [near, near, bad, NO_DATA, bad, bad, bad, near, good, bad, good, near]
    alerts = [b.judge(i, w).alert for i, w in enumerate(windows)]
    assert alerts == ["WARN", "", "", "", "", "HALT", "", "", "", "WARN", "", "WARN"]


# ---- rules on the noise floor -----------------------------------------------------------------------------------

FLOORED_RULE = Rule(stat="kl_k3", limit=1e-4, k=5.0, ceiling=0.1)


def noisy(value, floor, stat="kl_k3"):
    return window(**{stat: 99.0, f"trimmed/{stat}": value, f"floor/{stat}": floor})


@pytest.mark.parametrize(
    ("value", "floor", "expected"),
    [
        (1.1e-4, 2e-6, "BREACH"),  # the floor is nothing: its own limit counts
        (1.0e-4, 2e-6, "WARN"),
        (4e-5, 2e-6, "OK"),
        (4.9e-3, 1e-3, "WARN"),  # five times the floor
        (5.1e-3, 1e-3, "BREACH"),
        (2e-3, 1e-3, "OK"),
        (0.11, 0.05, "BREACH"),  # above the ceiling, whatever the floor
    ],
)
def test_a_rule_with_k_looks_at_the_excess_over_the_floor(value, floor, expected):
    assert statuses(breaker(FLOORED_RULE), [noisy(value, floor)]) == [expected]


def test_ess_falls_with_noise_and_its_excess_is_what_is_lost_beyond_it():
    rule = Rule(stat="ess", limit=0.01, k=5.0)
    assert statuses(breaker(rule), [noisy(0.95, 0.99, "ess"), noisy(0.98, 0.99, "ess")]) == ["WARN", "OK"]
    verdict = breaker(rule).judge(1, noisy(0.94, 0.99, "ess"))
    assert verdict.status is Status.BREACH
    assert verdict.reason == "excess/ess 0.05 > 0.04"
    assert breaker(rule).judge(1, window(trimmed__ess=0.94, ess=0.94)).status is Status.CALIBRATING


def test_without_a_floor_its_absolute_limit_holds_and_a_healthy_window_is_calibrating():
    rule = Rule(stat="kl_k3", limit=1e-4, k=5.0, absolute=0.01)
    small, large = window(kl_k3=1e-3, trimmed__kl_k3=1e-3), window(kl_k3=0.02, trimmed__kl_k3=0.02)
    assert statuses(breaker(rule), [small, large]) == ["CALIBRATING", "BREACH"]
    assert statuses(breaker(rule, expects_floor=False), [small, large]) == ["OK", "BREACH"]
    assert statuses(breaker(FLOORED_RULE), [window(kl_k3=1e-9, trimmed__kl_k3=1e-9)]) == ["CALIBRATING"]
    assert statuses(breaker(FLOORED_RULE), [window(kl_k3=0.2, trimmed__kl_k3=0.2)]) == ["BREACH"]  # the ceiling


def test_rules_look_at_the_trimmed_statistic_unless_immediate():
    one_bad_token = window(nonfinite_rate=0.02, trimmed__nonfinite_rate=0.0)
    rule = Rule(stat="nonfinite_rate", limit=0.01)
    assert statuses(breaker(rule), [one_bad_token]) == ["OK"]
    assert statuses(breaker(Rule(stat="nonfinite_rate", limit=0.01, immediate=True)), [one_bad_token]) == ["HALT"]


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
    verdict = second.judge(3, bad)
    assert verdict.status is Status.HALT
    assert verdict.alert == "HALT"
    assert second.judge(4, bad).alert == ""


def test_the_reason_names_value_and_limit():
    assert breaker().judge(1, window(kl_k3=0.2)).reason == "kl_k3 0.2 > 0.1"
    assert breaker().judge(1, window(kl_k3=0.07)).reason == "kl_k3 0.07 > 0.05 (limit 0.1)"
