"""A run that was halted, mended and resumed is told alike by `report`, `watch`, `pilot` and `compare`."""

import json

import pytest
from rich.console import Console
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.cli import main
from trl_parity.config.rules import Rule
from trl_parity.judging.breaker import read
from trl_parity.judging.limits import allowed
from trl_parity.live.judge import RunJudge
from trl_parity.preflight.pilot import judge_pilot
from trl_parity.report.follow import follow
from trl_parity.report.messages import halt_text
from trl_parity.report.summary import headline, summarize, used
from trl_parity.verdict import Status, Verdict


def record(folder, statuses, action="stop"):
    """A run's folder with windows of these statuses."""
    (folder / "parity").mkdir(parents=True)
    rows = [
        {"schema_version": 2, "step": step, "status": status, "streak": 0, "breaches": [], "warnings": [],
         "reason": "kl_k3 0.2 > 0.1" if status in ("BREACH", "HALT") else "", "kl_k3": 1e-6, "floor/kl_k3": 1e-6,
         "entropy/trainer": 1.0}
        for step, status in enumerate(statuses.split(), start=1)
    ]  # fmt: skip
    (folder / "parity" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "parity" / "config.json").write_text(json.dumps(ParityConfig(action=action).to_dict()))
    return folder


def watched(folder, tmp_path):
    with open(tmp_path / "watched", "w+") as file:
        for _ in follow(str(folder), Console(file=file, width=160), once=True):
            pass
        file.seek(0)
        return file.read()


@pytest.mark.parametrize(
    ("statuses", "action", "status", "told", "code", "pilot"),
    [
        ("BREACH BREACH HALT" + " OK" * 6, "stop", "OK", "halted once at step 3, resumed", 0, "pass"),
        ("BREACH BREACH HALT HALT" + " WARN" * 5, "stop", "HALT", "halted at step 3", 1, "fail"),
        ("BREACH BREACH HALT" + " OK" * 6, "log", "HALT", "halted once at step 3, and learned on", 1, "fail"),
        ("BREACH BREACH HALT" + " OK" * 6, "skip_update", "OK", "halted once at step 3, its updates dropped", 0,
         "pass"),
    ],
)  # fmt: skip
def test_a_halt_that_is_over_is_told_alike_everywhere(tmp_path, capsys, statuses, action, status, told, code, pilot):
    run, other = record(tmp_path / "run", statuses, action), record(tmp_path / "other", "OK " * 9)
    assert headline(summarize(run))[0] == status
    since = "since step 4" if status == "OK" else ""
    for said in (headline(summarize(run))[1], watched(run, tmp_path)):
        assert told in said
        assert since in said
    check = judge_pilot(run).checks[1]
    assert (str(check.outcome), told in check.text, since in check.text) == (pilot, True, True)
    assert main(["compare", str(other), str(run)]) == code
    assert told in capsys.readouterr().out.split("\n\n")[0]
    assert main(["compare", str(run), str(run)]) == code  # alike, and both were halted
    assert f"run (1) {'was ' if action == 'stop' and code else ''}{told}" in " ".join(capsys.readouterr().out.split())


RULE = Rule(stat="kl_k3", limit=1e-4, k=5.0, ceiling=0.1)


@pytest.mark.parametrize("floor", [0.0, 1e-5, 1e-2, 0.03, 0.09])
def test_the_limit_that_is_recorded_and_the_share_beside_it_are_the_breakers(floor):
    """Whichever of the two is nearer, the limit over the floor or the ceiling."""
    limit = allowed(RULE, floor)
    for k3 in (floor + limit * 0.5, floor + limit * 0.999, floor + limit * 1.001, 0.3):
        stats = {"kl_k3": k3, "floor/kl_k3": floor}
        assert read(RULE, stats).over is (used(RULE, stats) > 1)
        assert used(RULE, stats) == pytest.approx((k3 - floor) / limit)


def test_the_limit_is_recorded_over_the_ceiling_too():
    judge = RunJudge(ParityConfig(), measured_floor=False)
    judge.floor.values["floor/kl_k3"] = 1e-5
    stats = judge.scalars(window(kl_k3=0.2, trimmed__kl_k3=0.2))
    assert stats["limit/kl_k3"] == pytest.approx(1e-4)


def test_a_halts_text_keeps_the_excess_and_the_ceiling_apart(tmp_path):
    seen = []
    for step, (k3, floor) in enumerate([(3e-4, 1e-5), (8e-4, 1e-4), (0.2, 1e-4)], start=1):
        stats = window(kl_k3=k3, trimmed__kl_k3=k3, floor__kl_k3=floor)
        status = Status.HALT if step == 3 else Status.BREACH
        seen.append(Verdict(step=step, status=status, streak=step, breaches=("kl_k3",), stats=stats))
    text = halt_text(seen[-1], ParityConfig(), seen, tmp_path)
    lines = [" ".join(line.split()) for line in text.splitlines() if "→" in line or "(ceiling" in line]
    assert lines == ["excess/kl_k3 0.00029 → 0.0007 (limits <= 0.0001 → 0.0004)", "kl_k3 0.2 (ceiling <= 0.1)"]
