"""Files and trackers: crash-safe JSONL, the real wandb client offline."""

import json
import sys

import pytest
from support.wandb_server import inspect
from support.windows import sums_of, verdict

from trl_parity.errors import ConfigError
from trl_parity.tracking.sinks import RichLog, TrackioSink, WandbSink


@pytest.mark.slow_unit
def test_wandb_gets_a_histogram_a_table_and_an_alert(tmp_path):
    import wandb

    run = wandb.init(mode="offline", dir=tmp_path, project="parity-test", reinit="finish_previous")
    sink = WandbSink()
    sink.define_metrics()
    sink.log_rich(RichLog(4, sums_of(), [{"step": 4, "token": "<b>", "log_ratio": 0.1}], [], [verdict(4)]))
    sink.alert(verdict(4), "text")
    run.finish()
    lines = inspect(tmp_path)
    text = json.dumps(lines)
    defined = [line for line in lines if line.get("type") == "metric"]
    assert any("train/parity/kl_k3" in json.dumps(line) for line in defined), lines[:3]
    assert "parity/log_ratio" in text
    assert "parity/worst_tokens" in text
    assert "trl-parity OK at step 4" in text


@pytest.mark.slow_unit
def test_a_failing_wandb_warns_once_and_the_run_goes_on(tmp_path, caplog):
    import wandb

    run = wandb.init(mode="offline", dir=tmp_path, reinit="finish_previous")
    sink = WandbSink()
    run.finish()
    sink._module = type("Dead", (), {"run": run, "Histogram": wandb.Histogram, "Table": wandb.Table})
    for step in (1, 2):
        sink.log_rich(RichLog(step, sums_of(), [], [], []))
    assert caplog.text.count("wandb failed") == 1
    sink._module = wandb
    sink.log_rich(RichLog(3, sums_of(), [], [], []))  # no active run at all: nothing to do, nothing to raise


def test_wandb_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install"):
        WandbSink()


@pytest.mark.slow_unit
def test_tables_and_rows_of_trackio_are_at_the_trainers_step(tmp_path, monkeypatch):
    """Rows as TrackioCallback logs them, without a step, here every 5 steps; tables at steps of their own."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    for module in ("trackio", "trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path, raising=False)
    trackio.init(project="steps", name="run", embed=False)
    sink = TrackioSink()
    for step in range(1, 16):
        if step in (1, 7, 10):
            sink.log_rich(RichLog(step, sums_of(), [{"step": step, "log_ratio": 0.1}], [], [verdict(step)]))
        if step % 5 == 0:
            sink.before_row(step)
            trackio.log({"train/parity/kl_k3": 0.1, "train/global_step": step})
    trackio.finish()
    rows = SQLiteStorage.get_logs("steps", "run")
    assert {row["step"] for row in rows if "train/parity/kl_k3" in row} == {5, 10, 15}
    assert {row["step"] for row in rows if "parity/worst_tokens" in row} == {1, 7, 10}
    assert all(row["step"] == row["train/global_step"] for row in rows)
