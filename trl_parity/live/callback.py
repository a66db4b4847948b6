"""``ParityCallback``: wiring only. Rollouts come in from taps, verdicts go out to trainer, files and trackers."""

from __future__ import annotations

import logging
import sys
import time
import traceback
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
from ..judging.noise_floor import SOURCES
from ..lint.facts import tell_traps
from ..metrics.reduction import reduce_many, reduce_sums
from ..metrics.statistics import compute, measure_policy_drift
from ..metrics.sums import MismatchSums
from ..metrics.tokens import tokens_of_all
from ..records import Diagnosis
from ..report.messages import alert_text, halt_text
from ..results.incident import incident_folder
from ..tracking.sinks import RichLog, WandbSink
from ..trainers.capture import Capture, MeasurementSettings
from ..trainers.engine_args import TRLEngineArguments
from ..trainers.instrumentation import Observer, instrument
from ..trainers.server_client import sync_without_cuda
from ..verdict import Status, Verdict
from .batches import BatchMeter
from .floor_measurement import measure_floor
from .incidents import Investigator
from .monitor import ParityMonitor
from .window import OpenWindow, UnloggedWindows, added

__all__ = ["ParityCallback"]

logger = logging.getLogger(__name__)

_UPDATES = 16  # loss computations whose log-probs are kept before they are measured


class ParityCallback(TrainerCallback, ExportableState, Observer):
    """Compare, on every rollout batch, the engine that sampled with the trainer that learns.

    Add it to ``GRPOTrainer(..., callbacks=[ParityCallback()])``, created before the trainer. Every rollout batch is
    rescored with the trainer's fp32 head; each window of ``every_n_steps`` optimizer steps is reduced over all ranks,
    judged by the rules and logged as ``parity/*``; ``consecutive`` breached windows halt the run, as ``action`` says,
    before the condemned batch reaches the weights.

    ``verdicts`` holds the last 1000 ``Verdict``, ``status`` the last one's status, ``diagnosis`` the
    last ``Diagnosis``, ``halt_message`` what was printed at a halt and ``incident`` the folder left
    behind by it, ``monitor`` the ``ParityMonitor`` that judges.

    Args:
        config: A ``ParityConfig``. Default: all defaults.
        **overrides: Fields of the config to set, e.g. ``ParityCallback(every_n_steps=10, action="log")``.

    Raises:
        ConfigError: an unknown field or a wrong value; engine arguments that the installed vLLM would not take.
        InterceptionError: (from ``trainer.train()``, at the first step) the run's rollouts can't be measured.
        ParityHalt: (from ``trainer.train()``) a HALT verdict with ``action="raise"``.
    """

    def __init__(self, config: ParityConfig | None = None, **overrides: Any):
        self.config = ParityConfig.of(config, overrides, where="ParityCallback")
        self.halt_message: str | None = None
        self.incident: Path | None = None  # the folder left behind by the last halt (main process)
        self.monitor = ParityMonitor(self.config, opened=False)
        self._meter = BatchMeter(self.config, self.monitor)
        self._investigator = Investigator(self.config)
        self.measurement = MeasurementSettings(
            replay_sampling=self.config.truncation == "replay",
            chunk_bytes=self.config.chunk_mib << 20,
            head_backend=self.config.head_backend,
            probe_tokens=self.config.lag_probe_tokens,
            evaluation=self.config.eval_batches == "separate",
        )
        self._reset()
        if prepare_cpu_engine():  # before the trainer builds its engine
            sync_without_cuda()
        instrument()
        source = self.config.engine_source()
        self.engine_request = None if source is None else TRLEngineArguments(source)

    @property
    def verdicts(self) -> deque[Verdict]:
        """The last 1000 verdicts."""
        return self.monitor.verdicts

    @property
    def status(self) -> Status:
        """The status of the last window; NO_DATA before the first."""
        return self.monitor.status

    def _reset(self) -> None:
        self.monitor.reset()
        self.engine_handle = EngineHandle(self.config.server_timeout)
        self._window = OpenWindow(self.config.bootstrap_samples)
        self._unlogged = UnloggedWindows()
        self._updates: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._eval: MismatchSums | None = None
        self._trainer: Any = None
        self._meter.reset()
        self._capture: Capture | None = None  # of the last training batch
        self._judging = False  # its window is being closed
        self._moved = False  # the weights have been updated since
        self._investigator.reset()
        self._windows = 0
        self._next_generation = 0  # optimizer steps by which a new batch must have come
        self._condemned = False
        self._stop = False
        self._clock = time.perf_counter()
        self._spent = 0.0
        self._spent_on_floor = 0.0

    # ---- rollouts in (called by taps) -------------------------------------------------------------------------

    def on_generation(self, capture: Capture) -> None:
        """Measure one generation batch; close and judge the window when it is due."""
        start = time.perf_counter()
        sums, error = self._meter.measure(capture)
        if not capture.training:
            self._on_eval_batch(capture, sums)
            return
        if self._trainer is None:
            self._first_batch(capture)
        self._condemned = self._moved = False
        self._capture = capture
        self._next_generation = capture.step + capture.generation_period
        self._window.add(sums, error)
        self._spent += capture.seconds + time.perf_counter() - start
        step = capture.step + 1  # the optimizer step this batch feeds: the trackers' global_step of its row
        if capture.last_in_step and step - self._window.start >= self.config.every_n_steps:
            self._judging = True
            try:
                self._close_window(step)
            finally:
                self._judging = False

    def on_update(self, new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep what the policy drift of one loss computation is measured from; a window's are measured together."""
        self._updates.append((new, old, mask))
        if len(self._updates) >= _UPDATES:
            self._measure_updates()

    def _measure_updates(self) -> None:
        """Add the policy drift of the updates that wait for it to the open window."""
        start = time.perf_counter()
        for new, old, mask in self._updates:
            measure_policy_drift(self._window.sums(new.device), new, old, mask)
        self._updates.clear()
        self._spent += time.perf_counter() - start

    def _first_batch(self, capture: Capture) -> None:
        trainer = self._trainer = capture.trainer
        if trainer.is_deepspeed_enabled and self.config.action in ("skip_update", "stop"):
            raise ConfigError(
                f"action={self.config.action!r} with DeepSpeed, which applies the update inside backward: the "
                "condemned batch can't be kept from the weights there. Use action='raise' or action='log'."
            )
        for sink in self.monitor.sinks:
            if isinstance(sink, WandbSink):
                sink.define_metrics()
                if self.config.panels:
                    sink.make_panels()
        self._require_engine_args(capture)
        if trainer.accelerator.is_main_process:
            self.monitor.write_run(self._investigator.surroundings(capture))
            tell_traps(capture, self.measurement.replay_sampling)

    def _require_engine_args(self, capture: Capture) -> None:
        """Refuse an engine that does not run with what was asked. Collective: the server tells one rank alone."""
        if self.engine_request is None:
            return
        error = self.engine_request.disagreement(capture.generation, capture.engine)
        fail_together(error, capture.trainer.args.world_size)

    def _on_eval_batch(self, capture: Capture, sums: MismatchSums) -> None:
        reduced = reduce_sums(sums, capture.trainer.accelerator)
        self._eval = added(self._eval, reduced)
        # overwritten batch by batch: the last value covers the whole evaluation
        capture.log(_scalars(compute(self._eval)))

    # ---- verdicts ---------------------------------------------------------------------------------------------

    def _close_window(self, step: int, *, final: bool = False) -> None:
        """Reduce, judge, write, act (not when training is over). Collective: all ranks come here at the same batch."""
        self._measure_updates()
        trainer, sums = self._trainer, self._window.sums(self._trainer.accelerator.device)
        if self.monitor.floor.due:
            self._measure_floor()
        start = time.perf_counter()  # the floor has an account of its own
        if self._capture is not None:
            self._investigator.check_settings(self._capture)
        sums.bump(cost_seconds=self._spent, floor_seconds=self._spent_on_floor, wall_seconds=start - self._clock)
        self._clock, self._spent, self._spent_on_floor = start, 0.0, 0.0
        sums = reduce_sums(sums, trainer.accelerator).cpu()
        totals = sums.totals()
        self.monitor.floor.account(totals["floor_seconds"], totals["wall_seconds"])
        stats = self.monitor.scalars(compute(sums), new_window=True)
        if self.monitor.doubts_floor(stats) and self._measure_floor():
            stats = self.monitor.scalars(stats)
        verdict = self.monitor.judge(step, stats, self._window.error)
        self._unlogged.add(verdict, sums)
        self._log_rich(verdict, sums)
        self._windows += 1
        self._window.begin(step)
        if self._judging and self._investigator.due(verdict):
            self._diagnose(verdict.step)
        self._announce(verdict)
        if verdict.halted and not final:
            self._act(verdict)
        self._spent += time.perf_counter() - start - self._spent_on_floor

    def _measure_floor(self) -> bool:
        """Measure the noise floor on the batch at hand. Collective; False when there is none, or nothing came out."""
        if not self._judging or self._capture is None or not self.monitor.floor.enabled:
            return False
        start = time.perf_counter()
        trainer = self._trainer
        empty = MismatchSums.zeros(trainer.accelerator.device, bootstrap_samples=2)
        sources = dict.fromkeys(SOURCES, empty)
        try:
            sources |= measure_floor(self._capture, self.config)
        except Exception as e:  # the floor of before holds; without any, windows stay CALIBRATING
            logger.warning("the noise floor could not be measured: %s: %s", type(e).__name__, e)
            logger.debug("%s", traceback.format_exc())
        reduced = reduce_many([sources[name] for name in SOURCES], trainer.accelerator)
        measured = self.monitor.floor.update(dict(zip(SOURCES, reduced, strict=True)))
        self._spent_on_floor += time.perf_counter() - start
        return measured

    # ---- causes -----------------------------------------------------------------------------------------------

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The last diagnosis; None before the first."""
        return self._investigator.diagnosis

    def diagnose(self, *, heal: bool = False) -> Diagnosis | None:
        """Name the cause of the drift of the last batch, now. With several ranks, all must call it.

        ``heal``: afterwards hand the trainer's weights to the colocated engine and empty its prefix cache. Nothing
        else of the run is changed. None when there is no batch the present weights generated (none yet, or updated
        since): then the next window's batch is diagnosed, and ``diagnosis`` has it.
        """
        if self._capture is None or self._meter.last is None or self._moved:
            self._investigator.wanted = True
            logger.warning("no batch of the present weights is at hand: the next one will be diagnosed")
            diagnosis = None
        else:
            diagnosis = self._diagnose(self._capture.step + 1)
        if heal and self._capture is not None:
            moved = self._investigator.heal(self._capture)
            logger.warning("weights delivered to the engine: %d tensors moved; prefix cache emptied", len(moved))
        return diagnosis

    def _diagnose(self, step: int) -> Diagnosis | None:
        """Collective. Our own failure is a warning: the verdict stands without a cause."""
        if self._capture is None or self._meter.last is None:
            return None
        start = time.perf_counter()
        first = next((v for v in self.verdicts if v.stats is not None), None)
        resumed = self.monitor.breaker.windows > len(self.verdicts)
        try:
            return self._investigator.diagnose(
                self._capture,
                *self._meter.last,
                step=step,
                floor=self.monitor.floor.values.get("floor/kl_k3"),
                began_healthy=None if first is None or resumed else first.status is Status.OK,
            )
        except Exception as e:
            logger.warning("the drift of step %d could not be diagnosed: %s: %s", step, type(e).__name__, e)
            logger.debug("%s", traceback.format_exc())
            return None
        finally:  # once an episode, and said in its details: no part of the running cost
            if self._judging:
                self._spent -= time.perf_counter() - start

    def _log_rich(self, verdict: Verdict, sums: MismatchSums) -> None:
        """Histogram and tables of this window, where they are due. A collective then, on every rank."""
        every = self.config.rich_every_n_windows
        before = self.verdicts[-2].status if len(self.verdicts) > 1 else Status.OK
        worse = verdict.status in (Status.BREACH, Status.HALT) and verdict.status is not before
        if not every or not (worse or verdict.alert or self._windows % every == 0):
            return
        trainer, config = self._trainer, self.config
        decode = None if config.redact_text else trainer.processing_class.decode
        worst, sample = tokens_of_all(
            self._meter.last, verdict.step, config.worst_tokens, config.sample_tokens, decode, trainer.accelerator
        )
        self.monitor.log_rich(RichLog(verdict.step, sums, worst, sample, list(self.verdicts)))

    def _announce(self, verdict: Verdict) -> None:
        if not verdict.alert:
            return
        assert self._capture is not None
        if verdict.halted:
            parity_dir, last = self._jsonl_path().parent, self._meter.last if self._judging else None
            report = incident_folder(parity_dir, verdict.step) / "report.md"
            text = halt_text(verdict, self.config, list(self.verdicts), report, self.diagnosis)
            self.incident = self._investigator.write(
                parity_dir, verdict, list(self.verdicts), last, text, self._capture
            )
            if self.incident is None:  # nothing could be written
                text = text.replace(str(report), str(self._jsonl_path()))
            self.halt_message = text
        else:
            text = alert_text(verdict)
        if self._trainer.accelerator.is_main_process:
            if verdict.halted:
                print(text, file=sys.stderr, flush=True)
            else:
                logger.warning("%s", text)
        self.monitor.alert(verdict, text)

    def _act(self, verdict: Verdict) -> None:
        if self.config.action == "raise":
            raise ParityHalt(verdict, self.halt_message or verdict.reason)
        self._condemned = self.config.action in ("skip_update", "stop")
        self._stop = self.config.action == "stop"

    def _jsonl_path(self) -> Path:
        args = self._trainer.args
        return Path(self.config.parity_dir or Path(args.output_dir) / "parity") / "metrics.jsonl"

    # ---- trainer events ---------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer's class is imported by now, if it was not when the callback was made; its engine comes next."""
        instrument()
        if self.engine_request is not None:
            if kwargs.get("model") is not None:
                self.engine_request.apply_to(kwargs["model"])
            for text in self.engine_request.unlike(args):
                logger.warning("%s", text)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the sinks and, when the trainer resumes from a checkpoint, restore the breaker."""
        if "ppo" in instrument() and hasattr(args, "num_ppo_epochs"):  # else: added after the trainer was built
            raise InterceptionError(
                "PPOTrainer.train() began without trl-parity's wrapper and would run unobserved. Expected it in place "
                "since the trainer was built; was it removed (uninstrument)? Create the ParityCallback anew."
            )
        self._reset()
        resume = int(state.global_step)
        self._next_generation = resume
        self._window.begin(resume)
        if resume:
            self._restore(args, state)
        error = ""
        if state.is_world_process_zero:
            try:
                self.monitor.open(args.output_dir, args.report_to, resume)
            except (ConfigError, ImportError) as e:
                error = str(e)
        fail_together(error, args.world_size)  # main alone writes

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Refuse to learn from what was never measured; drop the gradient of a condemned batch."""
        self._require_interception("an optimizer step is due")
        if state.global_step >= self._next_generation:
            self._on_missing_batch(int(state.global_step))
        if self._condemned:
            drop_gradient(optimizer, self._trainer.accelerator)
        else:
            self._moved = True

    def _require_interception(self, seen: str) -> None:
        if self._trainer is None:
            raise InterceptionError(
                f"{seen} but no rollout batch was intercepted. ParityCallback covers TRL's GRPOTrainer, RLOOTrainer "
                "(with use_vllm=True), AsyncGRPOTrainer and PPOTrainer, and subclasses that call super() in "
                "_generate_and_score_completions, compute_loss or train. Is this another trainer, a subclass that "
                "replaces that method, or were the wrappers removed?"
            )

    def _on_missing_batch(self, step: int) -> None:
        """A batch that should have been intercepted was not: a failed measurement, never silence."""
        self._next_generation = step + 1
        self._window.error = "no rollout batch was intercepted for this step"
        self._window.sums(self._trainer.accelerator.device).bump(errors=1)
        self._close_window(step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if so judged; hand the windows since the last log to the trainer's metrics when it is about to log."""
        start = time.perf_counter()
        self._require_interception(f"step {state.global_step} is over")  # PPO's loop announces no optimizer step
        if self._stop:
            control.should_training_stop = control.should_save = control.should_log = True
        if control.should_log and self._unlogged:
            assert self._capture is not None
            self._capture.log(_scalars(self._unlogged.scalars(self.monitor)))
            self._unlogged = UnloggedWindows()
        if control.should_save:  # the same on every rank
            self._measure_updates()
            self._window.carry(self._trainer.accelerator)
        self._spent += time.perf_counter() - start

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation is over: the next one starts from nothing."""
        self._eval = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what an unfinished window holds, and close the file."""
        if self._window.batches and not self._stop:  # the same on every rank: batches are generated together
            self._close_window(int(state.global_step), final=True)
        self.monitor.close()

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the trainer's checkpoint keeps: the settings and the monitor's memory."""
        instrument()  # PPOTrainer sends no on_init_end, but asks for this while it is built
        checkpoint = self.monitor.state() | self._window.state()
        return {"args": self.config.to_dict(), "attributes": {"checkpoint": checkpoint}}

    def _restore(self, args: Any, state: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):
            saved = saved[0] if saved else None
        checkpoint = (saved or {}).get("attributes", {}).get("checkpoint")
        if not self.monitor.load_state(checkpoint):
            logger.warning(
                "the checkpoint of step %d holds no trl-parity state this version reads; the streak starts at 0 and "
                "the noise floor is measured anew.",
                state.global_step,
            )
            return
        if not self._window.load_state(checkpoint, args.device, state.is_world_process_zero):
            logger.warning("bootstrap_samples changed: the first part of the window open at the checkpoint is dropped")


def _scalars(stats: Mapping[str, float | None]) -> dict[str, float]:
    return {f"parity/{name}": value for name, value in stats.items() if value is not None}
