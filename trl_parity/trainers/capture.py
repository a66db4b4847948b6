"""One generation batch as every tap hands it over: what differs between trainers is abstract, the rest is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from ..records import RolloutBatch, SamplingSettings, ScoredBatch
from ..scoring.scorer import CompletionScorer, CompletionScores

if TYPE_CHECKING:
    from ..engine.base import Engine
    from ..engine.cache_stats import CacheUse
    from ..engine.requests import Request

__all__ = ["Capture", "MeasurementSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementSettings:
    """What an observer wants measured, and how the trainer's log-probs are computed."""

    replay_sampling: bool = True  # the engine's truncation, on the trainer's logits
    chunk_bytes: int = 64 << 20  # of logits held at once
    head_backend: str = "auto"
    probe_tokens: int = 0  # wanted of an asynchronous engine right after each weight sync
    evaluation: bool = True  # rollouts of evaluation, too


class Capture(ABC):
    """One generation batch, just made. Nothing is computed before ``rollout`` and ``score`` are called.

    A tap fills ``output`` (the trainer's batch), ``requests``, ``batch_seconds`` and, where the trainer makes a pass
    over the policy anyway, ``scorer`` and ``pass_logprobs``.
    """

    sampling: SamplingSettings  # what the engine was asked for
    step: int  # optimizer steps done
    last_in_step: bool  # no further generation before the next optimizer step
    generation_period: int  # optimizer steps that one generation batch feeds

    def __init__(self, trainer: Any, observer: Any, training: bool):
        self.trainer = trainer
        self.training = training
        self._observer = observer
        self.output: dict[str, Any] = {}
        self.scorer: CompletionScorer | None = None  # open during the trainer's own pass
        self.pass_logprobs: torch.Tensor | None = None  # (B, C) of the trainer's own head, from that pass
        self.requests: list[Request] = []  # what was really sent, and until it is measured what came back
        self.batch_seconds = 0.0  # host seconds that generating and scoring took the trainer

    @abstractmethod
    def rollout(self) -> RolloutBatch:
        """What the engine handed over. Raises InterceptionError without log-probs, DataError on contradictions."""

    @abstractmethod
    def rewards(self) -> list[float]:
        """Rewards of this batch over all ranks, the same on each; NaN where none was given."""

    @abstractmethod
    def run_policy(
        self, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None = None
    ) -> torch.Tensor:
        """The trainer's own no-grad pass over given sequences: log-probs (B, keep) of its own head."""

    @abstractmethod
    def log(self, values: dict[str, float]) -> None:
        """Put scalars where the trainer's ``log`` picks them up for every reporter, over what is there by the name."""

    @property
    def generation(self) -> Any:
        """TRL's VLLMGeneration, or what stands for it; None: the trainer samples by itself."""
        return self.trainer.vllm_generation

    @property
    def engine(self) -> Engine | None:
        """The run's handle on the engine behind it; None where there is none to be asked from this rank."""
        return self._observer.engine_handle.get(self.generation)

    def refreshed_engine(self) -> Engine | None:
        """As ``engine``, with a server's settings read anew: one short request."""
        return self._observer.engine_handle.refreshed(self.generation)

    @property
    def policy(self) -> Any:
        """The policy without wrappers of distribution."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def temperature(self) -> float:
        """What the trainer's loss divides logits by."""
        return self.trainer.temperature

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the trainer's forward computes in: mixed precision, else the dtype of its weights."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.trainer.accelerator.mixed_precision)
        return mixed or next(p.dtype for p in self.policy.parameters() if p.is_floating_point())

    @property
    def sharded(self) -> bool:
        """Whether the policy's weights may be spread over ranks, so that a pass over it is a collective."""
        return self.trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def seconds(self) -> float:
        """Host seconds the scoring took inside the trainer's own pass."""
        return 0.0 if self.scorer is None else self.scorer.seconds

    @property
    def engine_temperatures(self) -> list[float]:
        """The temperature of each call the engine got, from what was really sent."""
        return [request.temperature for request in self.requests if request.temperature is not None]

    @property
    def cache_uses(self) -> list[CacheUse]:
        """What its requests did to the engine's caches, as far as that is known."""
        return [request.cache_use for request in self.requests if request.cache_use is not None]

    def new_scorer(self, logits_to_keep: int, logits_dtype: torch.dtype | None = None) -> CompletionScorer:
        """A scorer of one pass over the policy."""
        settings = self._observer.measurement
        return CompletionScorer(
            self.policy,
            logits_to_keep,
            temperature=self.temperature,
            sampling=self.sampling,
            replay_sampling=settings.replay_sampling,
            chunk_bytes=settings.chunk_bytes,
            backend=settings.head_backend,
            logits_dtype=logits_dtype,
        )

    def score(self, rollout: RolloutBatch, token_budget: int) -> ScoredBatch:
        """The trainer's scores, from its own pass where it made one, else from a forward over sampled rows."""
        rows: Any = slice(None)
        if rollout.own_logprobs is not None and self.scorer is not None:
            scores, own = self.scorer.scores(), rollout.own_logprobs
        else:
            rows = self.rows_within(rollout, token_budget)
            scores, own = self.forward(rollout, rows)
        mask, stale = rollout.engine_mask[rows], None
        lags, in_flight = (None if x is None else x[rows] for x in (rollout.lags, rollout.in_flight))
        if lags is not None:  # what older weights generated differs by rights: only the rest is a mismatch
            mask, stale = mask & (lags == 0)[:, None], mask & (lags != 0)[:, None]
        return ScoredBatch(
            mask=mask,
            rollout_logprobs=rollout.rollout_logprobs[rows],
            trainer_logprobs=scores.logprobs,
            own_logprobs=own,
            entropy=scores.entropy,
            law_entropy=scores.law_entropy,
            log_kept=scores.log_kept,
            out_of_support=scores.out_of_support,
            rows=None if isinstance(rows, slice) else rows,
            lag=rollout.lag,
            lags=lags,
            in_flight=in_flight,
            stale=stale,
            probe=rollout.probe,
            correction_weights=None if rollout.correction_weights is None else rollout.correction_weights[rows],
        )

    def rows_within(self, rollout: RolloutBatch, token_budget: int) -> torch.Tensor:
        """Rows of the batch, evenly spaced, that fit the budget (at least one); another set from step to step."""
        width = rollout.prompt_ids.shape[1] + rollout.completion_ids.shape[1]
        device, total = rollout.prompt_ids.device, len(rollout.prompt_ids)
        count = min(total, max(1, token_budget // width))
        if self.sharded:  # a sharded model's forward is a collective: every rank must run as many rows
            count = int(self.trainer.accelerator.gather(torch.tensor([count], device=device)).min())
        return (torch.arange(count, device=device) * total // count + self.step) % total

    def forward(
        self,
        rollout: RolloutBatch,
        rows: torch.Tensor,
        *,
        batch_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> tuple[CompletionScores, torch.Tensor]:
        """Scores of some rows and the own head's log-probs, from a no-grad pass made the way the trainer makes its."""
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)[rows]
        attention = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[rows]
        keep = rollout.completion_ids.shape[1]
        with self.new_scorer(keep, logits_dtype) as scorer:
            own = self.run_policy(ids, attention, keep, batch_size)
        return scorer.scores(), own
