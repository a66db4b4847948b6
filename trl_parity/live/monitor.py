"""``ParityMonitor``: what judges a run, window by window, whoever measured it.

``ParityCallback`` feeds it from a TRL trainer; any other loop calls ``ParityMonitor.log_step``.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.parity import ParityConfig
from ..errors import ConfigError
from ..files import jsonable, write_atomic
from ..judging.breaker import Breaker
from ..judging.noise_floor import NoiseFloor
from ..metrics.reduction import reduce_sums
from ..metrics.rewards import MIN_REWARDS, REWARDS_NAME, RewardBaseline, RewardWindow
from ..metrics.scalars import FLOORED, SCALARS
from ..metrics.statistics import compute, measure
from ..metrics.sums import MismatchSums
from ..metrics.trends import EntropyWatch
from ..records import ScoredBatch
from ..report.reward_figure import plot_rewards
from ..results.jsonl import JsonlSink
from ..results.paths import CONFIG_NAME, RUN_NAME, TOKENS_NAME
from ..tracking.sinks import AlertSink, RichLog, alert_sinks
from ..verdict import MismatchStats, Status, Verdict

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

__all__ = ["ParityMonitor"]

logger = logging.getLogger(__name__)

STATE_VERSION = 5

_KEEP_VERDICTS = 1000

_REWARD_ALPHA = 0.001


class ParityMonitor:
    """Breaker, noise floor, entropy and reward watch, files and alerts of one run.

        monitor = ParityMonitor(output_dir="runs/mine", report_to=["wandb"])
        verdict = monitor.log_step(step, rollout_logprobs=..., trainer_logprobs=..., mask=..., rewards=...)
        if verdict.halted: ...

    Outside a trainer there is no model to measure the noise floor with: give ``floor``, a mapping of statistic to
    value, or the rules' ``absolute`` limits hold.

    Args:
        config: A ``ParityConfig``. Default: all defaults.
        output_dir: Where ``parity/metrics.jsonl`` goes. None: no file.
        report_to: Trackers that get scalars and alerts: "wandb" (the active run), "trackio".
        floor: Noise floor by statistic, e.g. ``{"kl_k3": 2e-5, "logp_abs_diff/mean": 3e-3}``.
        accelerator: With several ranks: sums are reduced over them, every rank must call ``log_step``, and all get
            the same verdict. Files and alerts are the main process's.
        opened: Whether files and trackers are opened now; else when ``open`` is called.
        **overrides: Fields of the config to set.

    Raises:
        ConfigError: an unknown field, a wrong value, an unwritable directory, an unreadable baseline.
    """

    def __init__(
        self,
        config: ParityConfig | None = None,
        *,
        output_dir: str | Path | None = None,
        report_to: Iterable[str] = (),
        floor: Mapping[str, float] | None = None,
        accelerator: Accelerator | None = None,
        opened: bool = True,
        **overrides: Any,
    ):
        self.config = ParityConfig.of(config, overrides, where="ParityMonitor")
        self._accelerator = accelerator
        self.reset(measured_floor=False)
        self.floor.values |= {f"floor/{stat}": value for stat, value in _checked_floor(floor or {}).items()}
        if opened and (accelerator is None or accelerator.is_main_process):
            self.open(output_dir, report_to)

    def reset(self, measured_floor: bool = True) -> None:
        """Forget everything: a new run begins. ``measured_floor``: somebody will measure the noise floor."""
        config = self.config if measured_floor else replace(self.config, floor_tokens=0)
        self._sequences = 0
        self.verdicts: deque[Verdict] = deque(maxlen=_KEEP_VERDICTS)
        self.breaker = Breaker.from_config(config)
        self.floor = NoiseFloor(config)
        self.entropy = EntropyWatch()
        self.rewards = RewardWindow(self.config.reward_window)
        path = self.config.reward_baseline
        self.baseline = RewardBaseline.load(path) if path is not None else None
        self._jsonl: JsonlSink | None = None
        self._tokens: JsonlSink | None = None
        self.sinks: list[AlertSink] = []

    def open(self, output_dir: str | Path | None, report_to: Iterable[str], resume_step: int = 0) -> None:
        """Open the file and the trackers' alerts (main process only). Raises ConfigError when that can't be done."""
        self.sinks = alert_sinks(report_to)
        directory = self.config.parity_dir or (None if output_dir is None else Path(output_dir) / "parity")
        if directory is not None:
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
        if self._jsonl is None:
            return
        self._jsonl.close()
        if len(self.rewards) >= MIN_REWARDS:
            try:
                RewardBaseline(self.rewards.rewards).save(self._jsonl.path.with_name(REWARDS_NAME))
            except ConfigError as e:  # a full disk
                logger.warning("the rewards are not kept: %s", e)
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None
        if self.baseline is not None and len(self.rewards):
            try:
                plot_rewards(self.baseline, self.rewards.rewards, self._jsonl.path.with_name("rewards.png"))
            except ConfigError as e:  # a picture less: no matplotlib, a full disk
                logger.warning("no picture of the rewards: %s", e)
        self._jsonl = None

    @property
    def status(self) -> Status:
        """The status of the last window; NO_DATA before the first."""
        return self.verdicts[-1].status if self.verdicts else Status.NO_DATA

    # ---- a loop of one's own ----------------------------------------------------------------------------------

    def log_step(
        self,
        step: int,
        *,
        rollout_logprobs: torch.Tensor,
        trainer_logprobs: torch.Tensor,
        mask: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
        rewards: Iterable[float] | None = None,
    ) -> Verdict:
        """Measure and judge one batch as one window.

        All tensors (B, T), nats, of the tokens that were sampled: the engine's log-probs, the trainer's for the same
        tokens in the same contexts, which tokens count (default: all), the trainer's exact entropy (default: not
        known). ``rewards``: one per sequence, of all ranks.
        """
        import torch

        from ..errors import DataError

        shapes = {
            name: tuple(x.shape)
            for name, x in (
                ("rollout_logprobs", rollout_logprobs),
                ("trainer_logprobs", trainer_logprobs),
                ("mask", mask),
                ("entropy", entropy),
            )
            if x is not None
        }
        if len(set(shapes.values())) != 1 or len(shapes["rollout_logprobs"]) != 2:
            raise DataError(f"step {step}: shapes are {shapes}. Expected one (sequences, tokens) shape for all.")
        scored = ScoredBatch(
            mask=torch.ones_like(rollout_logprobs, dtype=torch.bool) if mask is None else mask.bool(),
            rollout_logprobs=rollout_logprobs,
            trainer_logprobs=trainer_logprobs,
            own_logprobs=trainer_logprobs,
            entropy=entropy,
        )
        sums = self.measure(scored, 0 if self._accelerator is None else self._accelerator.process_index)
        self.add_rewards(sums, [] if rewards is None else list(rewards))
        if self._accelerator is not None:
            sums = reduce_sums(sums, self._accelerator)
        verdict = self.judge(step, self.scalars(compute(sums), new_window=True))
        text = f"{verdict.status} at step {step}: {verdict.reason}"
        self.alert(verdict, text)
        for sink in self.sinks:
            sink.log(step, {f"parity/{name}": x for name, x in (verdict.stats or {}).items() if x is not None})
        return verdict

    def summary(self, n: int = 10) -> dict[str, Any]:
        """The last ``n`` windows in short: status counts, mean and largest k3 KL, mean reward, steps alerted at."""
        last = list(self.verdicts)[-n:]

        def measured(name: str) -> list[float]:
            return [x for v in last if v.stats is not None and (x := v.stats.get(name)) is not None]

        kl, reward = measured("kl_k3"), measured("reward/mean")
        return {
            "status": str(self.status),
            "windows": len(last),
            "statuses": dict(Counter(str(v.status) for v in last)),
            "kl_k3": {"mean": statistics.fmean(kl), "max": max(kl)} if kl else None,
            "reward_mean": statistics.fmean(reward) if reward else None,
            "alerts": [{"step": v.step, "level": v.alert} for v in last if v.alert],
        }

    # ---- windows ----------------------------------------------------------------------------------------------

    def measure(self, scored: ScoredBatch, rank: int) -> MismatchSums:
        """The sums of one batch of this rank."""
        # numbered over batches and ranks; a prime stride keeps the ranks' numbers apart in the resampling pool
        first = self._sequences + rank * 1009
        sums = measure(scored, bootstrap_samples=self.config.bootstrap_samples, first_sequence=first)
        self._sequences += len(scored.mask)
        return sums

    def add_rewards(self, sums: MismatchSums, rewards: list[float]) -> None:
        """Take in a batch's rewards (of all ranks, the same on each)."""
        if finite := self.rewards.extend(rewards):
            sums.bump(rewards=len(finite), reward_sum=sum(finite))

    def scalars(self, stats: MismatchStats, *, new_window: bool = False) -> MismatchStats:
        """A window's statistics with noise floor, excess, entropy watch and reward comparison added."""
        if new_window:
            self.entropy.update(stats.get("entropy/trainer"))
        extra = self.floor.scalars(stats.values_by_name) | self.entropy.scalars()
        for reading in self.breaker.readings(stats.values_by_name | extra):
            if (name := f"limit/{reading.rule.stat}") in SCALARS and reading.seen.startswith("excess/"):
                extra[name] = reading.limit
        if self.baseline is not None:
            comparison = self.baseline.compare(self.rewards.rewards)
            if comparison is not None:
                extra |= {
                    "reward/effect_size": comparison.effect_size,
                    "reward/ks": comparison.ks,
                    "reward/p_value": comparison.p_value,
                    "reward/parted": float(comparison.parted(self.config.reward_min_effect, _REWARD_ALPHA)),
                }
        return stats.updated(extra)

    def doubts_floor(self, stats: MismatchStats) -> bool:
        """Whether an older floor should be measured anew before this window is judged.

        So before a rule that rests on it breaches (until the run is halted), or begins an episode with a WARN.
        """
        if not self.floor.age or self.status is Status.HALT:
            return False
        resting = [r for r in self.breaker.readings(stats.values_by_name) if r.rule.k is not None]
        return any(r.over or (r.warns and not self.breaker.alerted) for r in resting)

    def judge(self, step: int, stats: MismatchStats | None, error: str = "") -> Verdict:
        """The verdict on a window's (reduced) statistics; kept and written."""
        verdict = self.breaker.judge(step, stats, error)
        self.verdicts.append(verdict)
        self.floor.age += 1
        if self._jsonl is not None:
            self._jsonl.write(verdict)
        return verdict

    def log_rich(self, rich: RichLog) -> None:
        """Histogram and tables of a window to the trackers; its sample of tokens to ``tokens.jsonl``."""
        if self._tokens is not None and rich.sample:
            self._tokens.write_tokens(rich.verdicts[-1], rich.sample)
        for sink in self.sinks:
            sink.log_rich(rich)

    def write_run(self, about: Mapping[str, Any]) -> None:
        """What the run ran on, as ``run.json`` beside the windows. A failure is a warning."""
        if self._jsonl is None:
            return
        try:
            content = json.dumps(jsonable({"schema_version": 1, **about}), indent=1, allow_nan=False)
            write_atomic(self._jsonl.path.with_name(RUN_NAME), content)
        except (ConfigError, ValueError) as e:
            logger.warning("%s was not written: %s", RUN_NAME, e)

    def alert(self, verdict: Verdict, text: str) -> None:
        """Tell people through the trackers, if this window is the first of its episode to reach WARN or HALT."""
        if verdict.alert:
            for sink in self.sinks:
                sink.alert(verdict, text)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON."""
        return {
            "state_version": STATE_VERSION,
            "breaker": self.breaker.state(),
            "floor": self.floor.state(),
            "entropy": self.entropy.state(),
            "rewards": self.rewards.state(),
            "sequences": self._sequences,
        }

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
        self.floor.load_state(state["floor"])
        self.entropy.load_state(state["entropy"])
        self.rewards.load_state(state["rewards"])
        self._sequences = int(state["sequences"])
        return True


def _checked_floor(floor: Mapping[str, float]) -> Mapping[str, float]:
    unknown = sorted(set(floor) - set(FLOORED))
    if unknown:
        raise ConfigError(f"floor names {', '.join(unknown)}. Expected any of: {', '.join(FLOORED)}.")
    return floor
