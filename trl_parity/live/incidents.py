"""When to ask for the cause of a drift, and what is left behind of it: diagnosis and incident bundle of an episode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collectives import gather_rows
from ..config.parity import ParityConfig
from ..engine.base import in_process
from ..engine.handle import SettingsHistory
from ..engine.weight_readback import policy_tensors
from ..errors import ConfigError
from ..records import Diagnosis, NamedCause, RolloutBatch, ScoredBatch
from ..report.bundle import write_incident
from ..results.incident import Incident, prune_incidents, sequence_rows, versions, windows_in_short
from ..results.redaction import without_text
from ..trainers.capture import Capture
from ..verdict import Status, Verdict

if TYPE_CHECKING:
    from ..diagnosis.weight_versions import WeightVersions

__all__ = ["Investigator"]

logger = logging.getLogger(__name__)

_SEQUENCES = 16  # in the bundle

_TOKENS = 16384  # of them in one of a breach, about


class Investigator:
    """Diagnoses once an episode (at its first BREACH, or WARN), and again at its first HALT if that named nothing.

    Only the first has a time to keep: the other asks all there is to ask, as does one that somebody asked for.

    An episode goes from the first window that is not healthy to the next OK at which no breach is remembered
    (``Verdict.level``). What was named before a healthy window is not taken for the cause of a halt after it: that may
    be another fault. One asked for by name counts for none.
    """

    def __init__(self, config: ParityConfig):
        self.config = config
        self.wanted = False  # somebody asked for one when no batch was at hand
        self.unbounded = False  # the next one asks all there is to ask, whatever time it takes
        self.reset()

    def reset(self) -> None:
        """A new run begins."""
        self.diagnosis: Diagnosis | None = None  # the last one
        self._episode()
        self._settings = SettingsHistory()
        self._versions: WeightVersions | None = None

    def _episode(self) -> None:
        self._asked = self._asked_at_halt = self._named = self._left = False

    def check_settings(self, capture: Capture) -> None:
        """Look whether a server still runs with the settings the run began with; what changed is a warning."""
        self._settings.compare(capture.refreshed_engine())

    def remember(self, capture: Capture) -> None:
        """The weights that the batch at hand was sampled with, in a few elements: for a diagnosis to come."""
        if self.config.diagnose == "never" or capture.sharded or not in_process(capture.engine):
            return
        if self._versions is None:
            from ..diagnosis.weight_versions import WeightVersions

            self._versions = WeightVersions()
        self._versions.keep(capture.policy, capture.step)

    def due(self, verdict: Verdict) -> bool:
        """Whether this window is to be diagnosed; the same on every rank."""
        if verdict.status is Status.OK:
            self._named = False
            if not verdict.level:
                self._episode()
        breached = verdict.status in (Status.BREACH, Status.HALT)
        warned = self.config.diagnose == "warn" and verdict.status is Status.WARN and bool(verdict.warnings)
        due = self.config.diagnose != "never" and (breached or warned)
        due &= not self._asked or (verdict.halted and not self._named and not self._asked_at_halt)
        wanted, self.wanted = self.wanted, False
        self.unbounded = wanted or self._asked or verdict.halted
        if due:  # one that fails is not tried again and again
            self._asked, self._asked_at_halt = True, verdict.halted
        return wanted or due

    def leaves(self, verdict: Verdict) -> bool:
        """Whether this window, breached and not halted, is to leave an incident: the first of its episode."""
        first = verdict.status is Status.BREACH and not self._left
        self._left |= first
        return first

    def diagnose(
        self,
        capture: Capture,
        rollout: RolloutBatch,
        scored: ScoredBatch,
        *,
        step: int,
        floor: float | None,
        began_healthy: bool | None,
        alarmed: bool,
        health: Sequence[NamedCause],
    ) -> Diagnosis:
        """Name the cause of the batch's drift. A collective. Details: ``rollout_seconds``, of the slowest rank's."""
        from ..diagnosis.counterfactual import DiagnosedBatch
        from ..diagnosis.diagnose import diagnose

        trainer = capture.trainer
        ranks = trainer.accelerator.num_processes
        mine = {"seconds": capture.batch_seconds}
        seconds = max(row["seconds"] for row in (gather_rows([mine]) if ranks > 1 else [mine]))
        batch = DiagnosedBatch.of(
            capture,
            rollout,
            scored,
            capture.engine,
            token_budget=self.config.diagnose_tokens,
            replayed=capture.replayed,
            floor=floor or 0.0,
            began_healthy=began_healthy,
            redacted=self.config.redact_text,
            versions=self._versions,
        )
        budget = None if self.unbounded else self.config.diagnose_budget * seconds
        found = diagnose(batch, step, budget=budget, ranks=ranks, alarmed=alarmed, health=health)
        return replace(found, details=found.details | {"rollout_seconds": seconds})

    def found(self, diagnosis: Diagnosis) -> None:
        """A diagnosis that all ranks have come to."""
        self.diagnosis, self._named = diagnosis, diagnosis.cause != "unknown"

    def heal(self, capture: Capture) -> list[str]:
        """Deliver the policy's weights to the colocated engine and empty its caches; names of what moved."""
        from ..engine.weight_readback import read_back

        engine = capture.engine
        if not in_process(engine):
            raise ConfigError("heal=True needs a colocated engine; call trainer.vllm_generation.sync_weights().")
        moved = []
        for name, tensor, *_ in policy_tensors(capture.policy):
            [held] = read_back(engine.model.load_weights, engine.model, [(name, tensor)])
            if held.differing:
                engine.model.load_weights([(name, tensor)])
                moved.append(name)
        engine.llm.reset_prefix_cache(reset_running_requests=True)
        if hasattr(engine.llm.llm_engine, "reset_encoder_cache"):  # vLLM 0.31 has it
            engine.llm.llm_engine.reset_encoder_cache()
        return moved

    def surroundings(self, capture: Capture) -> dict[str, Any]:
        """What a run's ``run.json`` holds: trainer, model, engine settings and versions. Never raises."""
        trainer = capture.trainer
        try:
            engine = self._engine(capture)
        except Exception as e:  # a server that does not answer is told elsewhere
            engine = {"not read": f"{type(e).__name__}: {e}"}
        model = getattr(getattr(trainer.model, "config", None), "_name_or_path", None)
        found = {"trainer": type(trainer).__name__, "model": model, "engine": engine, "versions": versions()}
        return without_text(found) if self.config.redact_text else found

    def _engine(self, capture: Capture) -> dict[str, Any]:
        """Settings of the live engine."""
        engine = capture.engine
        mode = None if capture.generation is None else capture.generation.mode
        return {"mode": mode} | ({} if engine is None else engine.everything()) | self._settings.to_dict()

    def write(
        self,
        directory: Path,
        verdict: Verdict,
        verdicts: Sequence[Verdict],
        last: tuple[RolloutBatch, ScoredBatch] | None,
        text: Callable[[Path], str],
        capture: Capture,
    ) -> Path | None:
        """The incident bundle of the main process: its folder. None on other ranks, and where it can't be written.

        ``text``: what is printed at the halt, given the folder. Where training goes on it holds fewer sequences, so
        that long ones take no seconds. Older bundles may go (``prune_incidents``).
        """
        trainer = capture.trainer
        if not trainer.accelerator.is_main_process:
            return None
        redact = self.config.redact_text
        decode = None if redact else trainer.processing_class.decode
        rows: list[dict[str, Any]] = []
        try:
            if last is not None:
                columns = last[0].completion_ids.shape[1]
                most = _SEQUENCES if verdict.halted else min(_SEQUENCES, 1 + _TOKENS // max(1, columns))
                rows = sequence_rows(*last, decode, most)
        except Exception as e:  # a bundle without sequences is better than none
            logger.warning("the incident's sequences could not be kept: %s: %s", type(e).__name__, e)
        try:
            incident = Incident(
                step=verdict.step,
                verdict=verdict.to_dict(),
                diagnosis=None if self.diagnosis is None else self.diagnosis.to_dict(),
                engine=self._engine(capture),
                versions=versions(),
                config=self.config.to_dict(),
                windows=windows_in_short(verdicts),
                text="",  # filled in by who knows the folder
                redacted=redact,
            )
            # where training goes on, nobody waits for pictures: `trl-parity report` draws them from the folder
            ends = verdict.halted and self.config.action in ("stop", "raise")
            folder = write_incident(directory, incident, rows, text, pictures=ends)
            prune_incidents(directory, keep=folder)
            return folder
        except Exception as e:  # a full disk must not change how the run ends
            logger.warning("the incident of step %d could not be kept: %s: %s", verdict.step, type(e).__name__, e)
            return None
