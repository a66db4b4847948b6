"""Processes that tests start."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import ROOT, TESTS


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


def run_on_two_ranks(code: str, directory: Path, *args: Any, **more: str) -> str:
    """Run a script under torchrun on two gloo ranks; what it wrote to stderr. ``more``: environment variables.

    One such run at a time on this machine: with more ranks than cores they wait for each other for minutes.
    """
    script = directory / "run.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command = [*launcher, str(free_port()), str(script), *map(str, args)]
    env = environment(PYTHONPATH=os.pathsep.join([str(TESTS), str(ROOT)]), OMP_NUM_THREADS="1")
    with open(Path(tempfile.gettempdir()) / "trl-parity-ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True, env=env | more, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def python(code, *args, env=None, timeout=420):
    """Run code in a fresh interpreter with the tests' helpers on its path."""
    command = [sys.executable, "-c", code, *map(str, args)]
    env = environment(PYTHONPATH=str(TESTS), **(env or {}))
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)
