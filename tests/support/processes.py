"""Processes that tests start."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from support import PATH as PATH
from support import warm


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# TRL writes these when it builds a colocated engine; a child process must not join its parent's process group
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: this one's, but for the rendezvous that a trainer in this process left behind."""
    own = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    return own | {"MASTER_PORT": str(free_port())} | more


def python(code: str, *args: Any, env: dict[str, str] | None = None, timeout: float = 420) -> Any:
    """Run code in an interpreter of its own with the tests' helpers on its path; as ``subprocess.run``."""
    return warm.run(["-c", code, *args], env=environment(PYTHONPATH=PATH, **(env or {})), timeout=timeout)


def run_on_two_ranks(code: str, directory: Path, *args: Any, **more: str) -> str:
    """Run a script on two gloo ranks; what they wrote to stderr. ``more``: environment variables."""
    return run_on_ranks(2, code, directory, *args, **more)


def run_on_ranks(world: int, code: str, directory: Path, *args: Any, **more: str) -> str:
    """The same on any number of ranks, in the environment that torchrun makes.

    One such run at a time on this machine: with more ranks than cores they wait for each other for minutes.
    """
    script = directory / "run.py"
    script.write_text(code)
    told = [directory / f"rank{rank}.err" for rank in range(world)]
    env = environment(PYTHONPATH=PATH, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", WORLD_SIZE=str(world)) | more
    with open(Path(tempfile.gettempdir()) / "trl-parity-ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ranks = []
        for rank, err in enumerate(told):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
            out = directory / f"rank{rank}.out"
            ranks.append(warm.Child([script, *args], env=env | own, stdout=out, stderr=err))
        try:
            end = time.monotonic() + 500
            while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
                assert time.monotonic() < end, "\n".join(err.read_text()[-2000:] for err in told)
                time.sleep(0.05)
        finally:
            for rank in ranks:  # one that failed leaves the others waiting
                rank.kill()
    text = "\n".join(err.read_text(errors="replace") for err in told)
    assert not any(rank.returncode for rank in ranks), text[-6000:]
    return text
