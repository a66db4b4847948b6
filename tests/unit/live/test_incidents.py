"""When a cause is asked for."""

import pytest

from trl_parity import ParityConfig
from trl_parity.live.incidents import Investigator
from trl_parity.verdict import Status, Verdict


def asked(statuses, named_by=(), **settings):
    """Steps at which a diagnosis is due. ``named_by``: steps whose diagnosis names a cause."""
    investigator = Investigator(ParityConfig(**settings))
    steps = []
    for step, status in enumerate(statuses, start=1):
        verdict = Verdict(step=step, status=Status(status), streak=0, warnings=("kl_k3",))
        if investigator.due(verdict):
            steps.append(step)
            investigator._named = step in named_by
    return steps


@pytest.mark.parametrize(
    ("statuses", "named_by", "steps"),
    [
        (["BREACH", "BREACH", *["HALT"] * 7], (), [1, 3]),  # a lasting fault that nothing explains
        (["BREACH", "BREACH", *["HALT"] * 7], (1,), [1]),
        (["HALT"] * 5, (), [1]),
        (["BREACH", "HALT", "WARN", "NO_DATA", "ERROR", "HALT", "OK", "BREACH", "HALT", "HALT"], (), [1, 2, 8, 9]),
        (["BREACH", "CALIBRATING", "BREACH"], (), [1]),  # the same episode
        (["OK", "WARN", "NO_DATA", "ERROR", "OK"], (), []),
    ],
)
def test_a_cause_is_asked_for_twice_an_episode_at_most(statuses, named_by, steps):
    assert asked(statuses, named_by, action="log") == steps


def test_an_intermittent_fault_is_one_episode_and_its_halt_asks_again():
    """What was named before a healthy window may be another fault's."""
    investigator, steps = Investigator(ParityConfig(action="log")), []
    for step, status in enumerate(["BREACH", "OK", "BREACH", "OK", "HALT", "OK", "HALT"], start=1):
        if investigator.due(Verdict(step=step, status=Status(status), streak=0, level=1.0)):
            steps.append(step)
            investigator._named = True
    assert steps == [1, 5]


def test_from_a_warning_on_where_that_is_set_and_never_where_that_is():
    assert asked(["WARN", "WARN", "BREACH", "HALT", "HALT"], diagnose="warn") == [1, 4]
    assert asked(["BREACH", "HALT"], diagnose="never") == []


def test_one_wanted_by_name_is_made_once_even_if_it_fails():
    investigator = Investigator(ParityConfig())
    investigator.wanted = True
    ok = Verdict(step=1, status=Status.OK, streak=0)
    assert [investigator.due(ok), investigator.due(ok)] == [True, False]
