"""The files of a weight transfer: what a server opens, what it refuses, and what a killed trainer leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trl_parity.engine.weight_files import Folder, opened


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_PARITY_WEIGHTS_DIR", str(tmp_path))
    return tmp_path


def refusal(folder, file):
    with pytest.raises(PermissionError) as refused:
        opened(folder, file)
    return str(refused.value)


def test_everything_but_a_file_of_a_trainer_gets_one_answer(place, tmp_path_factory):
    folder, elsewhere = Folder(place), tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "there.safetensors").write_bytes(b"x")
    with folder.file(0) as (path, named):
        path.write_bytes(b"weights")
        descriptor = opened(**named)  # is one
        assert os.read(descriptor, 100) == b"weights"
        os.close(descriptor)
        home, name = Path(folder.name), named["file"]
        secret = name.partition("-")[0]
        (home / f"{secret}-1").symlink_to(path)
        os.mkfifo(home / f"{secret}-2")  # opened without waiting for a writer
        (home / f"{secret}-3").mkdir()
        os.link(path, home / f"{secret}-4")
        (place / "trl-parity-weights-aaaaaaaa").symlink_to(home)
        (open_to_all := place / "trl-parity-weights-bbbbbbbb").mkdir()
        open_to_all.chmod(0o755)
        (open_to_all / name).write_bytes(b"x")
        told = {refusal(named["folder"], f"{secret}-{n}") for n in (0, 1, 2, 3, 4, 9)}  # 0 has two names by now
        told |= {
            refusal(*names)
            for names in (
                (named["folder"], "0" * 32 + "-0"), ("trl-parity-weights-aaaaaaaa", name),
                ("trl-parity-weights-bbbbbbbb", name), ("trl-parity-weights-cccccccc", name),
                (str(elsewhere), "there.safetensors"), (str(elsewhere), "not_there.safetensors"),
                (f"../{elsewhere.name}", name), (str(home), name),
                (named["folder"], f"../{elsewhere.name}/there.safetensors"), (None, name), (named["folder"], 3),
            )
        }  # fmt: skip
    assert told == {"no weights of a trainer of this user"}
    folder.remove()


KILLED = """
import sys
from pathlib import Path
from trl_parity.engine.weight_files import Folder
folder = Folder(Path(sys.argv[1]))
with folder.file(0) as (path, named):
    path.write_bytes(b"x" * 1000)
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow_unit
def test_what_a_killed_trainer_left_goes_at_the_next_start_and_a_living_ones_stays(place):
    command = [sys.executable, "-c", KILLED, str(place)]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    assert [child.stdout.readline() for child in children] == [b"there\n"] * 2
    children[0].send_signal(signal.SIGKILL)
    children[0].wait()
    (foreign := place / "trl-parity-weights-dddddddd").symlink_to(place)  # is no folder of ours
    (kept := place / "other").mkdir()
    folder = Folder(place)
    assert len(list(place.glob("trl-parity-weights-*"))) == 3  # the living one's, ours, and the link
    assert foreign.is_symlink()
    assert kept.is_dir()
    folder.remove()
    children[1].communicate()
    assert [path.name for path in place.glob("trl-parity-weights-*")] == [foreign.name]  # gone with its process
