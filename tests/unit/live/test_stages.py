"""Whatever of ours fails, on whatever rank: training ends as it would, nobody hangs, and nothing passes for health."""

import io
import json
import sys

import pytest
from support import stages
from support.processes import run_on_two_ranks
from support.trainer_loop import Loop

from trl_parity import ParityCallback, ParityHalt
from trl_parity.errors import ConfigError
from trl_parity.judging.breaker import Breaker
from trl_parity.live.stages import STAGES, Kind


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    stages.prepare(monkeypatch.setattr)


@pytest.fixture
def usual(tmp_path):
    """The run in which nothing fails."""
    seen = []
    with stages.failing(seen=seen):
        done = stages.run(tmp_path / "usual")
    assert done.statuses == ["OK", "OK", "HALT", "HALT", "OK", "OK", "OK", "OK"]
    assert done.updates == [True, True, False, False, True, True]
    done.seen = set(seen)
    return done


def expected(name, usual, ranks=1):
    """Statuses and updates of a run in which a stage always fails, on one rank of so many."""
    drift = name == "policy drift" or (STAGES[name] is Kind.MEASURING and ranks > 1)  # the breach is seen all the same
    if STAGES[name] is Kind.TELLING and not (name == "floor in force" or (name == "noise floor" and ranks == 1)):
        return usual
    if STAGES[name] is Kind.TELLING:  # without a floor the absolute limits hold
        return [s if s == "HALT" else "CALIBRATING" for s in usual[0]], usual[1]
    if drift:  # the halt stands: nothing after it was OK
        return ["ERROR", "ERROR", *["HALT"] * 6], [True, True, *[False] * 4]
    return ["ERROR"] * 8, [True] * 6


@pytest.mark.slow_unit
def test_a_run_goes_through_every_stage_and_each_may_fail(tmp_path, usual):
    assert usual.seen == set(STAGES)
    for name in STAGES:
        with stages.failing(name):
            done = stages.run(tmp_path / name)
        assert (done.statuses, done.updates) == expected(name, (usual.statuses, usual.updates)), name


def quick(folder, action="stop", **settings):
    """A callback and a loop whose second batch halts."""
    usual = {"floor_tokens": 0, "diagnose": "never", "rich_every_n_windows": 0, "bootstrap_samples": 10}
    watch = ParityCallback(action=action, consecutive=1, **usual, **settings)
    return watch, Loop(watch, folder, feeds=1, accumulate=1, shifts=lambda batch: float(batch == 1))


class Gone(io.StringIO):
    """A stderr whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("action", ["raise", "stop", "skip_update"])
def test_a_halt_is_carried_out_though_nobody_can_be_told(tmp_path, monkeypatch, action):
    watch, loop = quick(tmp_path, action)
    loop.accelerator.is_main_process = loop.state.is_world_process_zero = True
    monkeypatch.setattr(sys, "stderr", Gone())
    with stages.failing("text", "incident", "line"):
        if action == "raise":
            with pytest.raises(ParityHalt, match="HALT, halted at step 2"):
                loop.run(3)
            return
        loop.run(3)
    watch.on_train_end(loop.args, loop.state, loop.control)
    assert [applied for _, applied in loop.updates] == [True, False, True][: 2 if action == "stop" else 3]
    assert watch.halt_message.startswith("trl-parity: HALT at step 2: kl_k3")


def test_a_gradient_that_cannot_be_dropped_is_said_loudly(tmp_path):
    _, loop = quick(tmp_path)
    del loop.optimizer.param_groups
    with pytest.raises(AttributeError):
        loop.run(3)


def test_a_window_that_cannot_be_judged_is_an_error_and_the_next_is_judged_as_ever(tmp_path, monkeypatch):
    watch, loop = quick(tmp_path, "log")
    real, calls = Breaker.judge, []

    def judge(self, step, stats, error=""):
        calls.append(step)
        if calls == [1]:
            raise ZeroDivisionError("by zero")
        return real(self, step, stats, error)

    monkeypatch.setattr(Breaker, "judge", judge)
    loop.run(3)
    assert [str(v.status) for v in watch.verdicts] == ["ERROR", "HALT", "OK"]
    assert watch.verdicts[0].reason == "measurement failed: ZeroDivisionError: by zero"
    assert watch.monitor.breaker.windows == 3


@pytest.mark.parametrize("on_state_mismatch", ["restart", "error"])
def test_a_checkpoint_that_cannot_be_read_is_begun_anew_or_refused(tmp_path, caplog, on_state_mismatch):
    first, loop = quick(tmp_path / "first", "log")
    loop.run(2)
    saved = first.state()
    saved["attributes"]["checkpoint"]["evidence"] = {"bets": 3}
    second, loop = quick(tmp_path / "second", "log", on_state_mismatch=on_state_mismatch)
    loop.state.global_step, loop.state.stateful_callbacks = 2, {"ParityCallback": saved}
    loop.args.device = loop.accelerator.device
    if on_state_mismatch == "error":
        with pytest.raises(ConfigError, match="can't be read"):
            loop.run(1)
        return
    loop.run(1)
    assert "the streak starts at 0" in caplog.text
    assert (second.monitor.breaker.windows, second.status) == (1, "OK")


# arithmetic on a few numbers, and the collectives, into which every rank must go
PLAIN = {
    "callback": ("_window_steps", "_pipeline", "_close_last_window"),
    "window": ("__init__", "__bool__", "begin", "sums", "carry"),
    "incidents": ("due", "leaves", "found", "_episode"),
    "pipeline": ("_spent", "announce"),
    "trainer_run": ("accelerator", "measured", "require_interception"),
    "capture": ("__init__", "seconds", "ends_step"),
    "device_seconds": ("wait_for_device",),  # raises nothing
    "grpo": ("sampling_settings",),  # kept as the batch's failure
    "reduction": ("reduce_many", "reduce_sums"),
    "sums": ("_places", "__init__", "zeros", "bump", "cpu", "settle", "parts", "additive", "maxima", "span"),
    "noise_floor": ("due", "account"),
    "breaker": ("halting", "reached"),
    "course": ("add", "standing"),
    "verdict": ("halted",),
}


@pytest.mark.slow_unit
def test_whatever_is_called_in_a_run_is_called_in_a_stage(tmp_path):
    """Not by what the code says of itself: by what one run calls."""
    found = {}
    with stages.unguarded(found):
        stages.run(tmp_path, resumed=False)
    plain = {(module, name) for module, names in PLAIN.items() for name in names}
    wrapping = ("instrumentation.py", ":wrappers", ".wrapping")  # of TRL's classes, once they are there
    called = {
        (name.split("/")[-1].split(".py")[0], name.split(".")[-1].split(":")[-1])
        for name in found
        if not any(part in name for part in wrapping)
    }
    assert called - plain == set()


RANKS = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from support import stages
from trl_parity.collectives import drop_gradient, gather_rows
from trl_parity.live.stages import STAGES

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rank = accelerator.process_index
stages.prepare()
out, told = Path(sys.argv[1]), {}
for name in ["", *STAGES]:
    for bad in (0, 1) if name else (0,):
        with stages.failing(*([name] if rank == bad else [])):
            done = stages.run(out / f"{name}{bad}", accelerator, resumed=name in ("", "checkpoint"))
        row = {"statuses": done.statuses, "updates": done.updates, "diagnosed": done.callback.diagnosis is not None}
        both = gather_rows([row])  # nobody is left behind, and in no other gathering
        assert both[0] == both[1], (name, bad, both)
        told[f"{name}/{bad}"] = row
groups = {} if rank else {"param_groups": []}
try:
    drop_gradient(SimpleNamespace(**groups), accelerator)
    raised = ""
except Exception as e:
    raised = type(e).__name__
assert gather_rows([{"raised": raised}]) == [{"raised": "PeerFailed"}, {"raised": "AttributeError"}]
if rank == 0:
    (out / "told.json").write_text(json.dumps(told))
"""


@pytest.mark.slow_unit
def test_every_stage_may_fail_on_either_of_two_ranks(tmp_path):
    run_on_two_ranks(RANKS, tmp_path, tmp_path, ACCELERATE_USE_CPU="true")
    told = json.loads((tmp_path / "told.json").read_text())
    usual = told.pop("/0")
    assert usual["statuses"] == ["OK", "OK", "HALT", "HALT", "OK", "OK", "OK", "OK"]
    assert usual["diagnosed"]
    assert len(told) == 2 * len(STAGES)
    for key, row in told.items():
        name = key.split("/")[0]
        both = usual["statuses"], usual["updates"]
        statuses, updates = expected(name, both, ranks=2)
        assert (row["statuses"], row["updates"]) == (statuses[: len(row["statuses"])], updates), key
        unnamed = ("diagnosis", "rollout", "scores", "sums", "statistics", "verdict")
        assert row["diagnosed"] == (name not in unnamed), key
