"""Judging finished runs again, through the command people type."""

import json
import subprocess
import sys

import pytest
from support.windows import window

from trl_parity import ParityConfig, ParityMonitor
from trl_parity.cli import main
from trl_parity.errors import ConfigError, DataError
from trl_parity.judging.breaker import Breaker
from trl_parity.judging.evidence import Evidence
from trl_parity.results.reader import Columns
from trl_parity.results.rejudge import REJUDGED, changed_config, read_windows, rejudge

FLOOR = {"floor/kl_k3": 1e-5}


def run(tmp_path, values, **config):
    """A recorded run with these k3 KLs."""
    monitor = ParityMonitor(output_dir=tmp_path, floor={"kl_k3": 1e-5}, **config)
    for step, value in enumerate(values, start=1):
        stats = window(kl_k3=value, trimmed__kl_k3=value)
        monitor.judge(step, monitor.scalars(stats))
    monitor.close()
    return monitor


def test_with_the_runs_own_settings_every_window_is_judged_as_it_was(tmp_path):
    values = [1e-5, 2e-4, 1e-5, 2e-4, 2e-4, 8e-5, 2e-4, 1e-5, 3e-4]
    recorded = run(tmp_path, values, consecutive=2, warmup=1)
    rows = read_windows(tmp_path)
    config = ParityConfig(consecutive=2, warmup=1, floor_tokens=0)
    for (row, verdict), original in zip(rejudge(rows, config), recorded.verdicts, strict=True):
        assert (row["status"], row["streak"]) == (str(original.status), original.streak)
        assert (verdict.status, verdict.streak, verdict.breaches) == (
            original.status, original.streak, original.breaches,
        )  # fmt: skip


def test_the_command_says_which_window_would_have_halted(tmp_path, capsys):
    run(tmp_path, [1e-5, 1e-4, 1e-4, 1e-4, 1e-4])
    assert main(["replay", str(tmp_path), "--set", "rules.kl_k3.limit=1e-5", "--set", "consecutive=2"]) == 0
    out = capsys.readouterr().out
    assert "recorded: halted nowhere" in out
    assert "replayed: would have halted at step 3" in out
    assert "excess/kl_k3" in out


def test_json_lists_what_changed(tmp_path, capsys):
    run(tmp_path, [2e-4] * 4)
    assert main(["replay", str(tmp_path / "parity" / "metrics.jsonl"), "--set", "rules.kl_k3.k=100", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["recorded"] == {"statuses": {"BREACH": 2, "HALT": 2}, "first_halt": 3}
    assert result["replayed"]["first_halt"] is None
    assert [change["replayed"] for change in result["changed"]] == ["OK"] * 4


def test_a_rule_can_be_dropped_and_all_windows_listed(tmp_path, capsys):
    run(tmp_path, [2e-4] * 4)
    assert main(["replay", str(tmp_path), "--set", "rules.kl_k3=null", "--all"]) == 0
    out = capsys.readouterr().out
    assert "would have halted nowhere (4 OK)" in out
    assert len([line for line in out.splitlines() if line.lstrip()[:1].isdigit()]) == 4


def test_a_torn_line_is_passed_over_and_infinities_come_back(tmp_path):
    run(tmp_path, [float("inf"), 1e-5])
    path = tmp_path / "parity" / "metrics.jsonl"
    with open(path, "ab") as f:
        f.write(b'{"step": 3, "sta')
    rows = read_windows(path)
    assert [row["kl_k3"] for row in rows] == [float("inf"), 1e-5]
    assert [str(v.status) for _, v in rejudge(rows, ParityConfig(floor_tokens=0))] == ["BREACH", "OK"]


def test_an_intermittent_fault_is_replayed_as_it_was_judged_and_told_from_its_beginning(tmp_path):
    run(tmp_path, [1e-5, 2e-4, 1e-5, 2e-4, 1e-5, 2e-4])
    rows = read_windows(tmp_path)
    assert [row["status"] for row in rows] == ["OK", "BREACH", "OK", "BREACH", "OK", "HALT"]
    assert [(str(v.status), v.level) for _, v in rejudge(rows, ParityConfig(floor_tokens=0))] == [
        (row["status"], row["breaker/level"]) for row in rows
    ]
    assert not any(v.halted for _, v in rejudge(rows, ParityConfig(floor_tokens=0, breach_memory=0)))
    columns = Columns.of(rows, ["kl_k3"])
    assert (columns.first_halt, columns.onset) == (6, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Expected a run's metrics.jsonl or its folder"),
        ("", "holds no window"),
        ('{"step": 1, "status": "OK", "schema_version": 99}\n', "schema_version 99"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_windows(tmp_path / "metrics.jsonl")
    assert main(["replay", str(tmp_path / "metrics.jsonl")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("consecutive", "Expected NAME=VALUE"),
        ("consecutiv=2", "did you mean 'consecutive'"),
        ("rules.kl_k4.k=2", "did you mean 'kl_k3'"),
        ("consecutive=[1", "not valid YAML"),
    ],
)
def test_a_wrong_assignment_is_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        changed_config(ParityConfig(), [assignment])


@pytest.mark.parametrize("assignment", ["truncation=ignore", "every_n_steps=2", "action=log"])
def test_what_was_measured_cannot_be_judged_again_otherwise(tmp_path, capsys, assignment):
    run(tmp_path, [1e-5, 1e-5])
    assert main(["replay", str(tmp_path), "--set", assignment]) == 2
    name = assignment.split("=")[0]
    assert f"{name} can't be tried out on them. Expected one of: rules, consecutive" in capsys.readouterr().err


def test_whatever_a_judge_looks_at_can_be_tried_out():
    class Spy:
        def __getattr__(self, name):
            seen.add(name)
            return getattr(config, name)

    config, seen = ParityConfig(), set()
    Breaker.from_config(Spy())
    Evidence.from_config(Spy())
    settings = seen & set(ParityConfig.__dataclass_fields__)
    assert {"consecutive", "evidence_alpha"} <= settings <= set(REJUDGED)


def test_a_count_that_is_none_is_read_as_none_counted(tmp_path):
    run(tmp_path, [1e-5])
    path = tmp_path / "parity" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"num_tokens": ', '"num_tokens": "inf", "was": '))
    [(_, verdict)] = rejudge(read_windows(path), ParityConfig(floor_tokens=0))
    assert verdict.stats.num_tokens == 0


def test_assignments_reach_rules_with_slashes_and_bare_limits():
    config = changed_config(
        ParityConfig(rules={"chi2": 0.5}), ["rules.logp_abs_diff/mean.limit=1e-2", "rules.chi2.consecutive=7"]
    )
    rules = {rule.stat: rule for rule in config.resolved_rules()}
    assert (rules["logp_abs_diff/mean"].limit, rules["logp_abs_diff/mean"].k) == (0.01, 3.0)
    assert (rules["chi2"].limit, rules["chi2"].consecutive) == (0.5, 7)


def test_replaying_needs_no_torch():
    code = (
        "import sys, trl_parity.cli, trl_parity.results.rejudge; print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
