"""The pilot's verdict on runs that ParityMonitor recorded, and on one short real GRPO run."""

import json
import sys

import pytest
from support import TESTS
from support.pilots import record, rewards_of

from trl_parity import RewardBaseline
from trl_parity.cli import main
from trl_parity.preflight.pilot import Decision, judge_pilot
from trl_parity.results.rejudge import read_windows


def outcomes(report):
    return {check.name: str(check.outcome) for check in report.checks}


@pytest.fixture(scope="module")
def baseline():
    return RewardBaseline(rewards_of(0.5, n=500, seed=99))


def test_a_healthy_run_may_scale_up(tmp_path, baseline):
    report = judge_pilot(record(tmp_path), baseline, steps=8)
    assert set(outcomes(report).values()) == {"pass"}, report.checks
    assert report.decision is Decision.SCALE_UP
    assert report.decision.exit_code == 0
    drift = next(check.text for check in report.checks if check.name == "drift")
    assert "noise floor 1e-06" in drift
    assert "% of the limit" in drift
    assert judge_pilot(tmp_path).decision is Decision.SCALE_UP  # without a baseline the rest decides


def test_a_run_leaves_its_last_rewards_as_a_baseline(tmp_path):
    record(tmp_path, steps=3)
    kept = RewardBaseline.load(tmp_path / "parity" / "rewards.json")
    assert kept.rewards.tolist() == pytest.approx([r for step in (1, 2, 3) for r in rewards_of(0.5, seed=step)])
    record(tmp_path, steps=3, rewards=lambda step: [0.5] * 4)  # too few: and none of an earlier run
    assert not (tmp_path / "parity" / "rewards.json").exists()


def test_a_halt_is_a_no_whatever_else_was_seen(tmp_path, baseline):
    report = judge_pilot(record(tmp_path, shift=0.3), baseline, steps=8, returncode=1)
    assert read_windows(tmp_path)[2]["status"] == "HALT"
    assert report.decision.exit_code == 1
    assert outcomes(report)["parity"] == "fail"
    assert "halted at step 3: " in next(check.text for check in report.checks if check.name == "parity")


def test_breaches_that_never_halt_still_count(tmp_path, baseline):
    in_a_row_only = {"breach_memory": 0, "rules": {f"evidence/{t}": None for t in ("honesty", "drift", "change")}}
    run = record(tmp_path / "many", steps=12, shift=0.3, shifted=lambda step: step % 3 == 1, **in_a_row_only)
    many = judge_pilot(run, baseline)
    assert {w["status"] for w in read_windows(tmp_path / "many")} == {"OK", "BREACH"}
    assert outcomes(many)["parity"] == "fail"
    once = judge_pilot(record(tmp_path / "once", steps=12, shift=0.3, shifted=lambda step: step == 4), baseline)
    assert once.decision is Decision.SCALE_UP  # one in twelve: what persistence is for
    last = judge_pilot(record(tmp_path / "last", steps=12, shift=0.3, shifted=lambda step: step == 12), baseline)
    assert outcomes(last)["parity"] == "fail"


def test_an_entropy_that_collapses_is_a_no(tmp_path, baseline):
    report = judge_pilot(record(tmp_path, steps=10, entropy=lambda step: 0.7**step), baseline)
    assert outcomes(report)["entropy"] == "fail"
    assert report.decision.exit_code == 1
    sinking = judge_pilot(record(tmp_path / "b", steps=10, entropy=lambda step: 0.95**step), baseline)
    assert outcomes(sinking)["entropy"] == "pass"


@pytest.mark.parametrize(
    ("rewards", "outcome", "text"),
    [
        (lambda step: rewards_of(0.3, seed=step), "fail", "lower than the baseline's"),
        (lambda step: rewards_of(0.9, seed=step), "pass", "higher than the baseline's"),
        (lambda step: rewards_of(0.48, seed=step), "pass", "as the baseline's"),
        (lambda step: [0.3, 0.7] * 16, "fail", "distributed otherwise"),
        (lambda step: [0.5] * 32, "fail", "every one is 0.5: nothing to learn from"),
        (lambda step: [float("nan")] * 32, "unknown", "is missing: fewer than 20 finite ones"),
        (lambda step: [0.5, 0.1], "unknown", "is missing"),
    ],
)
def test_rewards_are_compared_with_the_baseline(tmp_path, baseline, rewards, outcome, text):
    report = judge_pilot(record(tmp_path, rewards=rewards), baseline, steps=8)
    check = next(check for check in report.checks if check.name == "rewards")
    assert (str(check.outcome), text in check.text) == (outcome, True), check
    assert report.decision.exit_code == {"pass": 0, "fail": 1, "unknown": 2}[outcome]


def test_what_cannot_be_told_is_said(tmp_path, baseline):
    record(tmp_path)
    assert judge_pilot(tmp_path, baseline, steps=20).decision.exit_code == 2  # step 8 of 20
    windows = read_windows(tmp_path)
    path = tmp_path / "parity" / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in windows[::2]))  # every batch feeds two steps
    assert judge_pilot(tmp_path, baseline, steps=8).decision.exit_code == 0
    path.write_text("".join(json.dumps(row) + "\n" for row in windows))
    crashed = judge_pilot(tmp_path, baseline, steps=8, returncode=1)
    assert crashed.decision.exit_code == 2
    assert "ended with exit code 1 after step 8" in crashed.checks[0].text
    nothing = judge_pilot(tmp_path / "empty", baseline, steps=8)
    assert nothing.decision.exit_code == 2
    rows = [json.loads(line) | {"status": "NO_DATA", "kl_k3": None} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outcomes(judge_pilot(tmp_path, baseline))["parity"] == "unknown"
    rows = [row | {"status": "OK" if i < 6 else "ERROR"} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "measurement failed too often" in judge_pilot(tmp_path, baseline).checks[1].text
    (tmp_path / "parity" / "rewards.json").write_text("{")
    assert outcomes(judge_pilot(tmp_path, baseline))["rewards"] == "unknown"


TRAIN = """
import argparse, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.pilots import record
parser = argparse.ArgumentParser()
parser.add_argument("--max_steps", type=int)
parser.add_argument("--output_dir")
parser.add_argument("--fail", action="store_true")
options, _ = parser.parse_known_args()
print("training")
if options.fail:
    sys.exit("out of memory")
record(Path(options.output_dir), options.max_steps)
"""


@pytest.mark.slow_unit
def test_the_command_runs_the_training_with_its_overrides(tmp_path, capfd):
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(tests=str(TESTS)))
    output, kept = tmp_path / "run", tmp_path / "rewards.json"
    pilot = ["pilot", "--steps", "6", "--output", str(output), "--save-baseline", str(kept), "--json"]
    assert main([*pilot, "--", sys.executable, str(script), "--hub_token", "Zq81xVbn27Lk"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert "training" in err
    assert result["decision"] == "scale up"
    assert result["command"][2:4] == ["--hub_token", "***"]
    assert "Zq81xVbn27Lk" not in out + (output / "pilot.json").read_text()
    assert result["command"][-4:] == ["--max_steps", "6", "--output_dir", str(output)]
    assert json.loads((output / "pilot.json").read_text()) == result
    assert len(read_windows(output)) == 6
    assert RewardBaseline.load(kept).rewards.size == 6 * 32
    # again, compared with what the first left, where the command says where its settings go
    other = tmp_path / "other"
    placed = [sys.executable, str(script), "--max_steps", "{steps}", "--output_dir={output}"]
    assert main(["pilot", "--steps", "3", "--output", str(other), "--baseline", str(kept), "--", *placed]) == 0
    assert "as the baseline's" in " ".join(capfd.readouterr().out.split())
    assert len(read_windows(other)) == 3
    assert main(["pilot", "--output", str(other), "--baseline", str(kept)]) == 0  # a run that is over
    assert main([*pilot, "--", sys.executable, str(script)]) == 2
    assert "is not empty. Expected a new folder" in capfd.readouterr().err
    kept.unlink()
    pilot[4] = str(tmp_path / "third")
    assert main([*pilot, "--", sys.executable, str(script), "--fail"]) == 2
    out, err = capfd.readouterr()
    assert json.loads(out)["decision"] == "could not tell"
    assert json.loads(out)["returncode"] == 1
    assert "was not written" in err
    assert not kept.exists()


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (("--", "no-such-command-here"), "cannot start 'no-such-command-here'"),
        ((), "no command after `--`"),
        (("--steps", "0", "--", "true"), "--steps is 0"),
        (("--min-effect", "0", "--", "true"), "--min-effect is 0"),
        (("--baseline", "/nowhere.json", "--", "true"), "cannot read /nowhere.json"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path, capsys, arguments, seen):
    assert main(["pilot", "--output", str(tmp_path / "run"), *arguments]) == 2
    assert seen in capsys.readouterr().err
