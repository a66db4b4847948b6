"""What judges a run, window by window, whoever measured it, and what is left of it: files, alerts, a checkpoint."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collectives import gather_rows
from ..config.parity import ParityConfig
from ..credentials import masked, without_credentials
from ..errors import ConfigError
from ..files import FolderLock, jsonable, require_no_link, sweep, write_atomic
from ..judging.breaker import SETTLED, Breaker
from ..judging.course import Course
from ..judging.evidence import Evidence
from ..judging.limits import allowed
from ..judging.noise_floor import NoiseFloor
from ..judging.replicas import Replicas
from ..metrics.rewards import MIN_REWARDS, REWARDS_NAME, RewardBaseline, RewardWindow
from ..metrics.scalars import SCALARS
from ..metrics.statistics import measure
from ..metrics.sums import MismatchSums
from ..metrics.trends import EntropyWatch
from ..records import ScoredBatch
from ..report.reward_figure import plot_rewards
from ..results.jsonl import JsonlSink
from ..results.paths import CONFIG_NAME, RUN_NAME, TOKENS_NAME
from ..tracking.sinks import AlertSink, RichLog, TrackioSink, WandbSink, alert_sinks
from ..verdict import MismatchStats, Status, Verdict
from .stages import Stages

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["RunJudge"]

logger = logging.getLogger(__name__)

STATE_VERSION = 5

_KEEP_VERDICTS = 1000

_REWARD_ALPHA = 0.001


class RunJudge:
    """Breaker, noise floor, evidence, entropy and reward watch, files and alerts of one run."""

    def __init__(self, config: ParityConfig, *, measured_floor: bool):
        self.config = config
        self._lock: FolderLock | None = None
        self.reset(measured_floor)

    def reset(self, measured_floor: bool = True) -> None:
        """Forget everything: a new run begins. ``measured_floor``: somebody will measure the noise floor."""
        config = self.config if measured_floor else replace(self.config, floor_tokens=0)
        self.stages = Stages()
        self._sequences = 0
        self.verdicts: deque[Verdict] = deque(maxlen=_KEEP_VERDICTS)
        self.breaker = Breaker.from_config(config)
        rules = self.breaker.rules
        self._told = [rule for rule in rules if f"limit/{rule.stat}" in SCALARS]
        self._resting = [rule for rule in rules if rule.k is not None or rule.stat.startswith("floor/")]
        self.course = Course(action=self.config.action)
        self.floor = NoiseFloor(config)
        self.evidence = Evidence.from_config(config)
        self.replicas = Replicas(config.consecutive, config.breach_memory)
        self.entropy = EntropyWatch()
        self.rewards = RewardWindow(self.config.reward_window)
        path = self.config.reward_baseline
        self.baseline = RewardBaseline.load(path) if path is not None else None
        self._unlock()
        self._jsonl: JsonlSink | None = None
        self._tokens: JsonlSink | None = None
        self.sinks: list[AlertSink] = []

    def open(self, output_dir: str | Path | None, report_to: Iterable[str], resume_step: int = 0) -> None:
        """Open the file and the trackers' alerts (main process only). Raises ConfigError when that can't be done."""
        self.sinks = alert_sinks(report_to)
        directory = self.config.parity_dir or (None if output_dir is None else Path(output_dir) / "parity")
        if directory is not None:
            if self.config.parity_dir is None:
                require_no_link(Path(directory))
            self._lock = FolderLock(Path(directory))
            for folder in (Path(directory), Path(directory) / "incidents"):
                sweep(folder)
            self._jsonl = JsonlSink(directory, resume_step)
            (Path(directory) / REWARDS_NAME).unlink(missing_ok=True)  # an earlier run's
            if self.config.rich_every_n_windows and self.config.sample_tokens:
                self._tokens = JsonlSink(directory, resume_step, TOKENS_NAME)
            write_atomic(Path(directory) / CONFIG_NAME, json.dumps(self.config.to_dict(), indent=1))

    def close(self) -> None:
        """Close the file, and leave the run's last rewards beside it. Later windows are not written.

        ``rewards.json``, as ``RewardBaseline`` reads it, where there are 20 or more; ``rewards.png``
        if there is a baseline to compare them with.
        """
        with self.stages("alert"):
            for sink in self.sinks:
                if isinstance(sink, WandbSink | TrackioSink):
                    sink.flush()
        if self._jsonl is None:
            return
        path = self._jsonl.path
        with self.stages("last files"):
            self._jsonl.close()
        with self.stages("last files"):
            if self._tokens is not None:
                self._tokens.close()
        with self.stages("rewards file"):  # a full disk
            if len(self.rewards) >= MIN_REWARDS:
                RewardBaseline(self.rewards.rewards).save(path.with_name(REWARDS_NAME))
        with self.stages("rewards file"):  # a picture less: no matplotlib, a full disk
            if self.baseline is not None and len(self.rewards):
                plot_rewards(self.baseline, self.rewards.rewards, path.with_name("rewards.png"))
        self._jsonl = self._tokens = None
        with self.stages("last files"):
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def status(self) -> Status:
        """The status of the last window; NO_DATA before the first."""
        return self.verdicts[-1].status if self.verdicts else Status.NO_DATA

    # ---- windows ----------------------------------------------------------------------------------------------

    def sums_of(self, scored: ScoredBatch, rank: int) -> MismatchSums:
        """The sums of one batch of this rank."""
        # numbered over batches and ranks; a prime stride keeps the ranks' numbers apart in the resampling pool
        first = self._sequences + rank * 1009
        sums = measure(scored, bootstrap_samples=self.config.bootstrap_samples, first_sequence=first)
        self._sequences += len(scored.mask)
        return sums

    def add_rewards(self, sums: MismatchSums, rewards: list[float], prompts: Sequence[int] | None = None) -> None:
        """Take in a batch's rewards (of all ranks, the same on each), and numbers that tell their prompts apart."""
        if finite := self.rewards.extend(rewards, prompts):
            sums.bump(rewards=len(finite), reward_sum=sum(finite))

    def scalars(self, stats: MismatchStats, *, new_window: bool = False) -> MismatchStats:
        """A window's statistics with noise floor, excess, entropy watch and reward comparison added."""
        if new_window:
            self.entropy.update(stats.get("entropy/trainer"))
        extra = self.floor.scalars(stats.values_by_name) | self.entropy.scalars()
        for rule in self._told:
            if stats.get(rule.stat) is not None:
                limit = allowed(rule, extra.get(f"floor/{rule.stat}"))
                if limit is not None:
                    extra[f"limit/{rule.stat}"] = limit
        if self.baseline is not None:
            comparison = self.baseline.compare(self.rewards.rewards, self.rewards.prompts)
            if comparison is not None:
                extra |= {
                    "reward/effect_size": comparison.effect_size,
                    "reward/ks": comparison.ks,
                    "reward/p_value": comparison.p_value,
                    "reward/parted": float(comparison.parted(self.config.reward_min_effect, _REWARD_ALPHA)),
                }
        return stats.updated(extra)

    def of_replicas(self, sums: MismatchSums, stats: MismatchStats) -> dict[str, float | None]:
        """``replica/*`` of a window, from its reduced sums and what was computed of them."""
        by_rank, sequences = sums.by_rank, self.floor.sequences
        settled = sequences is None or sequences >= SETTLED
        return self.replicas.add(None if by_rank is None else by_rank.numpy(), stats, settled=settled)

    def doubts_floor(self, stats: MismatchStats) -> bool:
        """Whether an older floor should be measured anew before this window is judged.

        So before a rule that rests on it breaches (until the run is halted), or begins an episode with a WARN; and
        while the evidence of a drift over it is half of what decides.
        """
        if not self.floor.age or self.status is Status.HALT:
            return False
        if self.evidence.suspects_floor:
            return True
        readings = self.breaker.readings(stats.values_by_name, self._resting)
        return any(r.over or (r.warns and not self.breaker.alerted) for r in readings)

    def doubts_sample(self, stats: MismatchStats) -> bool:
        """Whether this window, of which the fp32 head scored a sample, should be scored in full before it is judged.

        So where a rule on the mismatch warns or breaches.
        """
        coverage = stats.get("cost/coverage")
        if coverage is None or coverage >= 1:
            return False
        return any(r.warns and not r.rule.warn_only for r in self.breaker.readings(stats.values_by_name))

    @property
    def calm(self) -> bool:
        """Whether nothing speaks against the last window: no rule on the mismatch, no breach that is remembered.

        Nor what a sample shows least of: evidence of a drift over the floor, or bets on the entropy that have won.
        """
        if not self.verdicts or self.status not in (Status.OK, Status.WARN):
            return False
        told = {rule.stat for rule in self.breaker.rules if rule.warn_only}
        warned = set(self.verdicts[-1].warnings) - told
        suspected = self.evidence.suspects_floor or self.evidence.suspects_entropy
        return not (warned or self.breaker.streak or self.breaker.level or suspected)

    def judge(self, step: int, stats: MismatchStats | None, error: str = "") -> Verdict:
        """The verdict on a window's (reduced) statistics; kept and written."""
        verdict = self.decide(step, stats, error)
        self.keep(verdict)
        return verdict

    def decide(self, step: int, stats: MismatchStats | None, error: str = "") -> Verdict:
        """The verdict on a window's (reduced) statistics."""
        return self.breaker.judge(step, self.evidence.add(step, stats), masked(error) if error else "")

    def unjudged(self, step: int, before: Breaker, accelerator: Accelerator | None) -> Verdict:
        """The verdict on a window that could not be judged on some rank: a failure, to the breaker ``before`` it.

        What else remembers windows is taken over from a rank on which it was judged, if there is one, so that all go
        on alike. Every rank must call it.
        """
        error, verdict = self.stages.unjudged, None
        try:
            verdict = before.judge(step, None, masked(error) if error else "")
        except Exception as e:  # not even as a failure: an ERROR that no breaker has counted, below
            self.stages.failed("verdict", e)
        memory = None if error else (self.floor, self.evidence, self.replicas, self.entropy)
        row: dict[str, Any] = {"error": error, "memory": memory, "breaker": before, "verdict": verdict}
        rows = gather_rows([row]) if accelerator is not None and accelerator.num_processes > 1 else [row]
        if healthy := next((row["memory"] for row in rows if row["memory"]), None):
            self.floor, self.evidence, self.replicas, self.entropy = healthy
        failed = sorted((row for row in rows if row["verdict"]), key=lambda row: not row["error"])  # first its words
        self.breaker = failed[0]["breaker"] if failed else before
        told = next(row["error"] for row in rows if row["error"])
        broken = Verdict(step=step, status=Status.ERROR, streak=0, reason=f"measurement failed: {masked(told)}")
        return failed[0]["verdict"] if failed else broken

    def keep(self, verdict: Verdict) -> None:
        """Keep the verdict on a window, and write it."""
        self.verdicts.append(verdict)
        self.course.add(verdict.step, verdict.status)
        self.floor.age += 1
        with self.stages("windows file"):
            if self._jsonl is not None:
                self._jsonl.write(verdict)

    def tell(self, call: Callable[[AlertSink], None], stage: str = "tracker") -> None:
        """Do this with each tracker, whatever becomes of the others."""
        for sink in self.sinks:
            with self.stages(stage):
                call(sink)

    def log_rich(self, rich: RichLog) -> None:
        """Histogram and tables of a window to the trackers; its sample of tokens to ``tokens.jsonl``."""
        with self.stages("tokens file"):
            if self._tokens is not None and rich.sample:
                self._tokens.write_tokens(rich.verdicts[-1], rich.sample)
        self.tell(lambda sink: sink.log_rich(rich))

    def write_run(self, about: Mapping[str, Any]) -> None:
        """What the run ran on, as ``run.json`` beside the windows. A failure is a warning."""
        if self._jsonl is None:
            return
        with self.stages("run file"):
            content = json.dumps(
                jsonable({"schema_version": 1, **without_credentials(about)}), indent=1, allow_nan=False
            )
            write_atomic(self._jsonl.path.with_name(RUN_NAME), content)

    def alert(self, verdict: Verdict, text: str) -> None:
        """Tell people through the trackers, if this window is the first of its episode to reach WARN or HALT."""
        if verdict.alert:
            self.tell(lambda sink: sink.alert(verdict, text), "alert")

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        course = {"course": self.course.state()} if self.course.counts else {}
        return (
            course
            | {
                "state_version": STATE_VERSION,
                "breaker": self.breaker.state(),
                "floor": self.floor.state(),
                "entropy": self.entropy.state(),
                "rewards": self.rewards.state(),
                "sequences": self._sequences,
            }
            | ({"evidence": evidence} if (evidence := self.evidence.state()) else {})
            | ({"replicas": replicas} if (replicas := self.replicas.state()) else {})
        )

    def load_state(self, state: Any) -> bool:
        """Restore ``state``. A state of another version: False and an empty start, or ConfigError, as set."""
        version = state.get("state_version") if isinstance(state, Mapping) else None
        if version != STATE_VERSION:
            if self.config.on_state_mismatch == "error":
                raise ConfigError(
                    f"the checkpoint's trl-parity state has version {version!r}; this version reads {STATE_VERSION}. "
                    "Resume with the trl-parity that wrote it, or set on_state_mismatch='restart' to begin with an "
                    "empty streak and a new noise floor."
                )
            return False
        self.breaker.load_state(state["breaker"])
        if course := state.get("course"):
            self.course = Course.of_state({**course, "action": self.config.action})
        self.floor.load_state(state["floor"])
        self.entropy.load_state(state["entropy"])
        self.rewards.load_state(state["rewards"])
        self.evidence.load_state(state.get("evidence", {}))
        self.replicas.load_state(state.get("replicas", ()))
        self._sequences = int(state["sequences"])
        return True
