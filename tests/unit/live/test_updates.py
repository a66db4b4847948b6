"""Which updates are applied: the trainer's events in their order, without a model."""

import random
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.trainer_loop import Loop

from trl_parity import ParityCallback, ParityHalt, __version__
from trl_parity.errors import ConfigError
from trl_parity.records import Diagnosis
from trl_parity.trainers.instrumentation import observer_of


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    """No engine will be built: vLLM need not be imported to prepare for one."""
    monkeypatch.setattr("trl_parity.live.callback.prepare_cpu_engine", lambda: False)


def callback(**settings):
    usual = {
        "action": "skip_update",
        "consecutive": 1,
        "floor_tokens": 0,
        "diagnose": "never",
        "rich_every_n_windows": 0,
        "bootstrap_samples": 10,
    }
    return ParityCallback(**(usual | settings))


def statuses(watch):
    return [str(v.status) for v in watch.verdicts]


# feeds, accumulate, epochs: a batch feeds several steps, several batches one; both; epochs end on short steps
SHAPES = [
    (1, 1, (3, 3)), (4, 4, (8,)), (8, 4, (16,)), (1, 4, (6, 6)), (2, 4, (6, 6)), (3, 4, (12, 12)), (7, 4, (14, 14)),
    (6, 4, (6, 6)),
]  # fmt: skip


@pytest.mark.parametrize(("feeds", "accumulate", "epochs"), SHAPES)
def test_no_update_has_a_condemned_batch_in_it_and_every_other_is_applied(tmp_path, feeds, accumulate, epochs):
    for bad in range(sum(epochs) // feeds):
        watch = callback()
        loop = Loop(
            watch, tmp_path, feeds=feeds, accumulate=accumulate, shifts=lambda batch, bad=bad: float(batch == bad)
        )
        loop.run(*epochs)
        condemned = {b for b, step in loop.generated_in.items() if step == loop.generated_in[bad]}
        for fed, applied in loop.updates:
            assert applied is condemned.isdisjoint(fed), (bad, fed, loop.updates)
        assert statuses(watch).count("HALT") == 1
        assert set(statuses(watch)) <= {"OK", "HALT"}  # and none is thought to be missing
        assert len(watch.verdicts) == len(set(loop.generated_in.values()))  # a window a step that generated


@pytest.mark.parametrize("bad", range(12))
def test_a_dataset_that_ends_within_a_step_leaves_no_batch_unjudged(tmp_path, bad):
    """transformers carries the gradient of such micro-batches into the next epoch's first step."""
    watch = callback()
    loop = Loop(watch, tmp_path, feeds=1, accumulate=4, shifts=lambda batch: float(batch == bad))
    loop.run(6, 6, ended=False)
    assert [fed for fed, _ in loop.updates] == [(0, 1, 2, 3), (4, 5, 6, 7, 8, 9)]
    assert [applied for _, applied in loop.updates] == [bad not in fed for fed, _ in loop.updates]


def test_stop_keeps_the_condemned_batch_out_and_ends_the_run(tmp_path):
    watch = callback(action="stop")
    loop = Loop(watch, tmp_path, feeds=1, accumulate=4, shifts=lambda batch: float(batch == 6))
    assert loop.run(6, 6) == [((0, 1, 2, 3), True), ((4, 5), True), ((6, 7, 8, 9), False)]


def test_while_a_halt_stands_every_step_is_judged_before_it_is_applied(tmp_path):
    watch = callback(every_n_steps=4)
    loop = Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: float(batch < 8))
    applied = [applied for _, applied in loop.run(16)]
    assert applied == [True] * 3 + [False] * 5 + [True] * 8  # three before the first window was over
    assert [v.step for v in watch.verdicts] == [4, 5, 6, 7, 8, 9, 13]
    assert statuses(watch) == ["HALT"] * 5 + ["OK"] * 2
    logged = callback(every_n_steps=4, action="log")
    Loop(logged, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: 1.0).run(16)
    assert [v.step for v in logged.verdicts] == [4, 8, 12, 16]


def test_while_a_halt_stands_a_batch_nobody_could_compare_is_not_learned_from(tmp_path):
    shifts = [1.0, None, 0.0, None]
    watch = callback()
    loop = Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: shifts[batch])
    assert [applied for _, applied in loop.run(4)] == [False, False, True, True]
    assert statuses(watch) == ["HALT", "NO_DATA", "OK", "NO_DATA"]


@pytest.mark.parametrize("hidden", [1, 2])
def test_a_batch_that_was_not_intercepted_is_an_error_wherever_it_falls_in_the_step(tmp_path, hidden):
    watch = callback(action="log")
    Loop(watch, tmp_path, feeds=1, accumulate=2, shifts=lambda batch: 0.0, hidden={hidden + 1}).run(6)
    assert statuses(watch).count("ERROR") == 1
    error = next(v for v in watch.verdicts if v.status == "ERROR")
    assert (error.step, error.reason) == (2, "measurement failed: no rollout batch was intercepted for this step")


def test_an_evaluation_leaves_the_training_batch_at_hand(tmp_path, monkeypatch):
    watch = callback()
    loop = Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: 1.0)
    loop.run(2)
    loop.generate(0.0, training=False)
    seen = []

    def diagnose(capture, rollout, scored, *, step, **kwargs):
        seen.append((capture.training, rollout, float(scored.trainer_logprobs[0, 0]), step))
        return Diagnosis(step=step, cause="unknown", explained=0.0, confidence=0.0, summary="", fix="")

    monkeypatch.setattr(watch._run.investigator, "diagnose", diagnose)
    assert watch.diagnose() is not None
    assert seen == [(True, "training 1", 0.0, 2)]


def test_watching_draws_no_random_number_of_the_run(tmp_path):
    watch = callback(action="log", every_n_steps=2)
    loop = Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: 1.0)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    loop.run(5)
    loop.generate(0.0, training=False)
    watch.on_train_end(loop.args, loop.state, loop.control)
    drawn = float(torch.rand(1)), random.random(), float(np.random.rand())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert drawn == (float(torch.rand(1)), random.random(), float(np.random.rand()))


def end(watch, loop):
    loop.state.is_world_process_zero = True
    watch.on_train_end(loop.args, loop.state, loop.control)


def test_a_halted_run_raises_when_asked_and_a_healthy_or_healed_one_does_not(tmp_path, capfd):
    for action, shifts, halted in (
        ("stop", [0.0, 1.0], 2), ("skip_update", [1.0, 1.0], 2), ("skip_update", [1.0, 0.0], None),
        ("log", [1.0, 1.0], None), ("stop", [0.0, 0.0], None),
    ):  # fmt: skip
        watch = callback(action=action)
        loop = Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch, shifts=shifts: shifts[batch])
        loop.run(2)
        end(watch, loop)
        ended = capfd.readouterr().err.splitlines()[-1]
        if halted is None:
            watch.raise_if_halted()
            assert ended.startswith("trl-parity: HALT" if action == "log" else "trl-parity: OK, healthy in"), ended
            continue
        with pytest.raises(ParityHalt) as raised:
            watch.raise_if_halted()
        assert raised.value.verdict.step == halted
        told = traceback.format_exception(raised.value)  # what a scheduler's log ends with
        assert told[-1] == f"trl_parity.errors.ParityHalt: {ended}\n"
        assert "halted at step" in ended
        assert f"{raised.value.verdict.reason[:60]}" in ended


def test_the_halt_raised_before_learning_ends_with_its_reason(tmp_path):
    watch = callback(action="raise")
    with pytest.raises(ParityHalt) as raised:
        Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: 1.0).run(1)
    assert str(raised.value).splitlines()[-1].startswith("trl-parity: HALT, halted at step 1: ")


def test_dropped_updates_are_counted_in_every_row_and_told_again_and_again(tmp_path, monkeypatch, capfd):
    rows = []
    monkeypatch.setattr("support.trainer_loop.GivenCapture.log", lambda self, values: rows.append(values))
    watch = callback(action="skip_update", redact_text=True)
    loop = Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: float(1 <= batch < 24))
    loop.control.should_log = True
    loop.accelerator.is_main_process = True
    loop.run(25)
    skipped = [(row["parity/breaker/skipped"], row["parity/breaker/skipped_total"]) for row in rows]
    assert skipped == [(0, 0), *((1, n) for n in range(1, 24)), (0, 23)]
    windows = [v.stats["breaker/skipped"] for v in watch.verdicts]  # what was dropped since the window before
    assert windows == [0, 0, *[1] * 23]
    told = capfd.readouterr().err
    assert [n for n in (10, 20, 23) if f"{n} updates dropped so far" in told] == [10, 20]
    saved = watch.state()["attributes"]["checkpoint"]
    assert saved["skipped"] == 23
    end(watch, loop)
    assert "its updates dropped; 23 updates dropped" in capfd.readouterr().err


def test_a_run_begins_with_a_line_of_what_is_watched(tmp_path, capfd):
    watch = callback(every_n_steps=2)
    loop = Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: 0.0)
    loop.accelerator.is_main_process = True
    loop.args.logging_steps, loop.args.logging_strategy = 10, "steps"
    loop.run(2)
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith(
        f"trl-parity {__version__} watches SimpleNamespace: windows of 2 steps, action=skip_update"
    )
    assert first.endswith(f"merges those of 10 steps (logging_steps); files in {tmp_path}/parity")


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.verdicts, self.rows = [], []

    def tell(self, verdict):
        self.verdicts.append(verdict)

    def before_row(self, step):
        self.rows.append(step)

    def alert(self, verdict, text):
        """Not looked at."""


def test_the_last_partial_window_is_in_the_last_row_and_in_words(tmp_path, monkeypatch):
    rows, told = [], Told()
    monkeypatch.setattr("support.trainer_loop.GivenCapture.log", lambda self, values: rows.append(values))
    watch = callback(every_n_steps=2, action="log", consecutive=9)

    def shift(batch):
        watch.monitor.sinks = [told]
        loop.control.should_log = batch == 3  # logging_steps=4
        loop.control.should_training_stop = batch == 4
        return float(batch == 4)

    loop = Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=shift)
    loop.run(9)
    assert loop.control.should_log  # whatever logging_steps says, the trainer logs once more
    assert [(row["parity/breaker/status"], row["parity/breaker/windows"]) for row in rows] == [(0, 2), (2, 1)]
    assert told.rows == [4, 5]
    assert [verdict.split(":")[0] for verdict in told.verdicts] == ["OK at step 2", "OK at step 4", "BREACH at step 5"]
    end(watch, loop)
    assert len(watch.verdicts) == 3


def test_two_callbacks_are_called_that():
    both = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[object(), callback(), callback()]))
    with pytest.raises(ConfigError, match="the trainer has 2 ParityCallbacks"):
        observer_of(both)


def test_a_callback_in_a_notebook_says_what_it_watches_and_saw(tmp_path):
    watch = callback(action="log", every_n_steps=2)
    assert repr(watch) == "<ParityCallback NO_DATA: no window was measured; windows of 2 steps, action=log>"
    Loop(watch, tmp_path, feeds=1, accumulate=1, shifts=lambda batch: 0.0).run(4)
    assert repr(watch) == (
        "<ParityCallback OK: healthy in all 2 windows, to step 4; windows of 2 steps, action=log; "
        f"files in {tmp_path}/parity>"
    )
