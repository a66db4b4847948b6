"""What the run's own statistics name: while it lasts, and what mends it."""

import pytest

from trl_parity.causes import CAUSES
from trl_parity.judging.health import HEALTH, of_drift, signs, standing
from trl_parity.metrics.scalars import SCALARS
from trl_parity.verdict import MismatchStats, Status, Verdict

BASE, START, CUT = "reference/base_moved", "reference/start_kl_k3", "completions/stopped_but_masked"


def window(step, warnings=(), **values):
    names = {"base": BASE, "start": START, "cut": CUT}
    stats = MismatchStats(9, 3, 1, 0, {names[name]: value for name, value in values.items()})
    return Verdict(streak=0, step=step, status=Status.WARN if warnings else Status.OK, warnings=warnings, stats=stats)


def test_a_sign_names_its_cause_until_it_is_measured_anew_and_over_no_limit():
    start = window(1, (START,), base=0.0, start=0.25)
    assert [(c.cause, c.fix) for c in standing([start])] == [("reference_drift", HEALTH[START].fix)]
    assert "0.25 nats a token" in standing([start])[0].finding
    later = window(2, (CUT,), base=0.0, start=None, cut=0.5)
    assert [c.cause for c in standing([start, later])] == ["reference_drift", "truncation_accounting"]
    ended = window(3, base=0.0, start=None, cut=0.0)
    assert [c.cause for c in standing([start, later, ended])] == ["reference_drift"]  # of a start there is one


def test_what_is_within_its_limit_or_of_the_teacher_or_not_measured_names_nothing():
    assert standing([]) == ()
    assert standing([window(1, base=0.5)]) == ()  # not over: another limit was set
    missing = Verdict(streak=0, step=1, status=Status.NO_DATA, stats=None)
    assert standing([missing]) == ()
    stats = MismatchStats(9, 3, 1, 0, {"teacher/missing": 0.5})
    teacher = Verdict(streak=0, step=1, status=Status.WARN, warnings=("teacher/missing",), stats=stats)
    assert standing([teacher]) == ()
    [(sign, seen)] = signs(stats, ["teacher/missing"])
    assert (sign.cause, seen[:9]) == ("", "for 50.0%")


@pytest.mark.parametrize("name", HEALTH)
def test_each_sign_is_a_scalar_with_a_way_to_mend_it(name):
    sign = HEALTH[name]
    assert name in SCALARS
    assert sign.mends.endswith(".")
    assert not sign.seen.format(0.5).endswith(".")
    assert sign.cause in {*CAUSES, ""}


def test_a_breach_counts_as_a_warning_does():
    stats = MismatchStats(9, 3, 1, 0, {BASE: 0.02})
    verdict = Verdict(streak=0, step=1, status=Status.BREACH, breaches=(BASE,), stats=stats)
    [cause] = standing([verdict])
    assert cause.cause == "reference_drift"
    assert "2.00% of its size" in cause.finding


@pytest.mark.parametrize(
    ("breaches", "warnings", "drift"),
    [
        ((), (), False),
        (("entropy/drift_gap",), ("completions/duplicates",), False),
        (("correction/zeroed", "entropy/drift_gap", "evidence/entropy"), ("reference/merged",), False),
        (("entropy/drift_gap", "kl_k3"), (), True),
        ((), ("evidence/drift",), True),
        ((), ("logp_abs_diff/p99", "kl_k3"), False),
        ((), ("evidence/entropy",), False),
        ((), ("temperature/gap", "completions/probability"), True),
        (("nonfinite_rate",), (), True),
    ],
)
def test_what_is_over_a_limit_speaks_of_a_drift_or_of_something_else(breaches, warnings, drift):
    verdict = Verdict(streak=0, step=1, status=Status.WARN, breaches=breaches, warnings=warnings, stats=None)
    assert of_drift(verdict) == drift
