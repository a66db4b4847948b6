"""From a rollout batch to the sums of one rank: what was measured, or that the measurement failed."""

from __future__ import annotations

import logging
import traceback

from ..collectives import together
from ..config.parity import ParityConfig
from ..errors import InterceptionError
from ..metrics.statistics import measure
from ..metrics.sums import MismatchSums
from ..metrics.trends import expected_temperature
from ..records import RolloutBatch, ScoredBatch
from ..trainers.capture import Capture
from .judge import RunJudge

__all__ = ["BatchSums"]

logger = logging.getLogger(__name__)


class BatchSums:
    """Measures rollout batches. ``last``: the last training batch and its scores; None where that failed."""

    def __init__(self, config: ParityConfig, judge: RunJudge):
        self._config, self._judge = config, judge
        self._phases = config.temperature_phases()
        self.reset()

    def reset(self) -> None:
        """A run begins."""
        self.last: tuple[RolloutBatch, ScoredBatch] | None = None
        self._began = False  # a training batch has been looked at
        self._told: set[str] = set()

    def of(self, capture: Capture) -> tuple[MismatchSums, str]:
        """The sums of one batch, and in words what failed.

        A failure of ours becomes ``errors=1``. Only an InterceptionError before any training batch is raised: then
        nothing was ever measured, which has to be said before any learning.
        """
        sums, error = self._mismatch(capture)
        self._began |= capture.training
        self._add_readings(capture, sums)
        return sums, error

    def _mismatch(self, capture: Capture) -> tuple[MismatchSums, str]:
        if capture.training:
            self.last = None
        accelerator, stages = capture.trainer.accelerator, self._judge.stages
        # passes over sharded weights are collectives: made by all ranks, or by none; and what is raised, is by all
        ranks = accelerator.num_processes if capture.sharded or not self._began else 1
        try:
            rollout = together(lambda: self._rollout(capture), ranks)
            stages.begins("scores")
            scored = capture.score(rollout, self._config.token_budget)
            stages.begins("sums")
            sums = self._judge.sums_of(scored, accelerator.process_index)
            if capture.training:  # an evaluation's is no batch to learn from, nor to diagnose
                self.last = (rollout, scored)
                if (scorer := capture.scorer) is not None:
                    sums.bump(head_seconds=scorer.seconds, head_seconds_for_all=scorer.seconds_for_all)
            return sums, ""
        except Exception as e:  # ours: a window of status ERROR, and training goes on
            refused = isinstance(e, InterceptionError) or getattr(e, "kind", "") == InterceptionError.__name__
            if refused and not self._began:  # on this rank, or on another
                raise InterceptionError(str(e)) from e
            error = f"{type(e).__name__}: {e}"
            logger.warning("parity measurement failed at step %d: %s", capture.step + 1, error)
            logger.debug("%s", traceback.format_exc())
            sums = MismatchSums.zeros(accelerator.device, self._config.bootstrap_samples)
            sums.bump(batches=1, errors=1)
            return sums, error

    def complete(self, capture: Capture) -> MismatchSums:
        """Score all tokens of the last batch; what that changes in its sums."""
        assert self.last is not None
        resamples, (rollout, sampled) = self._config.bootstrap_samples, self.last
        if sampled.weights is None and not capture.sharded:  # of another rank's batch
            return MismatchSums.zeros(capture.trainer.accelerator.device, resamples)
        scored = capture.score_all(rollout)
        self.last = (rollout, scored)
        sums = measure(scored, bootstrap_samples=resamples)
        sums.additive.sub_(measure(sampled, bootstrap_samples=resamples).additive)
        return sums

    def _rollout(self, capture: Capture) -> RolloutBatch:
        self._judge.stages.begins("rollout")
        if capture.failure is not None:
            raise capture.failure
        return capture.rollout()

    def _add_readings(self, capture: Capture, sums: MismatchSums) -> None:
        """Cache use, temperature and rewards of a batch; a failure there is a warning and no measurement."""
        with self._judge.stages("readings"):  # the mismatch is measured without them
            self._add_cache_use(capture, sums)
            self._check_temperature(capture, sums)
        with self._judge.stages("rewards"):
            if capture.training:
                self._judge.add_rewards(sums, capture.rewards(), capture.reward_prompts())
        with self._judge.stages("readings"):
            if capture.training:
                sums.bump(**capture.stopped(), **(capture.start_of_reference() if capture.step == 0 else {}))
                if (group := getattr(capture.trainer, "num_generations", None)) is not None:
                    sums.raise_to(group=group)

    def _add_cache_use(self, capture: Capture, sums: MismatchSums) -> None:
        """What the batch's requests did to the engine's caches."""
        for use in capture.cache_uses:
            sums.bump(cached_tokens=use.cached, looked_up_tokens=use.looked_up)
            if use.kv_usage is not None:
                sums.raise_to(kv_cache_usage=use.kv_usage)

    def _check_temperature(self, capture: Capture, sums: MismatchSums) -> None:
        """What the engine was really asked for, against the trainer and the phase's setting."""
        kind = "train" if capture.training else "eval"
        meant = expected_temperature(self._phases, kind, capture.step)
        for used in capture.engine_temperatures or [capture.sampling.temperature]:
            others = [meant] if meant is not None else []
            if capture.training:  # evaluation may sample as it likes: nothing is learned from it
                others.append(capture.temperature)
            gap = max((abs(used - other) for other in others), default=0.0)
            sums.bump(requests=1, temperature_engine=used, temperature_trainer=capture.temperature)
            sums.raise_to(temperature_gap=gap)
            if gap > 0 and not capture.training and kind not in self._told:
                self._told.add(kind)
                logger.warning("evaluation samples at temperature %g but temperatures.eval is %g", used, meant)
