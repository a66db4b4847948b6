"""Rules told with a halt can be pasted, and the window would not have breached under them."""

import ast
import re

import pytest
from support.incidents import make
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.judging.breaker import Breaker
from trl_parity.report.markdown import markdown_parts
from trl_parity.report.messages import halt_text
from trl_parity.report.summary import summary_of
from trl_parity.verdict import Status, Verdict

WINDOWS = {
    "over the floor": {"kl_k3": 3e-3, "trimmed__kl_k3": 3e-3, "floor__kl_k3": 1e-5, "honesty_gap": 0.02},
    "over the ceiling": {"kl_k3": 0.4, "trimmed__kl_k3": 0.4, "floor__kl_k3": 1e-5},
    "no floor": {"kl_k3": 0.02, "trimmed__kl_k3": 0.02},
    "too low": {"seq__ess": 0.3},
    "no number": {"kl_k3": float("nan"), "trimmed__kl_k3": float("nan"), "floor__kl_k3": 1e-5},
}


@pytest.mark.parametrize("values", WINDOWS.values(), ids=WINDOWS)
def test_the_rules_told_are_python_and_let_the_window_through(tmp_path, values):
    own = {"seq/ess": {"limit": 0.5, "below": True}} if "seq__ess" in values else {}
    config = ParityConfig(rules=own)
    stats = window(**values)
    judged = Breaker.from_config(config).judge(1, stats)
    assert judged.status is Status.BREACH
    halt = Verdict(step=1, status=Status.HALT, streak=1, breaches=judged.breaches, stats=stats)
    text = " ".join(halt_text(halt, config, [halt], tmp_path).split())
    incident = make(verdict=halt.to_dict(), config=config.to_dict(), text="")
    page = "".join(markdown_parts(summary_of(incident, []), ()))
    for told in (text, page):
        [rules] = [ast.literal_eval(found) for found in re.findall(r"rules=(\{.*?\})(?:\)|;)", told)]
        assert set(rules) == set(judged.breaches)
        merged = {**own, **{k: v if v is None else {**own.get(k, {}), **v} for k, v in rules.items()}}
        assert not Breaker.from_config(ParityConfig(rules=merged)).judge(1, stats).breaches
