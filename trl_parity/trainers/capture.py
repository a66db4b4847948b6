"""One generation batch as every tap hands it over: what differs between trainers is abstract, the rest is here."""

from __future__ import annotations

import logging
import math
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from ..engine.pictures import Pictured, Pictures
from ..records import RolloutBatch, SamplingSettings, ScoredBatch
from ..scoring.device_seconds import wait_for_device
from ..scoring.model_head import backbone_of
from ..scoring.own_head import OwnHeadRounding
from ..scoring.perturb import own_random_numbers
from ..scoring.scorer import CompletionScorer, CompletionScores
from ..scoring.token_sample import TokenSample
from .own_numbers import behind
from .plain_pass import run_backbone
from .row_keys import keys_of
from .some_rows import rows_within, spread

if TYPE_CHECKING:
    from ..engine.base import Engine
    from ..engine.cache_stats import CacheUse
    from ..engine.requests import Request

__all__ = ["Capture", "MeasurementSettings"]

logger = logging.getLogger(__name__)

_policies: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()  # by what is around them


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementSettings:
    """What an observer wants measured, and how the trainer's log-probs are computed."""

    replay_sampling: bool = False  # judged is the trainer's side with the engine's truncation and penalties
    chunk_bytes: int = 64 << 20  # of logits held at once
    head_backend: str = "auto"
    probe_tokens: int = 0  # wanted of an asynchronous engine right after each weight sync
    evaluation: bool = True  # rollouts of evaluation, too
    least_tokens: int = 4096  # of a batch that the fp32 head scores where a sample is enough


class Capture(ABC):
    """One generation batch, just made. Nothing is computed before ``rollout`` and ``score`` are called.

    A tap fills ``output`` (the trainer's batch), ``requests``, ``batch_seconds`` and, where the trainer makes a pass
    over the policy anyway, ``scorer`` and ``pass_logprobs``.
    """

    sampling: SamplingSettings  # what the engine was asked for
    step: int  # optimizer steps done
    last_in_step: bool  # no further generation before the next optimizer step
    micro_batches: int  # that this batch feeds, of a trainer that accumulates gradients over some
    failure: Exception | None = None  # of ours while the trainer worked; the batch can't be measured

    def __init__(self, trainer: Any, observer: Any, training: bool):
        self.trainer = trainer
        self.training = training
        self._observer = observer
        self.output: dict[str, Any] = {}
        self.scorer: CompletionScorer | None = None  # open during the trainer's own pass
        self.pass_logprobs: torch.Tensor | None = None  # (B, C) of the trainer's own head, from that pass
        self.requests: list[Request] = []  # what was really sent, and until it is measured what came back
        self.batch_seconds = 0.0  # host seconds that generating and scoring took the trainer

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What fails of ours in here, while the trainer works, never reaches it: it is the batch's ``failure``."""
        try:
            yield
        except Exception as e:
            self.failure = self.failure or e

    @abstractmethod
    def rollout(self) -> RolloutBatch:
        """What the engine handed over. Raises InterceptionError without log-probs, DataError on contradictions."""

    @abstractmethod
    def rewards(self) -> list[float]:
        """Rewards of this batch over all ranks, the same on each; NaN where none was given."""

    def reward_prompts(self) -> list[int] | None:
        """For each of ``rewards`` a number that is the same for completions of one prompt; None: each has its own."""
        return None

    def stopped(self) -> dict[str, float]:
        """By name of ``BUMPED``: completions the engine ended by itself, and those of them masked as truncated.

        Empty where that is not known, or nothing is masked.
        """
        return {}

    def start_of_reference(self) -> dict[str, float]:
        """By name of ``BUMPED``: tokens with a log-prob of the reference, and Σ k3 of it against the policy."""
        return {}

    @abstractmethod
    def run_policy(
        self, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None = None, **images: Any
    ) -> torch.Tensor:
        """The trainer's own no-grad pass over sequences, and ``image_inputs``: log-probs (B, keep) of its own head."""

    def image_inputs(self, rows: torch.Tensor, width: int, keep: int) -> dict[str, Any]:
        """The trainer's arguments for pictures in these rows' prompts, in a pass that is ``width`` wide with ``keep``
        tokens of the completion; empty: there are none."""
        return {}

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
        wrapped = self.trainer.model
        known = _policies.get(wrapped)
        policy = None if known is None else known()
        if policy is None:  # accelerate walks through all modules to find it
            policy = self.trainer.accelerator.unwrap_model(wrapped)
            _policies[wrapped] = weakref.ref(policy)
        return policy

    @property
    def replayed(self) -> bool:
        """Whether the trainer's side is judged with the engine's truncation and penalties, as asked for."""
        return self._observer.measurement.replay_sampling

    @property
    def _replays(self) -> bool:
        """Whether there is any, and it is."""
        return self.replayed and (self.sampling.truncates or self.sampling.penalizes)

    def ends_step(self) -> bool:
        """Whether no further generation comes before the next optimizer step. Needs ``micro_batches``."""
        trainer = self.trainer
        return self.training and (
            trainer.accelerator.sync_gradients  # the update comes right after this micro-batch
            or self.micro_batches >= trainer.current_gradient_accumulation_steps - self._observer.accumulated
        )

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
        """What the scoring took inside the trainer's own pass.

        Waits for a GPU: what it is busy with until then is the trainer's, and nobody counts it as ours.
        """
        wait_for_device()
        return 0.0 if self.scorer is None else self.scorer.seconds

    @property
    def engine_temperatures(self) -> list[float]:
        """The temperature of each call the engine got, from what was really sent."""
        return [request.temperature for request in self.requests if request.temperature is not None]

    @property
    def pictures(self) -> Sequence[Pictures | None] | None:
        """By row what a colocated engine was handed beside ids; None: nothing, or not by one request a row."""
        found = self.requests[0].pictures if len(self.requests) == 1 else None
        return found if found is not None and len(found) == len(self.output["completion_ids"]) else None

    def for_engine(self, row: int, ids: list[int]) -> list[int]:
        """The ids of a sequence that begins with this row's prompt, with the row's pictures."""
        pictures = None if self.pictures is None else self.pictures[row]
        return ids if pictures is None else Pictured(ids, pictures)

    @property
    def cache_uses(self) -> list[CacheUse]:
        """What its requests did to the engine's caches, as far as that is known."""
        return [request.cache_use for request in self.requests if request.cache_use is not None]

    def new_scorer(
        self,
        logits_to_keep: int,
        logits_dtype: torch.dtype | None = None,
        *,
        compared: bool = True,
        tokens: torch.Tensor | int | None = None,
    ) -> CompletionScorer:
        """A scorer of one pass over the policy.

        ``compared``: with the engine's numbers, under both laws, and with those of the trainer's own head. Else of the
        judged law alone. ``tokens``: how many the pass has, where a sample of them may be enough.
        """
        settings = self._observer.measurement
        return CompletionScorer(
            self.policy,
            logits_to_keep,
            temperature=self.temperature,
            sampling=self.sampling,
            replay_sampling=self.replayed or compared,
            chunk_bytes=settings.chunk_bytes,
            backend=settings.head_backend,
            logits_dtype=logits_dtype,
            rounding=OwnHeadRounding.of(self.policy) if compared else None,
            sample=None if tokens is None else self._sample(tokens),
        )

    def _sample(self, tokens: torch.Tensor | int) -> TokenSample | None:
        """Which of so many tokens of this batch the fp32 head scores; None: all.

        Replayed processing is judged by all: the own head, which knows none of it, says little of the rest.
        """
        share = self._observer.head_share
        if self._replays or share >= 1 or not self.training:
            return None
        rank, least = int(self.trainer.accelerator.process_index), self._observer.measurement.least_tokens
        return TokenSample.of(share, int(tokens), least, seed=(self.step << 16) + rank)  # waits for the device

    def score_all(self, rollout: RolloutBatch) -> ScoredBatch:
        """The scores of all its tokens, from a pass of ours over the batch where the trainer's was scored in part."""
        self.scorer = None
        return self.score(rollout, sys.maxsize)

    def score(self, rollout: RolloutBatch, token_budget: int) -> ScoredBatch:
        """The trainer's scores, from its own pass where it made one, else from a forward over sampled rows.

        ``own_logprobs`` are those the trainer has, where it has any. Where the pass that was watched is not what made
        them, they are all there is to judge.
        """
        rows: Any = slice(None)
        own, scorer = rollout.own_logprobs, self.scorer
        scores: CompletionScores | None
        if own is None or scorer is None:
            rows = rows_within(self, rollout, token_budget)
            scores, again = self.forward(rollout, rows, compared=True)
            own = again if own is None else self._or_again(rollout, own, again, rows)
        elif rollout.loss_mask is not None and scorer.ran:
            rows, scores, own = self._with_what_the_loss_leaves_out(rollout, scorer.scores(), own, token_budget)
        else:
            scores = scorer.scores() if scorer.ran else None
        mask, stale = rollout.engine_mask[rows], None
        scores = behind(self.trainer, self.policy, scores, own, mask, replays=self._replays)
        replayed = None if scores is None or scores.log_kept is None else scores.logprobs
        if scores is not None and not self.replayed:  # the loss has the plain law
            scores = scores._replace(logprobs=scores.plain, law_entropy=scores.entropy)
        weights = None if scores is None else scores.weights
        if scores is not None and weights is not None:
            left_out = weights == 0
            scores = scores._replace(
                logprobs=torch.where(left_out, own.to(scores.logprobs), scores.logprobs),
                entropy=scores.entropy.masked_fill(left_out, math.nan),
                law_entropy=scores.law_entropy.masked_fill(left_out, math.nan),
            )
        lags, in_flight = (None if x is None else x[rows] for x in (rollout.lags, rollout.in_flight))
        if lags is not None:  # what older weights generated differs by rights: only the rest is a mismatch
            mask, stale = mask & (lags == 0)[:, None], mask & (lags != 0)[:, None]
        keys, prompts = keys_of(rollout)
        return ScoredBatch(
            mask=mask,
            rollout_logprobs=rollout.rollout_logprobs[rows],
            trainer_logprobs=own if scores is None else scores.logprobs,
            own_logprobs=own,
            entropy=None if scores is None else scores.entropy,
            law_entropy=None if scores is None else scores.law_entropy,
            log_kept=None if scores is None else scores.log_kept,
            out_of_support=None if scores is None else scores.out_of_support,
            replayed_logprobs=replayed,
            rows=None if isinstance(rows, slice) else rows,
            lag=rollout.lag,
            lags=lags,
            in_flight=in_flight,
            stale=stale,
            probe=rollout.probe,
            correction_weights=None if rollout.correction_weights is None else rollout.correction_weights[rows],
            weights=weights,
            keys=keys[rows],
            prompts=prompts[rows],
        )

    def _or_again(self, rollout: RolloutBatch, own: torch.Tensor, again: torch.Tensor, rows: Any) -> torch.Tensor:
        """The trainer's numbers of some rows; where its pass left tokens out, those of another pass over them."""
        if rollout.loss_mask is None:
            return own[rows]
        return torch.where(rollout.loss_mask[rows].bool(), own[rows].to(again), again)

    def _with_what_the_loss_leaves_out(
        self, rollout: RolloutBatch, scores: CompletionScores, own: torch.Tensor, token_budget: int
    ) -> tuple[Any, CompletionScores, torch.Tensor]:
        """Scores with those of rows that the trainer's pass did not see, from a pass of ours over them, and the rows.

        Those that came to an end are no fair sample of what the engine does: tokens that end a sequence are among
        them more often than the law says. So no more of these are kept than of the others can be passed again: a
        quarter of the batch, or the budget.
        """
        assert rollout.loss_mask is not None
        left_out = (rollout.completion_mask > rollout.loss_mask).any(-1)
        width = rollout.prompt_ids.shape[1] + rollout.completion_ids.shape[1]
        most = max(1, len(left_out) // 4, token_budget // width)
        some, others = (x.nonzero()[:, 0] for x in (left_out, ~left_out))
        picked = spread(some, min(len(some), most))
        rows = picked
        if self.sharded:  # every rank must run as many rows
            counts = self.trainer.accelerator.gather(torch.tensor([len(picked)], device=own.device))
            rows = torch.cat([picked, picked.new_zeros(int(counts.max()) - len(picked))])
        if not len(rows) or scores.plain.shape != own.shape:
            return slice(None), scores, own
        more, again = self.forward(rollout, rows, compared=True)
        if scores.weights is not None:
            more = more._replace(weights=torch.ones_like(more.plain))
        kept: Any = slice(None)
        if len(picked) < len(some):
            kept = torch.cat([picked, spread(others, len(others) * len(picked) // len(some))]).sort().values

        def merged(ours: Any, theirs: Any) -> Any:
            return None if ours is None else ours.index_copy(0, picked, theirs[: len(picked)].to(ours))[kept]

        return kept, CompletionScores(*map(merged, scores, more)), merged(own, again)

    def forward(
        self,
        rollout: RolloutBatch,
        rows: torch.Tensor,
        *,
        batch_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
        compared: bool = False,
    ) -> tuple[CompletionScores, torch.Tensor]:
        """Scores of some rows and the own head's log-probs, from a no-grad pass made the way the trainer makes its.

        It draws from random numbers of its own.
        """
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)[rows]
        attention = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[rows]
        keep = rollout.completion_ids.shape[1]
        with self.new_scorer(keep, logits_dtype, compared=compared) as scorer, own_random_numbers():
            scorer.engine_mask = rollout.engine_mask[rows]
            own = self.run_policy(ids, attention, keep, batch_size, **self.image_inputs(rows, ids.shape[1], keep))
            if not scorer.ran:  # what the trainer scores with is none of the policy
                run_backbone(self, backbone_of(self.policy), ids, attention, keep, rows, batch_size)
        return scorer.scores(), own
