"""What the windows of a run come to: a halt stands until a window is OK, and is history then."""

import json

import pytest

from trl_parity.judging.course import Course
from trl_parity.report.outcome import outcome


def course(statuses, action="stop"):
    found = Course(action=action)
    for step, status in enumerate(statuses.split(), start=1):
        found.add(step, status)
    return found


@pytest.mark.parametrize(
    ("statuses", "action", "told"),
    [
        ("", "stop", ("NO_DATA", "no window was measured")),
        ("OK BREACH BREACH HALT", "stop", ("HALT", "halted at step 4")),
        ("BREACH HALT HALT WARN ERROR", "skip_update", ("HALT", "halted at step 2")),
        ("BREACH BREACH HALT OK OK", "stop",
         ("OK", "healthy in all 2 windows since step 4, to step 5; halted once at step 3, resumed")),
        ("HALT OK BREACH HALT OK NO_DATA", "raise",
         ("OK", "healthy in 1 of 2 windows since step 5, to step 6; 1 not judged (1 NO_DATA); "
                "halted 2 times, at steps 1 to 4, resumed")),
        ("HALT OK BREACH", "stop",
         ("BREACH", "1 of 2 windows since step 2 over a limit, none halted; halted once at step 1, resumed")),
        ("HALT OK HALT", "stop", ("HALT", "halted at step 3, 2 times since step 1")),
        ("HALT OK OK", "skip_update",
         ("OK", "healthy in all 2 windows since step 2, to step 3; halted once at step 1, its updates dropped")),
        ("HALT OK OK", "log", ("HALT", "halted once at step 1, and learned on; OK since step 2")),
    ],
)  # fmt: skip
def test_a_halt_is_told_for_good_and_is_the_status_while_it_stands(statuses, action, told):
    assert outcome(course(statuses, action)) == told


def test_a_checkpoint_carries_it():
    before = course("OK HALT OK WARN")
    assert Course.of_state(json.loads(json.dumps(before.state()))) == before
