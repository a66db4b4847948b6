"""Crash-safe JSONL."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest
from support import TESTS
from support.windows import sums_of, verdict

from trl_parity.errors import ConfigError
from trl_parity.metrics.statistics import compute
from trl_parity.results import jsonl
from trl_parity.results.jsonl import JsonlSink
from trl_parity.verdict import Status, Verdict


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


def test_a_long_runs_file_is_cut_without_being_read(tmp_path):
    """Of 40 MB two windows and a torn line are moved: neither memory nor reading grows with what is kept."""
    path, padding = tmp_path / "metrics.jsonl", "x" * 4000
    with open(path, "w") as f:
        f.writelines(json.dumps({"step": step, "padding": padding}) + "\n" for step in range(1, 10_001))
        f.write('{"step": 10001, "padding": "' + padding)
    size, inode = path.stat().st_size, path.stat().st_ino
    tracemalloc.start()
    JsonlSink(tmp_path, resume_step=9998).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 < size / 30
    assert path.stat().st_ino == inode  # no copy of it was made
    kept = path.read_bytes()
    assert kept.count(b"\n") == 9998
    assert json.loads(kept[kept.rindex(b"\n", 0, -1) :])["step"] == 9998
    superseded = (tmp_path / "metrics.superseded.jsonl").read_text()
    assert superseded.count("\n") == 3
    assert [json.loads(line)["step"] for line in superseded.splitlines()[:2]] == [9999, 10_000]


@pytest.mark.parametrize(
    ("content", "kept", "moved"),
    [
        (b'{"step": 1}\n{"step": 2}\n', b'{"step": 1}\n{"step": 2}\n', None),  # nothing later
        (b'{"step": 7}\n{"step": 8}', b"", b'{"step": 7}\n{"step": 8}\n'),  # all later
        (b'{"step": 3}\n\n[1]\n{"step": "x"}\n', b'{"step": 3}\n', b'\n[1]\n{"step": "x"}\n'),  # foreign lines
        (b"no newline", b"", b"no newline\n"),
        (b'{"step": 4}\n' + b"z" * 200_000 + b"\n", b'{"step": 4}\n', b"z" * 200_000 + b"\n"),  # over many blocks
        (b'{"step": 5}', b"", b'{"step": 5}\n'),  # torn, if at its newline only
    ],
)
def test_what_is_kept_ends_with_the_last_whole_window_up_to_the_step(tmp_path, content, kept, moved):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    JsonlSink(tmp_path, resume_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept
    superseded = tmp_path / "metrics.superseded.jsonl"
    assert (superseded.read_bytes() if superseded.exists() else None) == moved


def test_a_line_longer_than_any_window_is_foreign_and_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "_LONGEST_LINE", 100)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "x": "' + b"y" * 100 + b'"}\n')
    JsonlSink(tmp_path, resume_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


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
from trl_parity.results.jsonl import JsonlSink
from support.windows import verdict
sink, v = JsonlSink(sys.argv[1]), verdict(1)
print("writing", flush=True)
while True:
    sink.write(v)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.slow_unit
def test_a_killed_writer_leaves_a_readable_file(tmp_path, kill):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(TESTS)], stdout=subprocess.PIPE)
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


def test_what_is_written_is_brought_to_the_disk_and_a_slow_disk_holds_nobody_up(tmp_path, monkeypatch):
    sizes, begun, released = [], threading.Event(), threading.Event()

    def sync(descriptor):
        size = os.fstat(descriptor).st_size
        begun.set()
        assert released.wait(20)
        sizes.append(size)

    monkeypatch.setattr(jsonl, "_sync", sync)
    sink, written = JsonlSink(tmp_path), []
    for step in (1, 2, 3):
        sink.write(verdict(step))  # the disk is busy with the first
        assert begun.wait(20)
        written.append(sink.path.stat().st_size)
    released.set()
    sink._syncing.result(20)
    sink.write(verdict(4))
    sink._syncing.result(20)
    whole = sink.path.stat().st_size
    assert sizes == [written[0], whole]
    sink.close()
    assert sizes == [written[0], whole, whole]


def test_a_disk_that_cannot_sync_loses_nothing_else(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(jsonl, "_sync", broken)
    sink = JsonlSink(tmp_path)
    for step in (1, 2):
        sink.write(verdict(step))
    sink.close()
    assert [row["step"] for row in rows(sink.path)] == [1, 2]


@pytest.mark.parametrize("linked", ["metrics.jsonl", "metrics.superseded.jsonl"])
def test_a_foreign_folders_links_are_not_followed(tmp_path, linked):
    run = tmp_path / "run"
    sink = JsonlSink(run)
    for step in (1, 2, 3):
        sink.write(verdict(step))
    sink.close()
    target = tmp_path / "theirs"
    if linked == "metrics.jsonl":
        (run / linked).rename(target)
    else:
        target.write_text("untouched")
    before = target.read_bytes()
    (run / linked).symlink_to(target)
    with pytest.raises(ConfigError, match="symbolic link, which is not followed"):
        JsonlSink(run, resume_step=2)
    assert target.read_bytes() == before


def test_the_sample_of_tokens_lies_beside_the_windows(tmp_path):
    sink = JsonlSink(tmp_path, name="tokens")
    row = {"position": 3, "rollout_logprob": -1.23456789, "trainer_logprob": -1.5, "log_ratio": -0.3, "entropy": None}
    sink.write_tokens(verdict(7), [row, row | {"entropy": float("nan")}])
    [line] = rows(tmp_path / "tokens.jsonl")
    assert (line["schema_version"], line["step"], line["position"], line["entropy"]) == (1, 7, [3, 3], [None, None])
    assert line["rollout_logprob"] == [-1.2346, -1.2346]
    JsonlSink(tmp_path, name="tokens")
    assert (tmp_path / "tokens-1.jsonl").exists()
