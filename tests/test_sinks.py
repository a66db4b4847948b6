"""Files and trackers: crash-safe JSONL, the real wandb client offline."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from trl_parity.errors import ConfigError
from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch
from trl_parity.results.jsonl import JsonlSink
from trl_parity.tracking.sinks import RichLog, WandbSink
from trl_parity.verdict import Status, Verdict


def sums_of(delta=0.1, rows=8, columns=4):
    rollout = torch.full((rows, columns), -1.0)
    trainer = rollout + delta
    return measure(
        ScoredBatch(
            mask=torch.ones(rows, columns, dtype=torch.bool),
            rollout_logprobs=rollout,
            trainer_logprobs=trainer,
            own_logprobs=trainer,
            entropy=torch.ones(rows, columns),
        )
    )


def verdict(step, **kwargs):
    return Verdict(step=step, status=Status.OK, streak=0, stats=compute(sums_of()), **kwargs)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def test_each_window_is_one_line_that_keeps_the_contract(tmp_path):
    sink = JsonlSink(tmp_path / "parity")
    sink.write(verdict(1))
    sink.write(Verdict(step=2, status=Status.ERROR, streak=1))
    first, second = rows(sink.path)
    assert first["schema_version"] == 2
    assert (first["step"], first["status"], first["streak"], first["breaches"]) == (1, "OK", 0, [])
    assert first["num_tokens"] == 32
    assert first["kl_k1"] == pytest.approx(-0.1, rel=1e-6)
    assert first["truncation/kept_mass"] is None
    assert second["status"] == "ERROR"


def test_infinite_statistics_are_written_as_valid_json(tmp_path):
    sink = JsonlSink(tmp_path)
    stats = compute(sums_of(delta=1999.0))
    sink.write(Verdict(step=1, status=Status.BREACH, streak=1, stats=stats))
    assert rows(sink.path)[0]["ratio/max"] == "inf"


def test_a_resumed_run_neither_repeats_nor_loses_windows(tmp_path):
    sink = JsonlSink(tmp_path)
    for step in range(1, 8):
        sink.write(verdict(step))
    sink.close()
    with open(sink.path, "ab") as f:
        f.write(b'{"step": 8, "status": "O')  # torn by a kill
    resumed = JsonlSink(tmp_path, resume_step=5)
    for step in (6, 7, 8):
        resumed.write(verdict(step))
    assert [row["step"] for row in rows(resumed.path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    superseded = (tmp_path / "metrics.superseded.jsonl").read_text()
    assert superseded.count("\n") == 3  # 6, 7 and the torn line: kept, apart
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_a_new_run_keeps_an_old_runs_file(tmp_path):
    for _ in range(3):
        sink = JsonlSink(tmp_path)
        sink.write(verdict(1))
        sink.close()
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "metrics-1.jsonl", "metrics-2.jsonl"}


def test_an_unwritable_directory_fails_at_the_start_with_a_remedy(tmp_path):
    (tmp_path / "parity").write_text("a file, not a directory")
    with pytest.raises(ConfigError, match="parity_dir or output_dir"):
        JsonlSink(tmp_path / "parity")


def test_a_full_disk_warns_once_and_the_run_goes_on(tmp_path, caplog):
    sink = JsonlSink(tmp_path)
    whole, sink._file = sink._file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    sink.write(verdict(1))
    sink.write(verdict(2))
    assert caplog.text.count("Training goes on") == 1
    sink._file = whole
    sink.write(verdict(3))  # room again
    assert [row["step"] for row in rows(sink.path)] == [3]


WRITER = """
import sys; sys.path.insert(0, sys.argv[2])
from test_sinks import JsonlSink, verdict
sink, v = JsonlSink(sys.argv[1]), verdict(1)
print("writing", flush=True)
while True:
    sink.write(v)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_writer_leaves_a_readable_file(tmp_path, kill):
    here = os.path.dirname(__file__)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), here], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.5)
    process.send_signal(kill)
    process.wait()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 100
    for line in lines[:-1]:
        assert json.loads(line)["status"] == "OK"
    kept = len(lines) if lines[-1].endswith(b"\n") else len(lines) - 1
    assert len(rows(JsonlSink(tmp_path, resume_step=1).path)) == kept


def inspect(run_dir):
    """Rows of an offline run, read back with wandb's own command."""
    [run_file] = list(run_dir.rglob("*.wandb"))
    command = [os.path.join(os.path.dirname(sys.executable), "wandb"), "leet", "inspect", "--json", str(run_file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines()]


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


def test_tokens_of_a_scored_sample_are_those_of_their_rows():
    """Where TRL makes no pass, only some rows are scored, or all in another order: ids belong to their rows."""
    from test_incident import batch, decode

    from trl_parity.metrics.tokens import sample_tokens, worst_tokens
    from trl_parity.results.incident import sequence_rows

    rollout, scored = batch(rows=4, columns=3)
    for picked in ([2, 3, 0, 1], [3, 1]):
        rows = torch.tensor(picked)
        some = ScoredBatch(
            mask=scored.mask[rows], rollout_logprobs=scored.rollout_logprobs[rows],
            trainer_logprobs=scored.trainer_logprobs[rows], own_logprobs=scored.own_logprobs[rows],
            entropy=scored.entropy[rows], rows=rows,
        )  # fmt: skip
        for row in worst_tokens(rollout, some, 5, decode) + sequence_rows(rollout, some, decode, count=2):
            assert row["sequence"] in picked
            at = row["sequence"], row["position"]
            assert row["token_id"] == int(rollout.completion_ids[at])
            assert row["rollout_logprob"] == pytest.approx(float(rollout.rollout_logprobs[at]))
            assert row["log_ratio"] == pytest.approx(row["sequence"] / 10, abs=1e-6)
        sample = sample_tokens(some, 4, seed=0)
        assert len(sample) == 4
        assert all(set(row) == {"position", "entropy", "rollout_logprob", "trainer_logprob", "log_ratio"}
                   for row in sample)  # fmt: skip


def test_a_sample_is_uniform_finite_and_leaves_the_random_state_alone():
    from test_incident import batch

    from trl_parity.metrics.tokens import sample_tokens

    _, scored = batch(rows=10, columns=10)
    scored.mask[0] = False
    scored.trainer_logprobs[1] = -float("inf")
    state = torch.get_rng_state()
    drawn = [row["rollout_logprob"] for seed in range(200) for row in sample_tokens(scored, 20, seed)]
    assert torch.equal(state, torch.get_rng_state())
    counts = torch.unique(torch.tensor(drawn), return_counts=True)[1]
    assert len(counts) == 80  # no token of the rows left out
    assert 25 < counts.min() <= counts.max() < 80  # 50 each, give or take


def test_tokens_of_tables_are_read_together():
    """One number read by itself is one wait for an accelerator."""
    from test_incident import batch
    from torch.utils._python_dispatch import TorchDispatchMode

    from trl_parity.metrics.tokens import sample_tokens, worst_tokens

    one_by_one = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "aten::_local_scalar_dense":
                one_by_one.append(func)
            return func(*args, **(kwargs or {}))

    rollout, scored = batch(rows=10, columns=10)
    with Reads():
        assert len(worst_tokens(rollout, scored, 20, lambda ids: str(ids))) == 20
        assert len(sample_tokens(scored, 50, seed=0)) == 50
    assert not one_by_one


def test_the_sample_of_tokens_lies_beside_the_windows(tmp_path):
    sink = JsonlSink(tmp_path, name="tokens")
    row = {"position": 3, "rollout_logprob": -1.23456789, "trainer_logprob": -1.5, "log_ratio": -0.3, "entropy": None}
    sink.write_tokens(verdict(7), [row, row | {"entropy": float("nan")}])
    [line] = rows(tmp_path / "tokens.jsonl")
    assert (line["schema_version"], line["step"], line["position"], line["entropy"]) == (1, 7, [3, 3], [None, None])
    assert line["rollout_logprob"] == [-1.2346, -1.2346]
    JsonlSink(tmp_path, name="tokens")
    assert (tmp_path / "tokens-1.jsonl").exists()
