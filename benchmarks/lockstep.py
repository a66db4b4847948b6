"""Trainings in lockstep: each in a process of its own, one optimizer step at a time, all but one asleep.

What the machine does meanwhile (other programs, heat, clocks) then hits neighbouring steps alike. What a process runs
is in ``paced_training.py``; any Python can run it, so contenders may have environments of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "grpo_tiny_cpu.yaml"
ENGINE = ROOT / "configs" / "vllm_rl.yaml"
WORKER = Path(__file__).resolve().parent / "paced_training.py"


class Training:
    """One training that waits before each step until it is told to go on."""

    def __init__(
        self, python: str, arm: str, model: Path, folder: Path, *, runs: str | None = None, checkout: Path = ROOT
    ):
        # ``runs``: what is added to it, by the names of paced_training.ARMS, where that is not ``arm``;
        # ``checkout``: whose trl_parity
        name = arm.replace("/", "-")
        self.arm, self.log = arm, folder / f"{name}.log"
        settings = yaml.safe_load(CONFIG.read_text())
        settings |= {"output_dir": str(folder / name), "model_name_or_path": str(model)}
        order = {"arm": runs or arm, "settings": settings, "engine": yaml.safe_load(ENGINE.read_text())}
        (folder / f"{name}.json").write_text(json.dumps(order))
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # TRL's own choice is the same twice
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if python == sys.executable:  # this environment: this trl-parity. Another one has its own packages
            inherited["PYTHONPATH"] = str(checkout)
        environment |= {name: str(value) for name, value in settings["env"].items()}
        ours, theirs = os.pipe()
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [python, str(WORKER), str(folder / f"{name}.json"), str(theirs)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=[theirs], text=True,
                env=inherited | environment,
            )  # fmt: skip
        os.close(theirs)
        self._reports = os.fdopen(ours)

    def report(self) -> dict[str, Any]:
        """What it tells when it has come to the next step's beginning."""
        line = self._reports.readline()
        if not line:
            raise RuntimeError(f"the training {self.arm!r} ended by itself:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        """Let it do one step; the others sleep."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: report() says why
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        return self.report()

    def end(self) -> None:
        """Without a next word from here it ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reports.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pairs(first: Training, second: Training, deadline: float, least: int) -> Iterator[dict[str, Any]]:
    """What both tell when they are ready, then steps of both, next to each other in time: AB, BA, AB, ...

    Until the deadline (``time.monotonic()``), but ``least`` steps of each.
    """
    yield {training.arm: training.report() for training in (first, second)}
    number = 0
    while number < least or time.monotonic() < deadline:
        order = (first, second) if number % 2 == 0 else (second, first)
        yield {training.arm: training.step() for training in order}
        number += 1
