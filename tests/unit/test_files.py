"""Files with a version: what is refused, in which words."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from trl_parity.errors import ConfigError, DataError
from trl_parity.files import FolderLock, check_version, jsonable, open_log, read_versioned, sweep, write_atomic

GOOD = {"schema_version": 2, "name": "a", "count": 3}
KINDS = {"name": str, "count": int}


def read(path, **more):
    return read_versioned(path, (1, 2), KINDS, expected="a note", remedy="write it again", damaged=DataError, **more)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "made" / "x.json"
    write_atomic(path, json.dumps(GOOD | {"later": 1}))
    assert read(path) == GOOD | {"later": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("{", DataError, r"x\.json is not valid JSON \(.*\)\. Expected a note; write it again\."),
        ("[" * 100_000, DataError, r"x\.json is not valid JSON"),
        ("[1]", DataError, r"x\.json holds a list\. Expected a mapping, a note; write it again\."),
        (GOOD | {"schema_version": 3}, ConfigError, r"schema_version 3\. Expected one of \(1, 2\): .*update this one"),
        (GOOD | {"schema_version": "2"}, ConfigError, r"'2'\. .*: read it with the trl-parity that wrote it\."),
        (GOOD | {"schema_version": True}, ConfigError, "schema_version True"),
        ({"name": "a", "count": 3}, ConfigError, "schema_version None"),
        (GOOD | {"count": True}, DataError, r"x\.json has count as bool\. Expected a note; write it again\."),
        (GOOD | {"count": "3"}, DataError, "count as str"),
        ({"schema_version": 1, "name": "a"}, DataError, "has no count"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_by_name(tmp_path, content, error, words):
    path = tmp_path / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(error, match=words):
        read(path)


def test_a_file_that_is_not_there_or_too_large(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(ConfigError, match=r"cannot read .*x\.json: No such file.*Expected a note; write it again\."):
        read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not valid JSON"):
        read(path)
    path.write_text(json.dumps(GOOD))
    assert read(path, largest=100)["count"] == 3
    with pytest.raises(DataError, match=r"has \d+ bytes\. Expected a note"):
        read(path, largest=10)


def test_a_version_has_its_own_error_and_remedy(tmp_path):
    check_version(tmp_path, 1, (1,))
    with pytest.raises(DataError, match=r"has schema_version 2\. Expected 1: drop it\."):
        check_version(tmp_path, 2, (1,), DataError, "drop it")


def test_jsonable_is_strict_json():
    value = {
        1: (math.inf, -math.nan),
        "a": np.float64(math.inf),
        "b": np.arange(2),
        "c": {True},
        "d": PurePosixPath("d"),
    }
    found = jsonable(value)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == {"1": ["inf", "nan"], "a": "inf", "b": [0, 1], "c": [True], "d": "d"}


# ---- links, locks, leftovers


def test_nothing_is_written_through_a_link(tmp_path):
    (target := tmp_path / "theirs").write_text("untouched")
    (link := tmp_path / "run" / "config.json").parent.mkdir()
    link.symlink_to(target)
    # names that were once guessed
    for name in (f".config.json.{os.getpid()}.tmp", ".config.json.tmp", "config.json.tmp"):
        (link.parent / name).symlink_to(target)
    write_atomic(link, "ours")
    assert target.read_text() == "untouched"
    assert link.read_text() == "ours"
    assert not link.is_symlink()


def test_a_log_is_a_regular_file_or_refused_at_once(tmp_path):
    (target := tmp_path / "theirs").write_text("untouched")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "nowhere").symlink_to(tmp_path / "made")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "nowhere", "pipe"):
        for mode in ("ab", "r+b", "a+b"):
            with pytest.raises(OSError, match=r"symbolic link|no regular file|No such device"):
                open_log(tmp_path / name, mode)
    assert target.read_text() == "untouched"
    assert not (tmp_path / "made").exists()
    with open_log(tmp_path / "log", private=True) as file:
        file.write(b"x")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_private_is_private_and_the_rest_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
        write_atomic(tmp_path / "b", "x", private=True)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o600]


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path):
    (outside := tmp_path / "outside").mkdir()
    (outside / "kept").write_text("x")
    run = tmp_path / "run"
    (run / ".step-3.0123456789ab.tmp").mkdir(parents=True)
    (run / ".step-3.0123456789ab.tmp" / "incident.json").write_text("x")
    (run / ".config.json.123.tmp").write_text("of an earlier version")
    (run / ".config.json.0123456789abcdef.tmp").write_text("x")
    (run / ".step-4.0123456789ab.tmp").symlink_to(outside)
    for name in ("metrics.jsonl", ".other.tmp", "a.123.tmp"):
        (run / name).write_text("x")
    sweep(run)
    sweep(tmp_path / "not there")
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", ".other.tmp", "a.123.tmp"}
    assert (outside / "kept").exists()


HOLDER = """
import os, sys, time
from pathlib import Path
from trl_parity.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:  # a child that outlives its parent holds nothing
    os.write(1, b"forked\\n")  # a line at once: two processes write to one pipe
    time.sleep(60)
os.write(1, b"locked\\n")
time.sleep(60)
"""


@pytest.mark.slow_unit
def test_one_process_writes_a_folder_and_a_killed_ones_lock_is_gone(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert {process.stdout.readline().strip() for _ in range(2)} == {"forked", "locked"}
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid} on \S+, .*output_dir or parity_dir"):
            FolderLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock = FolderLock(tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    again = FolderLock(tmp_path)  # a run of this process ended in an exception
    lock.release()  # and is cleaned up late
    seen = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True)
    assert f"in use by process {os.getpid()}" in seen.stderr
    again.release()
    FolderLock(tmp_path).release()


def test_a_lock_that_is_a_link_or_can_not_be_had(tmp_path, monkeypatch, caplog):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="symbolic link"):
        FolderLock(tmp_path / "a")
    assert not (tmp_path / "theirs").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Expected a writable directory"):
        FolderLock(tmp_path / "file" / "b")
    monkeypatch.setattr("fcntl.flock", lambda *args: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    FolderLock(Path(tmp_path / "c")).release()  # as on some network file systems
    assert "can't be locked" in caplog.text
