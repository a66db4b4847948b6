"""One run of a TRL trainer: the batch at hand, and what is made of it when a window closes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collectives import on_any
from ..config.parity import ParityConfig
from ..judging.health import of_drift, standing
from ..judging.noise_floor import GROUPS, SAME_EXPERTS, SOURCES
from ..lines import say
from ..metrics.reduction import reduce_sums
from ..metrics.sums import MismatchSums
from ..metrics.tokens import tokens_of_all
from ..records import Diagnosis, SamplingSettings
from ..report.messages import alert_text, ending_text, halt_text, skipped_text, start_text
from ..report.outcome import window_in_words
from ..scoring.perturb import own_random_numbers
from ..tracking.sinks import RichLog
from ..trainers.capture import Capture
from ..trainers.instrumentation import not_intercepted
from ..trainers.teacher import TeacherAnswers
from ..verdict import Status, Verdict
from .batches import BatchSums
from .floor_measurement import measure_floor
from .frozen import FrozenWeights
from .incidents import Investigator
from .judge import RunJudge
from .pipeline import Pipeline, Surroundings
from .window import UnloggedWindows

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainerRun"]

logger = logging.getLogger(__name__)

_REMIND = 10  # dropped updates between two lines about them


class TrainerRun(Surroundings):
    """What a trainer's run offers around a window.

    ``trainer``: None before the first training batch. ``capture``: the last training batch. ``moved``: the weights
    have been updated since. ``judge``: what judges it. ``unlogged``: windows the trainer has not logged.
    ``halt_message``, ``incident``: of the last halt. ``halt``: the last HALT while it stands, until a window is OK.
    ``skipped``: updates dropped in all.
    """

    accounts = True

    def __init__(self, config: ParityConfig, judge: RunJudge):
        self.config, self.judge = config, judge
        self.batches = BatchSums(config, judge)
        self.investigator = Investigator(config)
        self.halt_message: str | None = None
        self.incident: Path | None = None
        self.teacher: TeacherAnswers | None = None
        self.reset()

    def reset(self) -> None:
        """Another run begins."""
        self.batches.reset()
        self.investigator.reset()
        self.pipeline = Pipeline(self.judge, self)
        self.unlogged = UnloggedWindows()
        self.trainer: Any = None
        self.capture: Capture | None = None
        self.moved = False
        self.halt: Verdict | None = None
        self.skipped = 0
        self._told_skipped = {"window": 0, "log": 0}  # of them, up to the last row there
        self._truncation_before: str | None = None  # of the run that is resumed
        self._at_hand = False
        self._windows = 0
        self._frozen: FrozenWeights | None = FrozenWeights()
        with self.judge.stages("teacher"):
            self.unwatch_teacher()

    def watch_teacher(self, capture: Capture) -> None:
        """From now on, until ``unwatch_teacher``, look at what the server of a teacher answers, if there is one."""
        with self.judge.stages("teacher"):
            self.teacher = TeacherAnswers.of(capture)

    def unwatch_teacher(self) -> None:
        """Leave its client as it was."""
        teacher, self.teacher = self.teacher, None
        if teacher is not None:
            teacher.stop()

    @property
    def accelerator(self) -> Accelerator:  # type: ignore[override]
        """The trainer's."""
        return self.trainer.accelerator

    def require_interception(self, seen: str) -> None:
        """Raise InterceptionError where no training batch has come, though a step was ``seen``."""
        if self.trainer is None:
            raise not_intercepted(seen)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """All that measuring and judging does is done in here: on its own account, with random numbers of its own.

        A pass over a model in training mode draws for its dropout, and a colocated engine draws to sample: the run
        goes on with the numbers it would have had.
        """
        with own_random_numbers(), self.pipeline.stopwatch.account("cost"):
            yield

    @contextmanager
    def batch_at_hand(self) -> Iterator[None]:
        """Inside, the window that closes ends with the batch just captured: it can be measured and diagnosed."""
        self._at_hand = True
        try:
            yield
        finally:
            self._at_hand = False

    # ---- when a window closes ---------------------------------------------------------------------------------

    def check_engine(self) -> None:
        """Whether a server runs with other settings than before."""
        with self.judge.stages("engine settings"):  # what is measured does not depend on it
            if self.capture is not None:
                self.investigator.check_settings(self.capture)

    def all_tokens(self) -> MismatchSums | None:
        """Of the batch at hand. A failure of ours is a warning: the sample is judged."""
        if not self._at_hand or not self.measured:
            return None
        more = self._completed()
        return None if more is None else reduce_sums(more, self.accelerator).cpu()

    def _completed(self) -> MismatchSums | None:
        """Collective; None on all ranks where it failed on one."""
        assert self.capture is not None
        capture, ranks = self.capture, self.accelerator.num_processes
        return self.judge.stages.together("all tokens", ranks, lambda: self.batches.complete(capture))

    def add_to(self, sums: MismatchSums) -> None:
        """How far the frozen weights have moved, and what the teacher's server answered."""
        if self.teacher is not None:
            with self.judge.stages("teacher"):
                counts, maxima = self.teacher.taken()
                sums.bump(**counts)
                sums.raise_to(**maxima)
        if self.capture is None or self._frozen is None:
            return
        with self.judge.stages("frozen weights"):  # the mismatch is measured without them, from then on
            frozen, self._frozen = self._frozen, None
            sums.bump(**frozen.moved(self.capture.policy))
            self._frozen = frozen

    def floor_sums(self) -> Mapping[str, Sequence[MismatchSums]] | None:
        """Of the batch at hand. A failure of ours is a warning: without any floor, windows stay CALIBRATING."""
        if not self._at_hand or self.capture is None:
            return None
        empty = MismatchSums.zeros(self.accelerator.device, bootstrap_samples=2)
        sources: dict[str, Sequence[MismatchSums]] = dict.fromkeys(SOURCES, [empty] * GROUPS)
        capture, ranks = self.capture, self.accelerator.num_processes

        def measured() -> None:
            sources.update(measure_floor(capture, self.config))

        self.judge.stages.together("noise floor", ranks, measured)
        if any(on_any((SAME_EXPERTS in sources,), self.accelerator)):
            sources.setdefault(SAME_EXPERTS, [empty] * GROUPS)
        return sources  # what this rank has measured counts, whatever failed on another

    def on_verdict(self, verdict: Verdict, sums: MismatchSums) -> None:
        """To the trainer's log, and histogram and tables to the trackers where they are due: a collective then."""
        self.halt = verdict if verdict.halted else self.halt if self.judge.course.standing else None
        with self.judge.stages("merged windows"):
            self.unlogged.add(verdict, sums)
        every, verdicts = self.config.rich_every_n_windows, self.judge.verdicts
        before = verdicts[-2].status if len(verdicts) > 1 else Status.OK
        worse = verdict.status in (Status.BREACH, Status.HALT) and verdict.status is not before
        due = every and (worse or verdict.alert or self._windows % every == 0)
        self._windows += 1
        if due:
            self._log_rich(verdict, sums)
        self.judge.tell(lambda sink: sink.tell(window_in_words(verdict, self.judge.course)))

    def _log_rich(self, verdict: Verdict, sums: MismatchSums) -> None:
        """Collective."""
        config, accelerator = self.config, self.accelerator

        def tokens() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            decode = None if config.redact_text else self.trainer.processing_class.decode
            return tokens_of_all(
                self.batches.last, verdict.step, config.worst_tokens, config.sample_tokens, decode, accelerator
            )

        found = self.judge.stages.together("tables", accelerator.num_processes, tokens)
        self.judge.log_rich(RichLog(verdict.step, sums, *(found or ([], [])), list(self.judge.verdicts)))

    def diagnose(self, verdict: Verdict) -> None:
        """Once an episode, of the batch at hand; its first breach leaves an incident, as a halt does."""
        if self._at_hand and self.investigator.due(verdict):
            self.diagnose_batch(verdict.step)
        if self.investigator.leaves(verdict):
            with self.pipeline.stopwatch.account("incident"):
                self._leave_incident(verdict)

    def diagnose_batch(self, step: int) -> Diagnosis | None:
        """Collective. None where a rank's batch was not measured, or where it failed: the verdict stands alone."""
        if not self.measured:
            return None
        # twice an episode at most, and said in its details: no part of the running cost
        with self.pipeline.stopwatch.account("diagnosis"):
            ranks = self.accelerator.num_processes
            assert self.batches.last is not None
            [sampled] = on_any((self.batches.last[1].weights is not None,), self.accelerator)
            if sampled:
                self._completed()
            found = self.judge.stages.together("diagnosis", ranks, lambda: self._diagnosis(step))
            if found is not None:
                self.investigator.found(found)
            return found

    @property
    def measured(self) -> bool:
        """Whether every rank has its last batch with its scores. Collective."""
        if self.capture is None:
            return False
        [missing] = on_any((self.batches.last is None,), self.accelerator)
        return not missing

    def _diagnosis(self, step: int) -> Diagnosis:
        assert self.capture is not None
        assert self.batches.last is not None
        verdicts = self.judge.verdicts
        first = next((v for v in verdicts if v.stats is not None), None)
        resumed = self.judge.breaker.windows > len(verdicts)
        return self.investigator.diagnose(
            self.capture,
            *self.batches.last,
            step=step,
            floor=self.judge.floor.values.get("floor/kl_k3"),
            began_healthy=None if first is None or resumed else first.status is Status.OK,
            alarmed=bool(verdicts) and of_drift(verdicts[-1]),
            health=standing(verdicts),
        )

    def announce(self, verdict: Verdict) -> str:
        """A halt is printed by the main process and leaves its incident; anything else is a warning."""
        text = super().announce(verdict)
        if verdict.halted:
            with self.pipeline.stopwatch.account("incident"):
                self.incident, text = self._leave_incident(verdict)
                self.halt_message = text
        else:
            with self.judge.stages("text"):
                text = alert_text(verdict)
        with self.judge.stages("line"):
            if self.accelerator.is_main_process:
                if verdict.halted:
                    say(text)
                else:
                    logger.warning("%s", text)
        return text

    def _leave_incident(self, verdict: Verdict) -> tuple[Path | None, str]:
        """Its folder, and what it says. On other ranks, and on a full disk, nothing is written."""
        verdicts, diagnosis = list(self.judge.verdicts), self.investigator.diagnosis
        folder, stages = None, self.judge.stages

        def text(look: Path) -> str:
            with stages("text"):  # what is told badly is no reason to take the run down, or not to halt it
                args = self.trainer.args
                checkpoints = None if hasattr(args, "num_ppo_epochs") else Path(args.output_dir)  # PPO can't resume
                return halt_text(verdict, self.config, verdicts, look, diagnosis, checkpoints)
            return f"trl-parity: {verdict.status} at step {verdict.step}: {verdict.reason}. Look: {look}"

        with stages("incident"):
            assert self.capture is not None
            last = self.batches.last if self._at_hand else None
            folder = self.investigator.write(
                self.parity_dir, verdict, verdicts, last, lambda folder: text(folder / "report.md"), self.capture
            )
        return folder, text(self.parity_dir / "metrics.jsonl" if folder is None else folder / "report.md")

    # ---- what is said of a run --------------------------------------------------------------------------------

    @property
    def parity_dir(self) -> Path:
        """Where its files are."""
        return Path(self.config.parity_dir or Path(self.trainer.args.output_dir) / "parity")

    def say_start(self, sampling: SamplingSettings) -> None:
        """What is watched from now on (main process). ``sampling``: of the first batch."""
        args, before, now = self.trainer.args, self._truncation_before, self.config.truncation
        every = int(args.logging_steps) if getattr(args, "logging_strategy", "no") == "steps" else 1
        say(start_text(type(self.trainer).__name__, self.config, self.parity_dir, every))
        if before not in (None, now) and (sampling.truncates or sampling.penalizes):
            logger.warning(
                "the run was judged with truncation=%r up to the checkpoint, and is with %r from here on: the engine "
                "truncates or penalizes, so the two are not the same. truncation=%r goes on as before.",
                before, now, before,
            )  # fmt: skip

    def ending(self) -> str:
        """One line about all of it."""
        with self.judge.stages("ending"):
            diagnosis = self.investigator.diagnosis
            cause = None if diagnosis is None else diagnosis.cause
            look = self.parity_dir if self.halt is None or self.incident is None else self.incident / "report.md"
            return ending_text(self.judge.course, self.halt, cause, self.skipped, look)
        return "" if self.halt is None else f"trl-parity: HALT at step {self.halt.step}: {self.halt.reason}"

    def skip(self) -> None:
        """An update was dropped. While a halt stands, that is said again from time to time."""
        self.skipped += 1
        remind = self.config.action == "skip_update" and self.skipped % _REMIND == 0
        with self.judge.stages("reminder"):
            if remind and self.halt is not None and self.accelerator.is_main_process:
                say(skipped_text(self.skipped, self.halt))

    def resume(self, settings: Mapping[str, Any], skipped: int) -> None:
        """The run had these settings before, and so many updates were dropped."""
        self._truncation_before = settings.get("truncation")
        self.skipped, self._told_skipped = skipped, {"window": skipped, "log": skipped}

    def skips(self, row: str) -> dict[str, float | None]:
        """Scalars of the dropped updates: since the last row there ("window", "log"), and in all."""
        if self.config.action != "skip_update":
            return {}
        since, self._told_skipped[row] = self.skipped - self._told_skipped[row], self.skipped
        return {"breaker/skipped": since, "breaker/skipped_total": self.skipped}

    def scalars(self) -> dict[str, float | None]:
        """Of the window that closes, beside what was measured."""
        return self.skips("window")
