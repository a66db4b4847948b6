"""The page for the first ten minutes, run as it is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import PATH, ROOT
from support.models import save_tiny_model
from support.processes import environment

pytestmark = pytest.mark.engine


def test_the_first_ten_minutes_go_as_their_page_says(tmp_path):
    page = (ROOT / "docs" / "first_run.md").read_text()
    [script] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [commands] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(script)
    save_tiny_model(tmp_path / "my-model")
    commands_first = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    env = environment(PYTHONPATH=PATH, PATH=commands_first)
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-4000:]
    assert "trl-parity: OK, healthy in all 5 windows" in done.stderr
    assert "Cause    truncated_sampling: explains" in done.stderr
    assert "trl-parity: HALT at step 3" in done.stderr
    assert done.stdout.count("exit code 1") == 2
    assert (tmp_path / "incident.html").stat().st_size > 10_000
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
