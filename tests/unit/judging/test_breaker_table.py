"""The breaker's table, by every short run of windows, against an oracle that looks at the whole run each time."""

from fractions import Fraction
from itertools import product

import pytest
from support.windows import window

from trl_parity.config.rules import Rule
from trl_parity.judging.breaker import _AFTER, _STATUS, Breaker, Seen

THREE = Rule(stat="kl_k3", limit=0.1)  # asks for as many as the run's setting
TWO = Rule(stat="chi2", limit=0.1, consecutive=2)
AT_ONCE = Rule(stat="nonfinite_rate", limit=0.5, immediate=True)
WATCHED = Rule(stat="reward/parted", limit=0.5, warn=1.0, warn_only=True)

WINDOWS = {
    "healthy": window(kl_k3=0.01),
    "near": window(kl_k3=0.08),
    "watched": window(kl_k3=0.01, reward__parted=1.0),
    "empty": window(nonfinite_rate=None),
    "failed": window(num_errors=1),
    "three": window(kl_k3=0.2),
    "two, failed": window(chi2=0.2, num_errors=1),
    "at once": window(nonfinite_rate=0.9),
}

ASKS = {"three": 3, "two, failed": 2, "at once": 1}


def oracle(run, halt_on_error, warmup):
    """(status, streak) of the last window of ``run``, in the words of ``docs/verdicts.md``."""
    last, since = run[-1], run[len(run) - run[::-1].index("healthy") :] if "healthy" in run else run
    bad = [w for w in since if w == "failed" or w in ASKS]
    asks = [ASKS[w] for w in bad if w in ASKS] + [3 for w in bad if w == "failed" and halt_on_error]
    with_data = sum(w != "empty" for w in run)
    if last == "empty":
        return "NO_DATA", len(bad)
    if last == "healthy":
        return "OK" if with_data > warmup else "CALIBRATING", 0
    if last in ("near", "watched"):
        return "WARN", len(bad)
    if asks and len(bad) >= min(asks) and (with_data > warmup or last == "at once"):
        return "HALT", len(bad)
    return "ERROR" if last == "failed" else "BREACH", len(bad)


@pytest.mark.parametrize("halt_on_error", [False, True])
@pytest.mark.parametrize("warmup", [0, 2])
def test_every_run_of_four_windows_is_judged_as_the_documentation_says(halt_on_error, warmup):
    rules = (THREE, TWO, AT_ONCE, WATCHED)
    breaker = Breaker(rules, consecutive=3, halt_on_error=halt_on_error, warmup=warmup)

    def go_on(run):
        before = breaker.state()
        for name, stats in WINDOWS.items():
            breaker.load_state(before)
            verdict = breaker.judge(len(run) + 1, stats)
            longer = [*run, name]
            assert (str(verdict.status), verdict.streak) == oracle(longer, halt_on_error, warmup), longer
            assert verdict.streak == breaker.streak
            if len(longer) < 4:
                go_on(longer)

    go_on([])


LEVELS = {"healthy": window(kl_k3=0.01), "failed": window(num_errors=1), "near": window(kl_k3=0.08),
          "three": window(kl_k3=0.2), "two": window(chi2=0.2), "at once": window(nonfinite_rate=0.9)}  # fmt: skip


@pytest.mark.parametrize("halt_on_error", [False, True])
@pytest.mark.parametrize("memory", [1, 3])
@pytest.mark.parametrize("windows", [4, pytest.param(5, marks=pytest.mark.slow_unit)])
def test_breaches_that_are_remembered_halt_as_the_documentation_says(halt_on_error, memory, windows):
    asks = {"three": 3, "two": 2, "at once": 1} | ({"failed": 3} if halt_on_error else {})
    for run in product(LEVELS, repeat=windows):
        breaker = Breaker((THREE, TWO, AT_ONCE), 3, halt_on_error, breach_memory=memory)
        level, streak = Fraction(0), []
        for step, name in enumerate(run):
            verdict = breaker.judge(step, LEVELS[name])
            if name == "healthy":
                level, streak = max(Fraction(0), level - Fraction(1, memory)), []
            elif name != "near":
                streak.append(name)
            needed = min((asks[x] for x in streak if x in asks), default=None)
            if name in asks:
                level = max(level, min(level + 1, max(Fraction(1), needed - 1 + Fraction(1, memory))))
            halts = name not in ("healthy", "near") and needed and (len(streak) >= needed or level > needed - 1)
            assert (verdict.halted, verdict.level, verdict.streak) == (bool(halts), float(level), len(streak)), run


def test_the_table_has_a_line_for_all_that_can_be_seen():
    assert set(_AFTER) == set(_STATUS) == set(Seen)


def test_a_halt_stands_until_a_window_is_healthy():
    breaker = Breaker((THREE,), consecutive=1)
    run = ["healthy", "three", "near", "empty", "failed", "healthy", "near", "three"]
    stands = []
    for step, name in enumerate(run):
        breaker.judge(step, WINDOWS[name])
        stands.append(breaker.halting)
    assert stands == [False, True, True, True, True, False, False, True]
    calibrating = Breaker((THREE,), consecutive=3, warmup=9)
    for step in range(4):
        calibrating.judge(step, WINDOWS["three"])
    assert calibrating.streak == 4
    assert not calibrating.halting
