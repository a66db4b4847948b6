"""What is printed at a halt claims what was seen, and no more."""

from pathlib import Path

import pytest
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.judging.breaker import Breaker
from trl_parity.report.messages import halt_text

BAD, GOOD, EMPTY = window(kl_k3=0.2), window(kl_k3=0.01), window(nonfinite_rate=None)


def told(windows, **settings):
    """The text of the first halt of these windows."""
    config = ParityConfig(floor_tokens=0, rules={"kl_k3": 0.1}, **settings)
    breaker, verdicts = Breaker.from_config(config), []
    for step, stats in enumerate(windows, start=1):
        verdicts.append(breaker.judge(step, stats))
        if verdicts[-1].halted:
            return halt_text(verdicts[-1], config, verdicts, Path("report.md"))
    raise AssertionError("no halt")


@pytest.mark.parametrize(
    ("windows", "settings", "seen"),
    [
        ([GOOD, BAD, BAD, BAD], {}, "3 window(s) in a row over the limit, steps 2 to 4:"),
        ([BAD, EMPTY, BAD, EMPTY, BAD], {}, "3 window(s) in a row over the limit, steps 1 to 5:"),
        ([BAD, *[GOOD] * 4, BAD, *[GOOD] * 4, BAD], {}, "3 breaches in the last 11 windows, steps 1 to 11:"),
        ([BAD, GOOD, BAD, GOOD, BAD], {}, "3 breaches in the last 5 windows, steps 1 to 5:"),
        # the first is nearly forgotten by then
        ([BAD, *[GOOD] * 19, BAD, GOOD, BAD, GOOD, BAD], {}, "3 breaches in the last 5 windows, steps 21 to 25:"),
        ([GOOD, BAD, GOOD, BAD], {"consecutive": 2}, "2 breaches in the last 3 windows, steps 2 to 4:"),
        ([GOOD, BAD], {"consecutive": 1}, "1 window(s) in a row over the limit:"),
    ],
)
def test_it_counts_what_the_halt_counted(windows, settings, seen):
    text = told(windows, **settings)
    assert f"  Seen     {seen}\n" in text
    trail = next(line for line in text.splitlines() if "kl_k3  " in line)
    assert trail.count("0.2") == int(seen.split()[0])
