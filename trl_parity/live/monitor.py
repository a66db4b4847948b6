"""``ParityMonitor``: what judges a run, window by window, whoever measured it.

``ParityCallback`` feeds it from a TRL trainer; any other loop calls ``ParityMonitor.log_step``.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.parity import ParityConfig
from ..errors import ConfigError
from ..metrics.scalars import FLOORED
from ..metrics.sums import MismatchSums
from ..records import ScoredBatch
from ..report.outcome import window_in_words
from ..verdict import Verdict
from .judge import RunJudge
from .pipeline import Pipeline, Surroundings

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

__all__ = ["ParityMonitor"]


class ParityMonitor(RunJudge):
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
        super().__init__(ParityConfig.of(config, overrides, where="ParityMonitor"), measured_floor=False)
        self._accelerator = accelerator
        surroundings = Surroundings()
        surroundings.accelerator = accelerator
        self._pipeline = Pipeline(self, surroundings)
        self.floor.values |= {f"floor/{stat}": value for stat, value in _checked_floor(floor or {}).items()}
        if opened and (accelerator is None or accelerator.is_main_process):
            self.open(output_dir, report_to)

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
        window = self._pipeline.window
        sums = MismatchSums.zeros(rollout_logprobs.device, self.config.bootstrap_samples)
        with self.stages("sums"):
            sums = self.sums_of(scored, 0 if self._accelerator is None else self._accelerator.process_index)
        with self.stages("rewards"):
            self.add_rewards(sums, [] if rewards is None else list(rewards))
        window.add(sums, "", self.stages)
        verdict = self._pipeline.close_window(step)
        scalars = {f"parity/{name}": x for name, x in (verdict.stats or {}).items() if x is not None}
        self.tell(lambda sink: sink.tell(window_in_words(verdict, self.course)))
        self.tell(lambda sink: sink.log(step, scalars))
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


def _checked_floor(floor: Mapping[str, float]) -> Mapping[str, float]:
    unknown = sorted(set(floor) - set(FLOORED))
    if unknown:
        raise ConfigError(f"floor names {', '.join(unknown)}. Expected any of: {', '.join(FLOORED)}.")
    return floor
