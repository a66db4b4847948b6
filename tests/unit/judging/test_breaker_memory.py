"""What a breaker remembers from window to window, and what a rule reads: each case exact."""

import math
import random

import pytest
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.config.rules import DEFAULT_RULES, Rule
from trl_parity.judging.breaker import Breaker, Reading, read

KL = Rule(stat="kl_k3", limit=0.1)
PARTED = Rule(stat="reward/parted", limit=0.5, warn=1.0, warn_only=True)
BAD, NEAR, GOOD, FAILED = window(kl_k3=0.2), window(kl_k3=0.08), window(kl_k3=0.01), window(num_errors=1)


def judged(windows, *rules, **settings):
    """(status, streak, needed) of each window."""
    breaker = Breaker(rules or (KL,), **settings)
    seen = []
    for step, stats in enumerate(windows, start=1):
        verdict = breaker.judge(step, stats)
        seen.append((str(verdict.status), verdict.streak, breaker.needed))
        assert verdict.streak == breaker.streak
    return seen


# ---- what a rule reads


@pytest.mark.parametrize(
    ("value", "over", "warns"), [(-0.6, False, False), (-0.5, False, False), (-0.3, True, True), (-0.1, True, True)]
)
def test_a_negative_limit_has_no_warn_level_beside_it(value, over, warns):
    """Half of -0.5 lies beyond it: what is over the limit is over what warns."""
    rule = Rule(stat="kl_k1", limit=-0.5)
    assert read(rule, {"kl_k1": value}) == Reading(rule, "kl_k1", value, -0.5, over, warns)


@pytest.mark.parametrize(("value", "over"), [(0.5, False), (0.49, True), (0.3, True), (math.nan, True)])
def test_a_limit_from_below_has_none_either(value, over):
    rule = Rule(stat="ess", limit=0.5, below=True)
    seen = read(rule, {"ess": value})
    assert (seen.over, seen.warns, seen.missing) == (over, over, False)


@pytest.mark.parametrize(
    ("warn", "value", "over", "warns"),
    [(0.5, 0.05, False, False), (0.5, 0.051, False, True), (0.2, 0.021, False, True), (0.2, 0.02, False, False),
     (1.0, 0.1, False, False), (1.0, 0.11, True, True), (0.0, 0.0, False, False), (0.0, 1e-9, False, True)],
)  # fmt: skip
def test_warn_begins_above_its_share_of_the_limit(warn, value, over, warns):
    seen = read(Rule(stat="kl_k3", limit=0.1, warn=warn), {"kl_k3": value})
    assert (seen.over, seen.warns, seen.limit) == (over, warns, 0.1)


def test_the_ceiling_counts_the_statistic_and_the_floor_its_excess():
    rule = Rule(stat="kl_k3", limit=1e-4, k=5.0, ceiling=0.1, absolute=0.01)
    assert read(rule, {"kl_k3": 0.1, "floor/kl_k3": 0.09}) == Reading(
        rule, "excess/kl_k3", pytest.approx(0.01), pytest.approx(0.36), False, False
    )
    assert read(rule, {"kl_k3": 0.11, "floor/kl_k3": 0.09}) == Reading(rule, "kl_k3", 0.11, 0.1, True, True)
    assert read(rule, {"kl_k3": 0.005}) == Reading(rule, "kl_k3", 0.005, 0.01, False, False, missing=True)
    assert read(rule, {"kl_k3": 0.01}) == Reading(rule, "kl_k3", 0.01, 0.01, False, True, missing=True)
    assert read(rule, {"kl_k3": 0.0051}) == Reading(rule, "kl_k3", 0.0051, 0.01, False, True, missing=True)
    assert read(rule, {"kl_k3": 0.0101}) == Reading(rule, "kl_k3", 0.0101, 0.01, True, True, missing=True)
    bare = Rule(stat="kl_k3", limit=1e-4, k=5.0)
    assert read(bare, {"kl_k3": 9.0}) == Reading(bare, "kl_k3", 9.0, 1e-4, False, False, missing=True)
    assert read(bare, {"kl_k3": None}) is None
    at_once = Rule(stat="kl_k3", limit=0.1, immediate=True)
    assert read(at_once, {"kl_k3": 0.3, "trimmed/kl_k3": 0.0}).value == 0.3
    assert read(KL, {"kl_k3": 0.3, "trimmed/kl_k3": 0.0}).value == 0.0


@pytest.mark.parametrize(
    "limits", [{"ceiling": 0.1}, {"absolute": 0.01}, {"ceiling": 0.1, "floor": 1e-6}, {"floor": 1e-6}, {}]
)
def test_what_is_no_number_is_over_every_kind_of_limit(limits):
    floor = limits.pop("floor", None)
    rule = Rule(stat="kl_k3", limit=1e-4, k=5.0, **limits)
    reading = read(rule, {"kl_k3": math.nan, "floor/kl_k3": floor})
    assert (reading.seen, reading.over, reading.warns) == ("kl_k3", True, True)


def test_of_ess_it_is_what_is_lost_that_is_read():
    rule = Rule(stat="ess", limit=0.01, k=5.0, absolute=0.05)
    seen = read(rule, {"ess": 0.9, "floor/ess": 0.98})
    assert (seen.seen, seen.value, seen.limit) == ("excess/ess", pytest.approx(0.08), pytest.approx(0.08))
    assert read(rule, {"ess": 0.94})[1:5] == ("1 - ess", pytest.approx(0.06), 0.05, True)


def test_the_texts_of_what_is_over_and_what_warns():
    assert read(KL, {"kl_k3": 0.2}).text == "kl_k3 0.2 > 0.1"
    assert read(KL, {"kl_k3": 0.08}).text == "kl_k3 0.08 > 0.05 (limit 0.1)"
    assert read(Rule(stat="ess", limit=0.5, below=True), {"ess": 0.4}).text == "ess 0.4 < 0.5"


# ---- breaches that are not in a row


def first_halt(pattern, windows=400, **settings):
    """The window, from the first breach on, at which a run is halted that breaches where ``pattern`` says."""
    breaker = Breaker.from_config(ParityConfig(floor_tokens=0, rules={"kl_k3": 0.1}, **settings))
    first = None
    for i in range(windows):
        breach = pattern(i)
        first = i if first is None and breach else first
        if breaker.judge(i, BAD if breach else GOOD).halted:
            return i - first + 1
    return None


PATTERNS = {
    "every 2nd": (lambda i: i % 2 == 0, 5),
    "every 3rd": (lambda i: i % 3 == 0, 7),
    "every 4th": (lambda i: i % 4 == 0, 9),
    "one in five": (lambda i: i % 5 == 0, 11),
    "two of three": (lambda i: i % 3 != 2, 4),
    "three in a row": (lambda i: True, 3),
    "19 healthy ones between": (lambda i: i in (0, 10, 21), 22),
    "20 healthy ones between": (lambda i: i in (0, 10, 22), None),
    "three in 60 windows": (lambda i: i in (0, 30, 60), None),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_an_intermittent_fault_halts_and_rare_breaches_do_not(name):
    pattern, at = PATTERNS[name]
    assert first_halt(pattern) == at
    assert first_halt(pattern, breach_memory=0) == (3 if at == 3 else None)


@pytest.mark.parametrize("seed", range(5))
def test_three_windows_in_ten_at_random_halt_within_25(seed):
    rng = random.Random(seed)
    assert first_halt(lambda i: rng.random() < 0.3) <= 25


def test_one_breach_halts_where_one_is_asked_for_and_the_next_only_if_it_breaches():
    breaker = Breaker.from_config(ParityConfig(consecutive=1, floor_tokens=0, rules={"kl_k3": 0.1}))
    assert [str(breaker.judge(i, w).status) for i, w in enumerate([GOOD, BAD, GOOD, BAD])] == [
        "OK", "HALT", "OK", "HALT",
    ]  # fmt: skip


def test_however_long_a_fault_lasted_one_breach_long_after_it_is_no_halt():
    for healthy, halts in ((5, True), (20, True), (21, False), (60, False)):
        breaker = Breaker((KL,), breach_memory=20)
        for i in range(100):
            breaker.judge(i, BAD)
        for i in range(healthy):
            breaker.judge(100 + i, GOOD)
        assert breaker.judge(200, BAD).halted == halts, healthy


def test_a_breach_by_a_floor_of_few_sequences_counts_in_a_streak_alone():
    floored = Rule(stat="kl_k3", limit=1e-4, k=5.0)
    honest = Rule(stat="honesty_gap", limit=0.005)

    def halts(sequences, **more):
        breaker = Breaker((floored, honest), breach_memory=20)
        bad = window(kl_k3=0.2, floor__kl_k3=1e-5, floor__sequences=sequences, **more)
        return any(breaker.judge(i, bad if i % 2 else GOOD).halted for i in range(12))

    assert not halts(7.0)
    assert halts(8.0)
    assert halts(None)  # a floor that was given
    assert halts(7.0, honesty_gap=0.1)  # which rests on none


def test_an_episode_lasts_while_a_breach_is_remembered():
    breaker = Breaker((KL,), breach_memory=4)
    windows = [BAD, GOOD, BAD, GOOD, NEAR, BAD, *[GOOD] * 20, BAD]
    alerts = {i: alert for i, w in enumerate(windows) if (alert := breaker.judge(i, w).alert)}
    assert alerts == {0: "WARN", 5: "HALT", 26: "WARN"}


def test_a_halt_that_is_not_in_a_row_says_so():
    breaker = Breaker((KL,), breach_memory=20)
    *_, last = [breaker.judge(i, w) for i, w in enumerate([BAD, GOOD, BAD, GOOD, BAD])]
    assert last.reason == "kl_k3 0.2 > 0.1; not in a row: level 2.05 > 2"
    assert breaker.halting
    assert last.to_dict()["breaker/level"] == 2.05


def test_what_is_remembered_is_part_of_a_checkpoint_and_one_without_it_is_read():
    first, again = (Breaker((KL,), breach_memory=20) for _ in range(2))
    for i, w in enumerate([BAD, GOOD, BAD, GOOD]):
        first.judge(i, w)
    again.load_state(first.state())
    assert again == first
    assert again.judge(4, BAD).halted
    again.load_state({"streak": 2, "needed": 3, "windows": 7, "alerted": "WARN"})  # of 0.6.0
    assert (again.streak, again.level) == (2, 0.0)
    assert again.judge(4, BAD).halted


# ---- the streak, and how many windows it needs


def test_a_warning_holds_a_streak_whatever_rule_it_is_of():
    parted = window(kl_k3=0.01, reward__parted=1.0)
    both = window(kl_k3=0.08, reward__parted=1.0)
    assert judged([BAD, parted, BAD, parted, BAD], KL, PARTED) == [
        ("BREACH", 1, 3), ("WARN", 1, 3), ("BREACH", 2, 3), ("WARN", 2, 3), ("HALT", 3, 3),
    ]  # fmt: skip
    assert judged([parted] * 5, KL, PARTED) == [("WARN", 0, None)] * 5  # and begins none
    watched = Rule(stat="kl_k3", limit=0.1, warn_only=True)
    assert judged([NEAR, BAD], watched) == [("OK", 0, None), ("WARN", 0, None)]  # it warns at its limit alone
    assert judged([BAD, both, BAD, NEAR, BAD], KL, PARTED) == [
        ("BREACH", 1, 3), ("WARN", 1, 3), ("BREACH", 2, 3), ("WARN", 2, 3), ("HALT", 3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_fewest_windows_that_any_rule_of_the_streak_asked_for_are_needed(order):
    """Whichever came last: a rule that asks for two is not put off by one that asks for four."""
    two, four = Rule(stat="kl_k3", limit=0.1, consecutive=2), Rule(stat="chi2", limit=0.1, consecutive=4)
    windows = [[window(kl_k3=0.2), window(chi2=0.2)][i] for i in order]
    assert judged(windows, two, four) == [("BREACH", 1, 2 if order == (0, 1) else 4), ("HALT", 2, 2)]
    assert judged([window(kl_k3=0.2, chi2=0.2)] * 2, two, four) == [("BREACH", 1, 2), ("HALT", 2, 2)]


def test_what_halts_at_once_asks_for_one_window():
    assert judged([BAD], Rule(stat="kl_k3", limit=0.1, immediate=True, consecutive=4)) == [("HALT", 1, 1)]


def test_the_need_ends_with_the_streak():
    two = Rule(stat="kl_k3", limit=0.1, consecutive=2)
    four = Rule(stat="chi2", limit=0.1, consecutive=4)
    seen = judged([BAD, GOOD, *[window(chi2=0.2)] * 4], two, four)
    assert [x[0] for x in seen] == ["BREACH", "OK", "BREACH", "BREACH", "BREACH", "HALT"]


def test_halt_on_error_does_not_lift_a_smaller_need_and_has_its_own_without_one():
    two = Rule(stat="kl_k3", limit=0.1, consecutive=2)
    assert judged([BAD, FAILED], two, halt_on_error=True, consecutive=4) == [("BREACH", 1, 2), ("HALT", 2, 2)]
    assert judged([FAILED] * 4, two, halt_on_error=True, consecutive=4) == [
        ("ERROR", 1, 4), ("ERROR", 2, 4), ("ERROR", 3, 4), ("HALT", 4, 4),
    ]  # fmt: skip
    assert judged([FAILED, BAD], two, halt_on_error=True, consecutive=4) == [("ERROR", 1, 4), ("HALT", 2, 2)]
    assert judged([FAILED] * 3 + [GOOD, FAILED], two) == [
        ("ERROR", 1, None), ("ERROR", 2, None), ("ERROR", 3, None), ("OK", 0, None), ("ERROR", 1, None),
    ]  # fmt: skip


def test_a_window_that_warns_or_is_healthy_is_no_halt_however_long_the_streak():
    assert judged([BAD, BAD, BAD, NEAR, GOOD]) == [
        ("BREACH", 1, 3), ("BREACH", 2, 3), ("HALT", 3, 3), ("WARN", 3, 3), ("OK", 0, None),
    ]  # fmt: skip


def test_the_warm_up_counts_windows_with_data_and_ends_after_its_last():
    empty = window(nonfinite_rate=None)
    one = Rule(stat="kl_k3", limit=0.1, consecutive=1)
    seen = judged([empty, GOOD, BAD, BAD], one, warmup=2)
    assert [x[0] for x in seen] == ["NO_DATA", "CALIBRATING", "BREACH", "HALT"]


def test_no_data_says_why_and_changes_nothing():
    breaker = Breaker((KL,))
    breaker.judge(1, BAD)
    before = breaker.state()
    empty = breaker.judge(2, window(nonfinite_rate=None))
    stale = breaker.judge(3, window(nonfinite_rate=None, lag__0__tokens=0.0))
    assert (empty.streak, stale.streak, breaker.state()) == (1, 1, before)
    assert "empty or fully masked" in empty.reason
    assert "no token at lag 0" in stale.reason


def test_alerts_rise_once_an_episode_and_an_error_is_none():
    breaker = Breaker((KL,))
    windows = [FAILED, NEAR, BAD, BAD, BAD, GOOD, BAD]
    assert [breaker.judge(i, w).alert for i, w in enumerate(windows)] == ["", "WARN", "", "HALT", "", "", "WARN"]
    assert breaker.state() == {"streak": 1, "needed": 3, "windows": 7, "alerted": "WARN"}


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_breaker_is_as_the_settings_say(tokens):
    config = ParityConfig(consecutive=5, halt_on_error=True, warmup=7, floor_tokens=tokens)
    assert Breaker.from_config(config) == Breaker(
        config.resolved_rules(), 5, True, 7, expects_floor=tokens > 0, breach_memory=20
    )


def test_a_state_comes_back_whole():
    breaker, again = Breaker((KL,)), Breaker((KL,))
    for step, stats in enumerate([FAILED, BAD]):
        breaker.judge(step, stats)
    again.load_state(breaker.state())
    assert again == breaker


def test_a_healthy_window_without_a_floor_ends_a_halt():
    breaker = Breaker((Rule(stat="kl_k3", limit=1e-4, k=5.0, ceiling=0.1),), consecutive=1)
    assert str(breaker.judge(1, BAD).status) == "HALT"
    assert breaker.halting
    assert str(breaker.judge(2, window(kl_k3=1e-9)).status) == "CALIBRATING"
    assert not breaker.halting


def test_what_breaches_is_no_warning_beside_it():
    verdict = Breaker((KL, Rule(stat="chi2", limit=0.1))).judge(1, window(kl_k3=0.2, chi2=0.08))
    assert (verdict.breaches, verdict.warnings) == (("kl_k3",), ("chi2",))


def test_the_reason_of_a_failure_names_it_or_the_rank():
    assert Breaker((KL,)).judge(1, None, "no memory").reason == "measurement failed: no memory"
    assert Breaker((KL,)).judge(1, FAILED).reason == "measurement failed on another rank"
    mixed = Breaker((KL,)).judge(1, window(num_errors=1, kl_k3=0.2), "x").reason
    assert mixed == "kl_k3 0.2 > 0.1; measurement failed: x"


def test_the_default_rules_number_by_number():
    """``configs/default.yaml`` says where each number comes from; it may not change by the way."""
    assert {(r.stat, r.limit, r.k, r.ceiling, r.absolute, r.warn, r.below, r.warn_only) for r in DEFAULT_RULES} == {
        ("kl_k3", 1e-4, 5.0, 0.1, 0.01, 0.5, False, False),
        ("logp_abs_diff/mean", 0.003, 3.0, 0.3, 0.06, 0.5, False, False),
        ("logp_abs_diff/p99", 0.03, 3.0, None, 0.5, 0.5, False, False),
        ("ratio/out_of_band", 0.02, 3.0, None, 0.25, 0.5, False, False),
        ("ess", 0.01, 5.0, None, 0.05, 0.5, False, False),
        ("honesty_gap", 0.005, None, None, None, 0.5, False, False),
        ("entropy/drift_gap", 0.1, None, None, None, 0.5, False, False),
        ("confident_disagreement", 0.005, None, None, None, 0.5, False, False),
        ("nonfinite_rate", 0.01, None, None, None, 0.5, False, False),
        ("entropy/nonfinite_rate", 0.0, None, None, None, 0.5, False, False),
        ("ratio/extreme", 4e-4, 5.0, 0.02, 4e-4, 0.5, False, False),
        ("last_token/disagreement", 0.05, None, None, None, 0.5, False, False),
        ("seq/bias_gap", 1.0, None, None, None, 0.5, False, False),
        ("correction/zeroed", 0.5, None, None, None, 0.8, False, False),
        ("correction/lost", 0.8, None, None, None, 0.5, False, True),
        ("correction/long/zeroed", 0.5, None, None, None, 0.8, False, False),
        ("policy_drift/kl_k3", 0.1, None, None, None, 0.5, False, True),
        ("entropy/relative", 0.1, None, None, None, 0.5, True, True),
        ("temperature/gap", 1e-6, None, None, None, 0.5, False, True),
        ("reward/parted", 0.5, None, None, None, 1.0, False, True),
        ("completions/duplicates", 0.05, None, None, None, 1.0, False, True),
        ("completions/probability", 0.9, None, None, None, 1.0, False, True),
        ("completions/stopped_but_masked", 0.01, None, None, None, 0.5, False, True),
        ("reference/base_moved", 0.001, None, None, None, 0.5, False, True),
        ("reference/merged", 0.0, None, None, None, 0.5, False, True),
        ("reference/start_kl_k3", 0.01, None, None, None, 0.5, False, True),
        ("teacher/temperature_gap", 1e-6, None, None, None, 0.5, False, True),
        ("teacher/mass_max", 1.001, None, None, None, 0.5, False, True),
        ("teacher/missing", 0.01, None, None, None, 0.5, False, True),
        ("teacher/foreign", 0.0, None, None, None, 0.5, False, True),
        ("floor/engine_excess", 0.003, None, None, None, 0.5, False, False),
        ("replica/kl_k3", 1e-4, 5.0, None, 0.01, 0.5, False, False),
        ("replica/logp_abs_diff/mean", 0.003, 3.0, None, 0.06, 0.5, False, False),
        ("evidence/honesty", 4.0, None, None, None, 0.75, False, False),
        ("evidence/drift", 4.0, None, None, None, 0.75, False, False),
        ("evidence/entropy", 4.0, None, None, None, 0.75, False, False),
        ("evidence/change", 4.0, None, None, None, 1.0, False, True),
    }
    assert not any(r.immediate for r in DEFAULT_RULES)
    assert {r.stat: r.consecutive for r in DEFAULT_RULES if r.consecutive} == {
        "evidence/honesty": 1, "evidence/drift": 1, "evidence/entropy": 1,
        "replica/kl_k3": 1, "replica/logp_abs_diff/mean": 1,
    }  # fmt: skip
