"""A real pretrained model with the default configuration. Slow: `python -m pytest -m slow`."""

import json
import subprocess
import sys

import pytest
from support import ROOT
from support.processes import environment

BENCHMARK = ROOT / "benchmarks" / "both_models.py"


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(3000)
def test_both_models_pass_clean_and_halt_on_faults_with_one_default_configuration(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARK), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout[-3000:]
    rows = json.loads(out.read_text())
    assert {row["model"] for row in rows} == {"tiny", "smollm2"}
    for row in rows:
        if row["case"].startswith("clean"):
            assert set(row["statuses"]) <= {"OK", "WARN"}, row
        else:
            assert row["statuses"] == ["BREACH", "BREACH", "HALT"], row
    floors = {row["model"]: row["floor/kl_k3"] for row in rows if row["case"] == "clean"}
    assert floors["smollm2"] > 20 * floors["tiny"]
