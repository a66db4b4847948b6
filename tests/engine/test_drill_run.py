"""``trl-parity drill`` on the real stack."""

import json
import subprocess
import sys

import pytest
from support.processes import environment


@pytest.mark.engine
def test_a_fault_is_halted_and_the_control_is_not(tmp_path):
    command = [sys.executable, "-m", "trl_parity", "drill", "temperature", "control", "--json", "--keep", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"))
    assert done.returncode in (0, 1), done.stderr[-3000:]
    result = json.loads(done.stdout)
    control, broken = result["runs"]
    assert (control["drill"], broken["drill"]) == ("control", "temperature")
    assert not control["detected"]
    assert control["seconds_to_diagnose"] is not None  # it was asked
    assert set(control["statuses"]) == {"OK"}
    assert broken["detected"]
    assert broken["windows"] == 3
    assert "HALT at step 3" in broken["halt_message"]
    assert [row["detected"] for row in result["summary"]] == [0, 1]
    assert done.returncode == (0 if control["correct"] and broken["correct"] else 1)
    assert (tmp_path / "temperature-t0.7-s0" / "parity" / "metrics.jsonl").is_file()
    assert "vllm" in result["versions"]
