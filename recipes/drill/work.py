"""Runs of drills: each engine in a process of its own, its runs one after the other on it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import stack
from drills import Drill, Setting

STEPS = 14  # of a run that does not halt
_MARK = "\x1etrl-parity-drill "  # lines of a worker's output that are for us


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a drill at a strength, or the control beside it."""

    drill: str
    strength: int = -1  # index
    seed: int = 0
    temperature: float = 0.7
    control: bool = False

    @property
    def label(self) -> str:
        """The name of its folder."""
        at = "" if self.strength == -1 else f"-{self.strength}"
        end = "-control" if self.control and self.drill != "control" else ""
        return f"{self.drill}{at}-t{self.temperature:g}-s{self.seed}{end}"


# ---- in a worker --------------------------------------------------------------------------------------------------


def run(model: str, drill: Drill, job: Job, folder: Path) -> dict[str, Any]:
    """One run until it halts or its steps are over."""
    from transformers import AutoTokenizer

    from trl_parity import ParityCallback

    tokenizer = AutoTokenizer.from_pretrained(model)
    strength = drill.strengths[job.strength]
    healthy = job.control or not drill.cause
    setting = Setting(job.temperature, tokenizer)
    arguments: dict[str, Any] = {"max_steps": STEPS, "seed": job.seed, "output_dir": str(folder)}
    arguments |= drill.run_args(strength, setting, job.control)
    callback = ParityCallback(action="stop")
    clock = _clock()
    callbacks = [*([_asking(callback, STEPS)] if healthy or not drill.halts else []), clock, callback]
    trainer = stack.make_trainer(model, callbacks, chat=tokenizer.chat_template is not None, **arguments)
    with contextlib.nullcontext() if job.control or drill.patch is None else drill.patch(trainer, strength):
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    row = asdict(job) | outcome(drill, strength, healthy, callback) | {"seconds_total": seconds}
    halt = clock.judged[-1] - clock.begun[drill.onset - 1] if row["windows"] and drill.halts else None
    return row | {"seconds_to_halt": halt}


def _clock() -> Any:
    """When each step began, and when its gradient was about to be used: its batch has been judged by then."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.begun: list[float] = []
            self.judged: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun.append(time.perf_counter())

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.judged.append(time.perf_counter())

    return Clock()


def _asking(callback: Any, step: int) -> Any:
    """Asks for a diagnosis in this step; it must stand before ``callback``, which then knows the weights will move."""
    from transformers import TrainerCallback

    class Asking(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == step:
                callback.diagnose()

    return Asking()


def outcome(drill: Drill, strength: Any, healthy: bool, callback: Any) -> dict[str, Any]:
    """What came out of a run, as JSON."""
    diagnosis = callback.diagnosis
    verdicts = list(callback.verdicts)
    last = verdicts[-1]
    mean, floor = "trimmed/logp_abs_diff/mean", "floor/logp_abs_diff/mean"
    drifts = [v.stats[mean] / max(v.stats[floor], 1e-12) for v in verdicts[drill.onset - 1 :]
              if v.stats and v.stats[mean] is not None and v.stats[floor] is not None]  # fmt: skip
    shares = [v.stats["cost/share"] for v in verdicts if v.stats and v.stats["cost/share"] is not None]
    causes = [] if diagnosis is None else [c.cause for c in diagnosis.causes]
    named = "no diagnosis" if diagnosis is None else diagnosis.cause if causes or not healthy else "-"
    halts = drill.halts or healthy
    seen = [v.step for v in verdicts if v.halted or (v.warnings and not halts)]
    return {
        "cause": "" if healthy else drill.cause,
        "what": drill.says(strength),
        "strength_value": strength,
        "halts": halts,
        "detected": bool(seen) and last.halted == halts,
        "windows": seen[0] - drill.onset + 1 if seen else None,
        "named": named,
        "correct": named == "-" and not last.halted if healthy else named == drill.cause,
        "explained": None if diagnosis is None else diagnosis.explained,
        "confidence": None if diagnosis is None else diagnosis.confidence,
        "causes": causes,
        "summary": "" if diagnosis is None else diagnosis.summary,
        "fix": "" if diagnosis is None else diagnosis.fix,
        "evidence": [] if diagnosis is None else [e.to_dict() for e in diagnosis.evidence],
        "seconds_to_diagnose": None if diagnosis is None else diagnosis.details.get("seconds"),
        "batches_to_diagnose": None if diagnosis is None else _batches(diagnosis.details),
        "cost_share": sorted(shares)[len(shares) // 2] if shares else None,
        "drift": max(drifts, default=None),
        "rules": sorted({rule for v in verdicts for rule in v.breaches}),
        "warnings": sorted({rule for v in verdicts for rule in v.warnings}),
        "statuses": [str(v.status) for v in verdicts],
        "halt_message": callback.halt_message,
    }


def _batches(details: dict[str, Any]) -> float | None:
    """A diagnosis' seconds, in those that generating and scoring the batch took."""
    return details["seconds"] / details["rollout_seconds"] if details.get("rollout_seconds") else None


def serve(drills: list[Drill], path: str) -> None:
    """What a worker does with the file of its jobs, each result a marked line."""
    stack.quiet()
    order = json.loads(Path(path).read_text())
    by_name = {drill.name: drill for drill in drills}
    model, failed = stack.tiny_experts() if order["experts"] else order["model"] or stack.tiny(), False
    _tell({"versions": stack.versions()})
    with stack.shared_engine(**order["engine"]):
        for entry in order["jobs"]:
            job = Job(**entry)
            folder = Path(order["folder"]) / job.label
            try:
                _tell({"row": run(model, by_name[job.drill], job, folder)})
            except Exception:  # the other runs go on
                failed = True
                print(job.label, traceback.format_exc(), sep="\n", file=sys.stderr)
            finally:
                if not order["keep"]:
                    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(failed)


def _tell(message: dict[str, Any]) -> None:
    print(f"\n{_MARK}{json.dumps(message)}", flush=True)


# ---- around the workers -------------------------------------------------------------------------------------------


def execute(
    drills: list[Drill],
    jobs: list[Job],
    script: str,
    *,
    model: str | None = None,
    keep: Path | None = None,
    on_engine: Callable[[int, int, list[Job]], None] = lambda *_: None,
    on_row: Callable[[dict[str, Any]], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], str, list[str]]:
    """All jobs, one engine at a time; rows in the jobs' order, versions, and why engines that failed did.

    ``script`` is run as a worker: it calls :func:`serve` when its first argument is ``--worker``.
    """
    by_name = {drill.name: drill for drill in drills}
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        drill = by_name[job.drill]
        engine_args = drill.engine_args(drill.strengths[job.strength], job.control)
        engine = {"engine": engine_args, "experts": drill.experts}
        groups.setdefault(json.dumps(engine, sort_keys=True), []).append(job)
    rows: dict[Job, dict[str, Any]] = {}
    versions, failed = "", []
    with tempfile.TemporaryDirectory(prefix="trl-parity-drill-") as scratch:
        folder = scratch if keep is None else str(keep.resolve())
        for number, (engine, group) in enumerate(groups.items(), 1):
            on_engine(number, len(groups), group)
            order = json.loads(engine) | {"jobs": [asdict(job) for job in group], "model": model}
            path, log = Path(scratch) / f"{number}.json", Path(scratch) / f"{number}.log"
            path.write_text(json.dumps(order | {"folder": folder, "keep": keep is not None}))
            worker = _Worker(script, path, log)
            for message in worker.messages():
                versions = message.get("versions", versions)
                if "row" in message:
                    row = message["row"]
                    rows[Job(**{name: row[name] for name in Job.__slots__})] = row
                    on_row(row)
            if worker.code:  # the other engines' drills go on
                names = ", ".join(job.label for job in group if job not in rows)
                text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
                failed.append(f"not run: {names} (exit code {worker.code} of {script})\n{text[-3000:]}")
    return [rows[job] for job in jobs if job in rows], versions, failed


class _Worker:
    """A process with an engine of its own; what it prints beside its messages goes to a log."""

    def __init__(self, script: str, jobs: Path, log: Path):
        self.command = [sys.executable, script, "--worker", str(jobs)]
        self.log = log
        self.code: int | None = None  # once it has ended

    def messages(self) -> Iterator[dict[str, Any]]:
        """Its messages as they come, until it ends."""
        with open(self.log, "w") as log:
            worker = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=log, text=True)
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith(_MARK):
                    yield json.loads(line.removeprefix(_MARK))
                else:
                    log.write(line)
            self.code = worker.wait()
