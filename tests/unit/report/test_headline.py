"""The one sentence about a run, the line of `watch`, and the pilot's answer: what is missing is not healthy."""

import io
import json
import math
from collections import Counter

import pytest
from rich.console import Console
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.preflight.pilot import judge_pilot
from trl_parity.report.messages import findings, start_text
from trl_parity.report.summary import COLUMNS, Summary, headline, statistics, summarize
from trl_parity.report.terminal import dashboard
from trl_parity.results.reader import Columns
from trl_parity.verdict import SEVERITY, Status, Verdict, enough_judged, judged, worst


def rows(statuses):
    return [
        {"step": step, "status": status, "streak": 0, "reason": "", "kl_k3": 1e-6, "entropy/trainer": 1.0}
        for step, status in enumerate(statuses.split(), start=1)
    ]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ("OK " * 10, ("OK", "healthy in all 10 windows, to step 10.")),
        ("OK " * 6 + "NO_DATA " * 4, ("OK", "healthy in 6 of 10 windows, to step 10; 4 not judged (4 NO_DATA).")),
        ("CALIBRATING " * 5 + "OK " * 5,
         ("OK", "healthy in 5 of 10 windows, to step 10; 5 not judged (5 CALIBRATING).")),
        ("OK " + "NO_DATA " * 99,
         ("NO_DATA", "healthy in 1 of 100 windows, to step 100; 99 not judged (99 NO_DATA).")),
        ("OK OK NO_DATA CALIBRATING CALIBRATING",
         ("NO_DATA", "healthy in 2 of 5 windows, to step 5; 3 not judged (1 NO_DATA, 2 CALIBRATING).")),
        ("OK " + "ERROR " * 99, ("ERROR", "99 of 100 windows could not be measured; 99 not judged (99 ERROR).")),
        ("NO_DATA " * 3, ("NO_DATA", "3 windows, none judged healthy or ill (no noise floor yet).")),
        ("WARN NO_DATA",
         ("WARN", "never over a limit; 1 of 2 windows near one or watched; 1 not judged (1 NO_DATA).")),
        ("OK ERROR BREACH",
         ("BREACH", "1 of 3 windows over a limit, none halted; 1 not judged (1 ERROR); over the limit since step 2.")),
    ],
)  # fmt: skip
def test_the_sentence_tells_how_many_windows_were_judged(tmp_path, statuses, expected):
    assert headline(Summary(path=tmp_path, columns=Columns.of(rows(statuses), COLUMNS))) == expected


def test_watch_tells_them_too(tmp_path):
    def line(statuses):
        console = Console(width=160, file=io.StringIO())
        console.print(dashboard(tmp_path, rows(statuses), ParityConfig(), None, 160))
        return console.file.getvalue().splitlines()[0].strip()

    assert line("NO_DATA NO_DATA OK").endswith("3 windows, 1 judged (2 NO_DATA)")
    assert line("OK OK").endswith("2 windows")


@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [
        ("OK " * 10, "pass"),
        ("NO_DATA " * 5 + "OK " * 5, "pass"),
        ("NO_DATA " * 6 + "OK " * 5, "unknown"),
        ("NO_DATA " * 99 + "OK", "unknown"),
        ("NO_DATA " * 99 + "WARN", "unknown"),
        ("ERROR " * 99 + "OK", "unknown"),
        ("NO_DATA " * 99 + "BREACH", "fail"),
    ],
)
def test_a_pilot_of_which_half_was_not_judged_is_no_pass(tmp_path, statuses, outcome):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row | {"schema_version": 2}) + "\n" for row in rows(statuses)))
    parity = judge_pilot(tmp_path).checks[1]
    assert str(parity.outcome) == outcome, parity
    if outcome == "pass":
        n = len(statuses.split())
        assert parity.text.startswith(f"{statuses.split().count('OK')} of {n} windows judged")


@pytest.mark.parametrize(("name", "check"), [("kl_k3", 2), ("trimmed/kl_k3", 2), ("entropy/trainer", 3)])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_none_fails_a_pilot(tmp_path, name, check, value):
    told = rows("OK " * 5)
    told[2][name] = value
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row | {"schema_version": 2}) + "\n" for row in told))
    found = judge_pilot(tmp_path).checks[check]
    assert (str(found.outcome), "no finite number in 1 of 5 windows" in found.text) == ("fail", True), found


@pytest.mark.parametrize(("value", "share"), [(0.005, 0.5), (math.inf, math.inf), (math.nan, math.inf)])
def test_a_number_that_is_none_uses_more_than_its_limit(value, share):
    config = ParityConfig(rules={"honesty_gap": {"limit": 0.01}})
    [found] = statistics(["honesty_gap"], {"honesty_gap": [0.001, value]}, {"honesty_gap": value}, config)
    assert found.share == share


def test_there_is_one_order_and_what_was_not_judged_is_worse_than_healthy():
    assert [str(s) for s in SEVERITY] == ["OK", "CALIBRATING", "NO_DATA", "WARN", "ERROR", "BREACH", "HALT"]
    assert set(SEVERITY) == set(Status)
    assert worst(["OK", "NO_DATA", "OK"]) is Status.NO_DATA
    assert worst(["BREACH", "something else", "HALT"]) is Status.HALT
    assert worst(["something else"]) is Status.ERROR


def test_half_of_the_windows_is_enough():
    assert (
        judged(Counter({"OK": 1, "WARN": 1, "BREACH": 1, "HALT": 1, "ERROR": 1, "NO_DATA": 1, "CALIBRATING": 1})) == 4
    )
    assert [enough_judged({"OK": n, "NO_DATA": 2}) for n in (1, 2, 3)] == [False, True, True]
    assert not enough_judged({})


def test_numbers_that_are_none_are_told_as_such():
    stats = window(kl_k3=0.2, honesty_low=math.nan, honesty_high=math.nan, entropy__relative=math.nan)
    verdict = Verdict(step=1, status=Status.BREACH, streak=1, breaches=("kl_k3",), stats=stats)
    assert list(findings(verdict)) == ["The policy's entropy is no finite number."]


def cut_off(**stats):
    return window(truncation__kept_mass=0.9, honesty_low=0.88, honesty_high=0.92, own_head__kl_k3=5e-3, **stats)


@pytest.mark.parametrize(
    ("stats", "told"),
    [
        # judged as the loss is
        ({"kl_k3": 5e-3, "replayed__kl_k3": 1e-5}, "too, the drift is 1e-05 instead of 0.005: the loss does not know"),
        ({"kl_k3": 5e-3, "replayed__kl_k3": 4e-3}, "are not those of the law that was sampled"),
        # judged with truncation="replay", also by versions that had no replayed/*
        ({"kl_k3": 1e-3, "replayed__kl_k3": 1e-3}, "The loss, which knows no truncation, drifts more (0.005)"),
        ({"kl_k3": 1e-3}, "The loss, which knows no truncation, drifts more (0.005)"),
    ],
)
def test_a_truncation_the_loss_does_not_know_is_told_as_what_it_is(stats, told):
    rules = ("honesty_gap", "kl_k3")
    texts = list(findings(Verdict(step=1, status=Status.BREACH, streak=1, breaches=rules, stats=cut_off(**stats))))
    assert told in texts[-1], texts


def test_what_the_verdict_leaves_out_is_told_at_the_start_and_in_the_report(tmp_path):
    def lines(**settings):
        config = ParityConfig(**settings)
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps(row | {"schema_version": 2}) + "\n" for row in rows("OK"))
        )
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        return [start_text("GRPOTrainer", config, tmp_path), *summarize(tmp_path).notes]

    [start] = lines()
    assert "own-head" not in start
    start, note = lines(truncation="replay")
    assert note in start
    assert "the verdict leaves out own-head drift (parity/own_head/*)" in note
