"""``ParityCallback``: wiring only. Rollouts come in from trainers, verdicts go out to trainer, files and trackers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..collectives import drop_gradient, fail_together
from ..config.parity import ParityConfig
from ..engine.cpu import prepare_cpu_engine
from ..engine.handle import EngineHandle
from ..errors import ConfigError, InterceptionError, ParityHalt
from ..lines import say
from ..lint.facts import tell
from ..lint.rules import Finding
from ..metrics.reduction import reduce_sums
from ..metrics.statistics import compute
from ..metrics.sums import MismatchSums
from ..records import Diagnosis
from ..report.outcome import outcome
from ..scoring.perturb import own_random_numbers
from ..tracking.sinks import WandbSink
from ..trainers.capture import Capture, MeasurementSettings
from ..trainers.engine_args import TRLEngineArguments
from ..trainers.instrumentation import Observer, instrument, require_measured
from ..trainers.server_client import sync_without_cuda
from ..verdict import Status, Verdict
from .beginning import begin
from .held_updates import HeldUpdates, refuse_unheld
from .monitor import ParityMonitor
from .pipeline import Pipeline
from .resuming import checkpoint_of, restore
from .trainer_run import TrainerRun
from .window import UnloggedWindows, added

__all__ = ["ParityCallback"]

logger = logging.getLogger(__name__)


class ParityCallback(TrainerCallback, ExportableState, Observer):
    """Compare, on every rollout batch, the engine that sampled with the trainer that learns.

    Add it to ``GRPOTrainer(..., callbacks=[ParityCallback()])``, created before the trainer. Every rollout batch is
    rescored with the trainer's fp32 head; each window of ``every_n_steps`` optimizer steps is reduced over all ranks,
    judged by the rules and logged as ``parity/*``; ``consecutive`` breached windows halt the run, as ``action`` says,
    before the condemned batch reaches the weights.

    ``verdicts`` holds the last 1000 ``Verdict``, ``status`` the last one's, ``diagnosis`` the last ``Diagnosis``,
    ``halt_message`` what was printed at a halt, ``incident`` its folder, ``monitor`` the ``ParityMonitor`` behind it.

    Args:
        config: A ``ParityConfig``. Default: all defaults.
        **overrides: Fields of the config to set, e.g. ``ParityCallback(every_n_steps=10, action="log")``.

    Raises:
        ConfigError: an unknown field or a wrong value; engine arguments that the installed vLLM would not take.
        InterceptionError: (while the trainer is built, or at its first step) the run's rollouts can't be measured.
        ParityHalt: (from ``trainer.train()``) a HALT verdict with ``action="raise"``.
    """

    def __init__(self, config: ParityConfig | None = None, **overrides: Any):
        self.config = ParityConfig.of(config, overrides, where="ParityCallback")
        self.monitor = ParityMonitor(self.config, opened=False)
        self._run = TrainerRun(self.config, self.monitor)
        self.measurement = MeasurementSettings(
            replay_sampling=self.config.truncation == "replay",
            chunk_bytes=self.config.chunk_mib << 20,
            head_backend=self.config.head_backend,
            probe_tokens=self.config.lag_probe_tokens,
            evaluation=self.config.eval_batches == "separate",
            least_tokens=self.config.cost_min_tokens,
        )
        self._reset()
        if prepare_cpu_engine():  # before the trainer builds its engine
            sync_without_cuda()
        instrument()
        source = self.config.engine_source()
        self.engine_request = None if source is None else TRLEngineArguments(source)

    def __repr__(self) -> str:
        n, run = self.config.every_n_steps, self._run
        files = "" if run.trainer is None else f"; files in {run.parity_dir}"
        status, text = outcome(self.monitor.course)
        windows = f"windows of {n} step{'s' * (n != 1)}, action={self.config.action}"
        return f"<ParityCallback {status}: {text}; {windows}{files}>"

    @property
    def verdicts(self) -> deque[Verdict]:
        """The last 1000 verdicts."""
        return self.monitor.verdicts

    @property
    def status(self) -> Status:
        """The status of the last window; NO_DATA before the first."""
        return self.monitor.status

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The last diagnosis; None before the first."""
        return self._run.investigator.diagnosis

    @property
    def halt_message(self) -> str | None:
        """What was printed at the last halt."""
        return self._run.halt_message

    @property
    def incident(self) -> Path | None:
        """The folder left behind by the last halt (main process)."""
        return self._run.incident

    @property
    def _pipeline(self) -> Pipeline:
        return self._run.pipeline

    @property
    def head_share(self) -> float:  # type: ignore[override]
        """The share of a batch's tokens that the fp32 head is to score."""
        return self._pipeline.head.share

    def _reset(self) -> None:
        self.monitor.reset()
        self._run.reset()
        self.engine_handle = EngineHandle(self.config.server_timeout)
        self._eval: MismatchSums | None = None
        self.accumulated = 0
        self._unfed = 0  # micro-batches still to come that the batch at hand feeds
        self._missing = False  # a micro-batch since the last update was fed by no batch that was intercepted
        self._condemned = False  # the gradient being accumulated has, or will have, a condemned batch in it
        self._renewed = False  # a batch has come since the condemned one
        self._stop = False
        self._held: HeldUpdates | None = None  # with DeepSpeed
        self._advice: list[Finding] = []  # of lint, on the settings; told at the first window without an alarm

    # ---- rollouts in (called by trainers) ---------------------------------------------------------------------

    def on_generation(self, capture: Capture) -> None:
        """Measure one generation batch; close and judge the window when it is due."""
        if not capture.training:
            self._on_eval_batch(capture)
            return
        run, window = self._run, self._pipeline.window
        self._pipeline.stopwatch.add("cost", capture.seconds)
        with run.watching():
            sums, error = run.batches.of(capture)
            if run.trainer is None:
                if capture.trainer.is_deepspeed_enabled:
                    self._held = HeldUpdates.of(capture.trainer)
                self._advice = begin(run, capture, self.engine_request)
            run.capture, run.moved = capture, False
            with self.monitor.stages("weights"):
                run.investigator.remember(capture)
            self._unfed, self._renewed = capture.micro_batches, True
            if not self.accumulated:  # nothing of an older batch is in this step's gradient
                self._condemned = False
            window.add(sums, error, self.monitor.stages)
            step = capture.step + 1  # the optimizer step this batch feeds: the trackers' global_step of its row
            if capture.last_in_step and step - window.start >= self._window_steps:
                self._judge_batch(step)

    @property
    def _window_steps(self) -> int:
        """Optimizer steps of a window. While a halt stands each batch is judged before its update may be applied."""
        waits = self.config.action == "skip_update" and self.monitor.breaker.halting
        return 1 if waits else self.config.every_n_steps

    def _judge_batch(self, step: int) -> None:
        """Close the window that ends with the batch at hand, and act on what it amounts to. Collective."""
        with self._run.batch_at_hand():
            self._act(self._pipeline.close_window(step))

    def on_update(self, new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> None:
        """Take in one loss computation for the policy drift."""
        with self._pipeline.stopwatch.account("cost"), self.monitor.stages("policy drift"):
            self._pipeline.window.add_update(new, old, mask)

    def _on_eval_batch(self, capture: Capture) -> None:
        with own_random_numbers():
            sums, _ = self._run.batches.of(capture)
        with self.monitor.stages("evaluation"):
            sums.settle()
        reduced = reduce_sums(sums, capture.trainer.accelerator)
        with self.monitor.stages("evaluation"):
            self._eval = added(self._eval, reduced)
            # overwritten batch by batch: the last value covers the whole evaluation
            capture.log(_scalars(compute(self._eval)))

    def _act(self, verdict: Verdict) -> None:
        self._tell_advice()
        action, condemned = self.config.action, verdict.halted
        if action == "raise" and verdict.halted:
            raise ParityHalt(verdict, f"{self.halt_message or verdict.reason}\n{self._run.ending()}")
        if action == "skip_update" and self.monitor.breaker.halting:  # what is not known is not learned from, either
            condemned |= verdict.status in (Status.NO_DATA, Status.ERROR)
        if condemned and action in ("skip_update", "stop"):
            self._condemned, self._renewed = True, False
        self._stop |= action == "stop" and verdict.halted

    def _tell_advice(self) -> None:
        """Say what lint advises, once; while an alarm stands nobody wants it."""
        if not self.monitor.breaker.alerted:
            with self.monitor.stages("advice"):
                advice, self._advice = self._advice, []
                tell(advice)

    def raise_if_halted(self) -> None:
        """Raise ``ParityHalt`` where a halt stands: where no window since the last HALT was OK.

        Called after ``train()``, it keeps a job that was halted, or whose updates are dropped, from ending like a
        success. Never with ``action="log"``. The same on every rank.
        """
        if (halt := self._run.halt) is not None and self.config.action != "log":
            raise ParityHalt(halt, self._run.ending())

    # ---- causes -----------------------------------------------------------------------------------------------

    def diagnose(self, *, heal: bool = False) -> Diagnosis | None:
        """Name the cause of the drift of the last batch, now. With several ranks, all must call it.

        ``heal``: afterwards hand the trainer's weights to the colocated engine and empty its prefix cache. Nothing
        else of the run is changed. None when there is no batch the present weights generated (none yet, or updated
        since): then the next window's batch is diagnosed, and ``diagnosis`` has it.
        """
        run, capture, diagnosis = self._run, self._run.capture, None
        if capture is None or run.moved or not run.measured:
            run.investigator.wanted = True
            logger.warning("no batch of the present weights is at hand: the next one will be diagnosed")
        else:
            with run.watching():
                run.check_engine()
                run.investigator.unbounded = True
                diagnosis = run.diagnose_batch(capture.step + 1)
        if heal and capture is not None:
            moved = run.investigator.heal(capture)
            logger.warning("weights delivered to the engine: %d tensors moved; prefix cache emptied", len(moved))
        return diagnosis

    # ---- trainer events ---------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer's class is imported by now, if it was not when the callback was made; its engine comes next."""
        require_measured(args)
        instrument()
        refuse_unheld(args, self.config.action)
        if self.engine_request is not None:
            if kwargs.get("model") is not None:
                self.engine_request.apply_to(kwargs["model"])
            for text in self.engine_request.unlike(args):
                logger.warning("%s", text)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the sinks and, when the trainer resumes from a checkpoint, restore the breaker."""
        require_measured(args)
        if "ppo" in instrument() and hasattr(args, "num_ppo_epochs"):  # else: added after the trainer was built
            raise InterceptionError(
                "PPOTrainer.train() began without trl-parity's wrapper and would run unobserved. Expected it in place "
                "since the trainer was built; was it removed (uninstrument)? Create the ParityCallback anew."
            )
        self._reset()
        resume = int(state.global_step)
        self._pipeline.window.begin(resume)
        if resume:
            restore(self._run, state.stateful_callbacks.get(type(self).__name__), args, state)
        error = ""
        if state.is_world_process_zero:
            try:
                self.monitor.open(args.output_dir, args.report_to, resume)
            except Exception as e:
                error = str(e) if isinstance(e, ConfigError | ImportError) else f"{type(e).__name__}: {e}"
        fail_together(error, args.world_size)  # main alone writes

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Refuse to learn from what was never measured; drop the gradient of a condemned batch."""
        self._run.require_interception("an optimizer step is due")
        if self._held is not None:
            self._held.over(self._condemned)
        elif self.before_update():
            drop_gradient(optimizer, self._run.accelerator)

    def before_update(self) -> bool:
        """Judge what is left to judge; whether the update has a condemned batch in it. Collective."""
        run, window, step = self._run, self._pipeline.window, int(self._run.trainer.state.global_step) + 1
        if self._missing or self._unfed <= 0:
            self._on_missing_batch(step)
        elif window.batches and not run.moved and not 0 < step - window.start < self._window_steps:
            with run.watching():  # the trainer ended the step earlier, or later, than its last generation could know
                self._judge_batch(step)
        if self._condemned:
            run.skip()
        else:
            run.moved = True
        return self._condemned

    def _on_missing_batch(self, step: int) -> None:
        """A batch that should have been intercepted was not: a failed measurement, never silence."""
        self._missing, self._unfed = False, max(self._unfed, 1)  # said once a step
        window = self._pipeline.window
        window.error = "no rollout batch was intercepted for this step"
        window.sums(self._run.accelerator.device).bump(errors=1)
        with self._run.watching():
            self._act(self._pipeline.close_window(step))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch is over, and no update follows it."""
        self._missing |= self._unfed <= 0
        self._unfed -= 1
        self.accumulated += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if so judged; hand the windows since the last log to the trainer's metrics when it is about to log."""
        run = self._run
        self._unfed -= 1
        self.accumulated = 0
        if self._renewed:  # what comes is not fed by the condemned batch
            self._condemned = False
        with self._pipeline.stopwatch.account("cost"):
            self._run.require_interception(f"step {state.global_step} is over")  # PPO announces no optimizer step
            if self._stop:
                control.should_training_stop = control.should_save = control.should_log = True
            if control.should_training_stop:  # the last row that every tracker gets
                self._close_last_window(int(state.global_step))
                control.should_log |= bool(run.unlogged)
            if control.should_log and run.unlogged:
                self.monitor.tell(lambda sink: sink.before_row(int(state.global_step)))
                with self.monitor.stages("row"):
                    assert run.capture is not None
                    run.capture.log(_scalars(run.unlogged.scalars(self.monitor) | run.skips("log")))
                run.unlogged = UnloggedWindows()
            if control.should_save:  # the same on every rank
                self._pipeline.window.carry(run.accelerator, self.monitor.stages)

    def _close_last_window(self, step: int) -> None:
        """Judge what the window holds that no step will fill. Collective: batches come together."""
        if self._pipeline.window.batches and not self._stop:
            with self._run.watching():
                self._pipeline.close_window(step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation is over: the next one starts from nothing."""
        self._eval = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what an unfinished window holds, and close the file."""
        run = self._run
        self._close_last_window(int(state.global_step))
        if run.unlogged:  # the loop was left otherwise than by its last step: the trainer logs no row any more
            with self.monitor.stages("row"):
                scalars = _scalars(run.unlogged.scalars(self.monitor) | run.skips("log"))
                for sink in self.monitor.sinks:
                    if isinstance(sink, WandbSink):  # trackio's run is over
                        sink.log(int(state.global_step), {f"train/{name}": value for name, value in scalars.items()})
            run.unlogged = UnloggedWindows()
        self._tell_advice()
        with self.monitor.stages("teacher"):
            run.unwatch_teacher()
        with self.monitor.stages("ending"):
            if state.is_world_process_zero and self._run.trainer is not None:
                say(self._run.ending())
        self.monitor.close()

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the trainer's checkpoint keeps: the settings and the monitor's memory."""
        instrument()  # PPOTrainer sends no on_init_end, but asks for this while it is built
        return checkpoint_of(self._run)


def _scalars(stats: Mapping[str, float | None]) -> dict[str, float]:
    return {f"parity/{name}": value for name, value in stats.items() if value is not None}
