"""A run that goes through every stage of ours, with stages or functions made to fail in it."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import trl_parity
from support.trainer_loop import SHAPE, Loop
from support.windows import sums_of
from trl_parity import ParityCallback
from trl_parity.collectives import gather_rows
from trl_parity.judging.noise_floor import GROUPS, SOURCES
from trl_parity.live import callback, judge, trainer_run
from trl_parity.live.incidents import Investigator
from trl_parity.live.stages import Stages
from trl_parity.records import Diagnosis

BAD = (2, 3)  # numbers of the batches that are off by a nat
STEPS = 6


class Foreign:
    """Somebody's own tracker."""

    def tell(self, *told: Any) -> None:
        """Nobody reads it."""

    alert = log = log_rich = before_row = tell


def diagnosed(self: Any, capture: Any, rollout: Any, scored: Any, *, step: int, **_: Any) -> Diagnosis:
    """What asks all ranks, twice."""
    ranks = capture.trainer.accelerator.num_processes
    for _ in range(2):
        if ranks > 1:
            assert len(gather_rows([{"step": step}])) == ranks
    return Diagnosis(step=step, cause="unknown", explained=0.0, confidence=0.0, summary="", fix="")


def floor_of(capture: Any, config: Any) -> dict[str, Any]:
    return {name: [sums_of(1e-4, rows=1, bootstrap_samples=2) for _ in range(GROUPS)] for name in SOURCES}


def prepare(patch: Any = setattr) -> None:
    """Put in place of what needs a model or an engine what needs none. ``patch``: ``monkeypatch.setattr``."""
    patch(callback, "prepare_cpu_engine", lambda: False)
    patch(trainer_run, "measure_floor", floor_of)
    patch(Investigator, "diagnose", diagnosed)
    patch(judge, "alert_sinks", lambda report_to: [Foreign()])


def run(folder: Path, accelerator: Any = None, *, resumed: bool = True, **settings: Any) -> SimpleNamespace:
    """Two runs, the second from a checkpoint of the first: statuses, updates, and the callback of the first."""
    usual = {"consecutive": 1, "redact_text": True, "rich_every_n_windows": 1, "bootstrap_samples": 100}
    usual |= {"floor_tokens": 64, "action": "skip_update", "evidence_alpha": 1e-30}
    first = ParityCallback(**(usual | settings))
    first.engine_request = SimpleNamespace(disagreement=lambda *_: "", unlike=lambda _: [], apply_to=lambda _: None)
    main = accelerator is None or accelerator.is_main_process
    saved: list[Any] = []

    def shift(batch: int) -> float:
        zeros = torch.zeros(2, 3)
        first.on_update(zeros, zeros, torch.ones(2, 3))
        if batch == STEPS - 1:
            saved.append(json.loads(json.dumps(first.state())))
        return float(batch in BAD)

    half = torch.tensor([2.0, 0.0] * (SHAPE[1] // 2)).expand(SHAPE)
    loop = Loop(first, folder / "first", feeds=1, accumulate=1, shifts=shift, accelerator=accelerator, weights=half)
    if accelerator is None:
        loop.accelerator.is_main_process = True
    loop.args.device = loop.accelerator.device
    loop.state.is_world_process_zero = main
    loop.state.stateful_callbacks = {}
    loop.control.should_log = loop.control.should_save = True
    updates = loop.run(STEPS)
    told = loop.args, loop.state, loop.control
    loop.generate(0.0, training=False)
    first.on_evaluate(*told)
    first.diagnose()
    first.on_train_end(*told)
    statuses = [str(v.status) for v in first.verdicts]
    done = SimpleNamespace(statuses=statuses, updates=[applied for _, applied in updates], callback=first)
    if not resumed:
        return done

    second = ParityCallback(**(usual | settings))
    loop = Loop(second, folder / "second", feeds=1, accumulate=1, shifts=lambda _: 0.0, accelerator=accelerator)
    loop.args.device = loop.accelerator.device
    loop.state.is_world_process_zero = main
    loop.state.stateful_callbacks = {"ParityCallback": saved}
    loop.state.global_step = STEPS
    loop.run(2)
    second.on_train_end(loop.args, loop.state, loop.control)
    statuses += [str(v.status) for v in second.verdicts]
    return done


@contextmanager
def failing(*names: str, seen: list[str] | None = None):
    """These stages raise whenever they begin."""
    begins = Stages.begins

    def begun(self: Any, stage: str) -> None:
        begins(self, stage)
        if seen is not None:
            seen.append(stage)
        if stage in names:
            _raise_in(sys._getframe(1), RuntimeError(f"{stage} made to fail"))

    Stages.begins = begun  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stages.begins = begins  # type: ignore[method-assign]


def _raise_in(frame: Any, error: Exception) -> None:
    """Raise where a stage begins; of a ``with`` block, at its first line."""
    if frame.f_code.co_name != "__call__":
        raise error

    def trace(frame: Any, event: str, arg: Any) -> None:
        frame.f_trace = None
        sys.settrace(None)
        raise error

    frame.f_back.f_back.f_trace = trace  # the block's: behind contextlib's __enter__
    sys.settrace(lambda *_: None)


ROOT = str(Path(trl_parity.__file__).parent)

# what guards, keeps time or hands out random numbers: were it to fail, there is nothing behind it
UNDER = ("live/stages.py", "live/stopwatch.py", "collectives.py", "scoring/perturb.py")


@contextmanager
def unguarded(found: dict[str, None]):
    """Into ``found``: functions that one of ours calls, from the first batch on, while no stage takes their failure.

    But for those that hold stages together.
    """
    open_stages, shells = [0], set()
    call, begins, joined = Stages.__call__, Stages.begins, Stages.together

    @contextmanager
    def counted(self: Any, name: str):
        with call(self, name):
            open_stages[0] += 1
            try:
                yield
            finally:
                open_stages[0] -= 1

    def together(self: Any, name: str, ranks: int, work: Any) -> Any:
        with counted(self, name):
            return joined(self, name, ranks, work)

    def begun(self: Any, name: str) -> None:
        begins(self, name)
        if name == "rollout" and "rollout" not in shells:
            found.clear()
        frame = sys._getframe(1)
        shells.add(name)
        while frame is not None:
            shells.add(_name(frame))
            frame = frame.f_back

    def trace(frame: Any, event: str, arg: Any) -> None:
        before = frame.f_back
        if event == "call" and not open_stages[0] and before is not None and _name(before) and (name := _name(frame)):
            while before is not None and before.f_code.co_name != "_mismatch":  # its own stages are no blocks
                before = before.f_back
            if before is None:
                found[name] = None

    Stages.__call__, Stages.begins, Stages.together = counted, begun, together  # type: ignore[method-assign]
    usual = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(usual)
        Stages.__call__, Stages.begins, Stages.together = call, begins, joined  # type: ignore[method-assign]
        for name in shells:
            found.pop(name, None)


def _name(frame: Any) -> str:
    """Of a function of ours; "" of any other."""
    code = frame.f_code
    module = code.co_filename[len(ROOT) + 1 :]
    if not code.co_filename.startswith(ROOT) or module.startswith(UNDER) or code.co_name.startswith("<"):
        return ""
    return f"{module}:{code.co_qualname}"
