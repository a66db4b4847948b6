"""From a GRPOTrainer with vLLM to rollout batches. Written against TRL 1.16; private names used:

GRPOTrainer: ``_generate_and_score_completions``, ``_get_per_token_logps_and_entropies``, ``_compute_loss``,
``_metrics``, ``_logs``, ``_step``, ``_last_loaded_step``, ``vllm_generation`` (attributes of VLLMGeneration).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from ..engine.live import Request, recorded_requests
from ..errors import InterceptionError
from ..lint import UNREPLAYED
from ..records import RolloutBatch, SamplingSettings, ScoredBatch
from . import instrumentation

if TYPE_CHECKING:
    from ..recompute import CompletionScorer, CompletionScores

PRIVATE_NAMES = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies", "_compute_loss")
_ACTIVE = "_trl_parity_capture"
_LOSS = "_trl_parity_loss"


def wrappers() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """(class, method name, wrapper taking the original first) for everything that is instrumented."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    around: tuple[Callable[..., Any], ...] = (_around_generation, _around_scoring, _around_loss)
    for name, wrapper in zip(PRIVATE_NAMES, around, strict=True):
        if not hasattr(GRPOTrainer, name):
            raise InterceptionError(
                f"trl.GRPOTrainer has no method {name!r}: this TRL moved it. Pin a tested version (see the warning)."
            )
        yield GRPOTrainer, name, wrapper


def _around_generation(original: Callable[..., Any], trainer: Any, inputs: Any) -> Any:
    observer = instrumentation.observer_of(trainer)
    training = bool(trainer.model.training)
    if observer is None or not observer.observes(training):
        return original(trainer, inputs)
    require_interceptable(trainer)
    capture = GRPOCapture(trainer, observer, training)
    setattr(trainer, _ACTIVE, capture)
    try:
        start = time.perf_counter()
        with recorded_requests(trainer.vllm_generation) as capture.requests:
            capture.output = original(trainer, inputs)
        capture.batch_seconds = time.perf_counter() - start - capture.seconds
    finally:
        delattr(trainer, _ACTIVE)
    try:
        observer.on_generation(capture)
    finally:
        capture.requests = [replace(request, outputs=None) for request in capture.requests]  # many small objects
    return capture.output


def _around_scoring(
    original: Callable[..., Any],
    trainer: Any,
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    def run() -> Any:
        return original(trainer, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    capture: GRPOCapture | None = getattr(trainer, _ACTIVE, None)
    # Only the first pass over the policy can be the one behind old_per_token_logps; later ones are reference passes.
    if capture is not None and capture.scorer is None and model is trainer.model:
        capture.scorer = capture.new_scorer(logits_to_keep)
        with capture.scorer:
            result = run()
        capture.pass_logprobs = result[0]
        return result
    loss = getattr(trainer, _LOSS, None)
    result = run()
    if loss is not None:
        observer, old, mask = loss
        observer.on_update(result[0].detach(), old, mask)
    return result


def _around_loss(original: Callable[..., Any], trainer: Any, model: Any, inputs: dict[str, Any]) -> Any:
    observer = instrumentation.observer_of(trainer)
    old = inputs.get("old_per_token_logps")
    if observer is None or old is None or not trainer.model.training:
        return original(trainer, model, inputs)
    mask = inputs["completion_mask"]
    setattr(trainer, _LOSS, (observer, old, mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]))
    try:
        return original(trainer, model, inputs)
    finally:
        delattr(trainer, _LOSS)


def require_interceptable(trainer: Any) -> None:
    """Raise :class:`InterceptionError` when this trainer's rollouts can't be measured, before any is generated."""
    if not trainer.use_vllm:
        raise InterceptionError(
            "the trainer generates with transformers (use_vllm=False), so there is no engine to compare with. Set "
            "use_vllm=True (and vllm_mode='colocate' or 'server'), or remove ParityCallback."
        )
    generation = trainer.vllm_generation
    if generation.logprobs is None:
        raise InterceptionError(
            "the engine is asked for no log-probs (vllm_generation.logprobs is None). Set "
            "trainer.vllm_generation.logprobs = 0 before trainer.train()."
        )
    if generation.mode == "colocate" and not getattr(generation, "_trl_parity_checked", False):
        from ..engine.cpu import require_live_weights

        require_live_weights(generation.llm)
        generation._trl_parity_checked = True


def sampling_settings(trainer: Any) -> SamplingSettings:
    """What the next requests ask the engine for: TRL's arguments with ``generation_kwargs`` laid over them."""
    generation = trainer.vllm_generation
    extra = generation.generation_kwargs
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: extra.get(name, getattr(generation, name)) for name in names}
    values |= {name: extra.get(name, 0.0) for name in ("presence_penalty", "frequency_penalty")}
    values = {name: 0.0 if value is None else value for name, value in values.items()}  # TRL: min_p=None is off
    unreplayed = [name for name in UNREPLAYED if extra.get(name)]
    if generation.structured_outputs_regex is not None and "structured_outputs" not in unreplayed:
        unreplayed.append("structured_outputs")
    return SamplingSettings(**values, unreplayed=tuple(unreplayed))


def append_metrics(trainer: Any, mode: str, values: dict[str, float]) -> None:
    """Put scalars where ``trainer.log`` picks them up for every reporter: one value a key, so nothing is averaged."""
    for name, value in values.items():
        trainer._metrics[mode][name] = [value]


class GRPOCapture:
    """One generation batch of a GRPOTrainer; see :class:`trl_parity.taps.instrumentation.Capture`."""

    def __init__(self, trainer: Any, observer: Any, training: bool):
        args = trainer.args
        generate_every = args.steps_per_generation * trainer.num_iterations  # micro-batches per generation
        accumulate = args.gradient_accumulation_steps
        self.trainer = trainer
        self.training = training
        self.step = int(trainer.state.global_step)
        self.last_in_step = trainer._step % accumulate + generate_every >= accumulate
        self.generation_period = -(-generate_every // accumulate)
        self.output: dict[str, Any] = {}
        self.scorer: CompletionScorer | None = None
        self.pass_logprobs: torch.Tensor | None = None
        self.requests: list[Request] = []
        self.batch_seconds = 0.0
        self._observer = observer
        self.sampling = sampling_settings(trainer)

    @property
    def sharded(self) -> bool:
        """Whether the policy's weights may be spread over ranks, so that a pass over it is a collective."""
        return self.trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def seconds(self) -> float:
        """Host seconds the scoring took inside TRL's own pass."""
        return 0.0 if self.scorer is None else self.scorer.seconds

    @property
    def engine_temperatures(self) -> list[float]:
        """The temperature of each call the engine got, from what was really sent."""
        return [request.temperature for request in self.requests if request.temperature is not None]

    def rewards(self) -> list[float]:
        """Weighted sums of this batch's rewards over all ranks, as TRL logs them; NaN where no function gave one."""
        trainer = self.trainer
        logged = [list(trainer._logs["rewards"][name]) for name in trainer.reward_func_names]
        by_function = torch.tensor(logged, dtype=torch.float64)[:, -self._global_batch() :]
        weights = trainer.reward_weights.to("cpu", torch.float64).unsqueeze(-1)
        total = (by_function * weights).nansum(0)
        return torch.where(by_function.isnan().all(0), torch.nan, total).tolist()

    def _global_batch(self) -> int:
        return len(self.output["completion_ids"]) * self.trainer.accelerator.num_processes

    def new_scorer(self, logits_to_keep: int, logits_dtype: torch.dtype | None = None) -> CompletionScorer:
        """A scorer of one pass over the policy."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return self._observer.scorer(model, logits_to_keep, self.trainer.temperature, self.sampling, logits_dtype)

    def rollout(self) -> RolloutBatch:
        """What the engine handed over. Raises InterceptionError without log-probs, DataError on contradictions."""
        out = self.output
        if out.get("sampling_per_token_logps") is None:
            raise InterceptionError(
                f"the rollout of step {self.step} came without log-probs. vLLM must return the sampled token's "
                "log-prob; a rollout_func must fill 'logprobs' with one list of floats per completion."
            )
        own = out.get("old_per_token_logps")
        mask = out["completion_mask"]
        return RolloutBatch(
            prompt_ids=out["prompt_ids"],
            prompt_mask=out["prompt_mask"],
            completion_ids=out["completion_ids"],
            completion_mask=mask,
            engine_mask=(mask if "tool_mask" not in out else mask * out["tool_mask"]).bool(),
            rollout_logprobs=out["sampling_per_token_logps"],
            own_logprobs=own if own is not None and own is self.pass_logprobs else None,
            sampling=self.sampling,
            trainer_temperature=self.trainer.temperature,
            step=self.step,
            sync_step=int(self.trainer._last_loaded_step),
            training=self.training,
            last_in_step=self.last_in_step,
        )

    def score(self, rollout: RolloutBatch, token_budget: int) -> ScoredBatch:
        """The trainer's scores, from TRL's own pass where it made one, else from a forward over sampled rows."""
        rows: Any = slice(None)
        if rollout.own_logprobs is not None and self.scorer is not None:
            scores, own = self.scorer.scores(), rollout.own_logprobs
        else:
            rows = self.rows_within(rollout, token_budget)
            scores = self.forward(rollout, rows)
            own = self.own_logprobs
        return ScoredBatch(
            mask=rollout.engine_mask[rows],
            rollout_logprobs=rollout.rollout_logprobs[rows],
            trainer_logprobs=scores.logprobs,
            own_logprobs=own,
            entropy=scores.entropy,
            law_entropy=scores.law_entropy,
            log_kept=scores.log_kept,
            out_of_support=scores.out_of_support,
            rows=None if isinstance(rows, slice) else rows,
            lag=rollout.lag,
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
    ) -> CompletionScores:
        """Scores of some rows from a no-grad pass of our own, the way TRL makes its own; also ``own_logprobs``."""
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)[rows]
        attention = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[rows]
        keep = rollout.completion_ids.shape[1]
        with self.new_scorer(keep, logits_dtype) as scorer:
            self.own_logprobs = self.run_policy(ids, attention, keep, batch_size)
        return scorer.scores()

    def run_policy(
        self, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None = None
    ) -> torch.Tensor:
        """The trainer's own no-grad pass over given sequences: log-probs (B, keep) of its own head."""
        from trl.models.utils import disable_gradient_checkpointing

        trainer, args = self.trainer, self.trainer.args
        if "pixel_values" in self.output:
            raise InterceptionError(
                "image prompts are measured only on TRL's own pass. Set vllm_importance_sampling_correction=True."
            )
        size = batch_size or (args.per_device_train_batch_size if self.training else args.per_device_eval_batch_size)
        score = instrumentation.original(type(trainer), PRIVATE_NAMES[1])
        model = trainer.model
        if not self.sharded:  # DDP's own forward may sync buffers over ranks, and ranks may run different passes here
            model = trainer.accelerator.unwrap_model(model)
        with torch.no_grad(), disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs):
            return score(trainer, model, ids, attention, keep, batch_size=size)[0]
