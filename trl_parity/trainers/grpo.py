"""From a GRPOTrainer with vLLM to rollout batches. Written against TRL 1.16; private names used:

GRPOTrainer: ``_generate_and_score_completions``, ``_get_per_token_logps_and_entropies``, ``_compute_loss``,
``_metrics``, ``_logs``, ``_step``, ``_last_loaded_step``, ``vllm_generation`` (attributes of VLLMGeneration).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..engine.requests import recorded_requests
from ..errors import InterceptionError
from ..records import UNREPLAYED, RolloutBatch, SamplingSettings
from . import instrumentation
from .capture import Capture
from .instrumentation import Wrapper

PRIVATE_NAMES = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies", "_compute_loss")

_TRAINER = ("_metrics", "_logs", "_step", "reward_func_names", "reward_weights", "temperature", "num_iterations")

_WITH_VLLM = ("_last_loaded_step", "vllm_generation")

_GENERATION = (
    "mode", "logprobs", "generation_kwargs", "structured_outputs_regex", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "tensor_parallel_size", "enable_sleep_mode",
)  # fmt: skip

_ACTIVE = "_trl_parity_capture"

_LOSS = "_trl_parity_loss"


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    return wrappers_of(GRPOTrainer, GRPOCapture)


def wrappers_of(cls: type, capture: type[GRPOCapture]) -> Iterator[Wrapper]:
    """For a trainer class that works the way GRPOTrainer does."""
    around: tuple[Callable[..., Any], ...] = (
        functools.partial(_around_generation, capture),
        _around_scoring,
        _around_loss,
    )
    return ((cls, name, wrapper) for name, wrapper in zip(PRIVATE_NAMES, around, strict=True))


def _around_generation(kind: type[GRPOCapture], original: Callable[..., Any], trainer: Any, inputs: Any) -> Any:
    observer = instrumentation.observer_of(trainer)
    training = bool(trainer.model.training)
    if observer is None or not (training or observer.measurement.evaluation):
        return original(trainer, inputs)
    kind.require_interceptable(trainer)
    capture = kind(trainer, observer, training)
    setattr(trainer, _ACTIVE, capture)
    try:
        start = time.perf_counter()
        with recorded_requests(trainer.vllm_generation) as capture.requests, capture.recording():
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


def sampling_settings(generation: Any) -> SamplingSettings:
    """What the next requests ask the engine for: TRL's arguments with ``generation_kwargs`` laid over them."""
    extra = generation.generation_kwargs
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: extra.get(name, getattr(generation, name)) for name in names}
    values |= {name: extra.get(name, 0.0) for name in ("presence_penalty", "frequency_penalty")}
    values = {name: 0.0 if value is None else value for name, value in values.items()}  # TRL: min_p=None is off
    unreplayed = [name for name in UNREPLAYED if extra.get(name)]
    if generation.structured_outputs_regex is not None and "structured_outputs" not in unreplayed:
        unreplayed.append("structured_outputs")
    return SamplingSettings(**values, unreplayed=tuple(unreplayed))


class GRPOCapture(Capture):
    """One generation batch of a GRPOTrainer."""

    def __init__(self, trainer: Any, observer: instrumentation.Observer, training: bool):
        super().__init__(trainer, observer, training)
        args = trainer.args
        generate_every = args.steps_per_generation * trainer.num_iterations  # micro-batches per generation
        accumulate = args.gradient_accumulation_steps
        self.step = int(trainer.state.global_step)
        self.last_in_step = trainer._step % accumulate + generate_every >= accumulate
        self.generation_period = -(-generate_every // accumulate)
        self.sampling = sampling_settings(trainer.vllm_generation)

    @classmethod
    def require_interceptable(cls, trainer: Any) -> None:
        """Raise InterceptionError when this trainer's rollouts can't be measured, before any is generated."""
        instrumentation.require_attributes(trainer, _TRAINER)
        if not trainer.use_vllm:
            raise InterceptionError(
                "the trainer generates with transformers (use_vllm=False), so there is no engine to compare with. "
                "Set use_vllm=True (and vllm_mode='colocate' or 'server'), or remove ParityCallback."
            )
        instrumentation.require_attributes(trainer, _WITH_VLLM)
        generation = trainer.vllm_generation
        instrumentation.require_attributes(generation, _GENERATION)
        if generation.logprobs is None:
            raise InterceptionError(
                "the engine is asked for no log-probs (vllm_generation.logprobs is None). Set "
                "trainer.vllm_generation.logprobs = 0 before trainer.train()."
            )
        if generation.mode == "colocate" and not getattr(generation, "_trl_parity_checked", False):
            from ..engine.cpu import require_live_weights

            require_live_weights(generation.llm)
            generation._trl_parity_checked = True

    def recording(self) -> AbstractContextManager[None]:
        """Open while the trainer generates and scores."""
        return nullcontext()

    def rewards(self) -> list[float]:
        """Weighted sums of this batch's rewards over all ranks, as TRL logs them; NaN where no function gave one."""
        trainer = self.trainer
        logged = [list(trainer._logs["rewards"][name]) for name in trainer.reward_func_names]
        weights = trainer.reward_weights.tolist()
        total = []
        for given in zip(*(values[-self._global_batch() :] for values in logged), strict=True):
            known = [weight * value for weight, value in zip(weights, given, strict=True) if value == value]
            total.append(sum(known) if known else math.nan)
        return total

    def _global_batch(self) -> int:
        return len(self.output["completion_ids"]) * self.trainer.accelerator.num_processes

    def log(self, values: dict[str, float]) -> None:
        """One value a key, so nothing is averaged."""
        for name, value in values.items():
            self.trainer._metrics["train" if self.training else "eval"][name] = [value]

    def rollout(self) -> RolloutBatch:
        """What the engine handed over. Raises InterceptionError without log-probs, DataError on contradictions."""
        out = self.output
        if "pixel_values" in out:
            raise InterceptionError(
                "the prompts hold images, which trl-parity does not measure. Expected prompts of text alone. Train "
                "this model without ParityCallback."
            )
        own = out.get("old_per_token_logps")
        mask = out["completion_mask"]
        return RolloutBatch(
            prompt_ids=out["prompt_ids"],
            prompt_mask=out["prompt_mask"],
            completion_ids=out["completion_ids"],
            completion_mask=mask,
            engine_mask=(mask if "tool_mask" not in out else mask * out["tool_mask"]).bool(),
            rollout_logprobs=self.rollout_logprobs(),
            own_logprobs=own if own is not None and own is self.pass_logprobs else None,
            sampling=self.sampling,
            trainer_temperature=self.temperature,
            step=self.step,
            sync_step=int(self.trainer._last_loaded_step),
            training=self.training,
            last_in_step=self.last_in_step,
            correction_weights=out.get("importance_sampling_ratio"),
        )

    def rollout_logprobs(self) -> torch.Tensor:
        """(B, C) what the engine reported. Raises InterceptionError when it came without."""
        found = self.output.get("sampling_per_token_logps")
        if found is None:
            raise InterceptionError(
                f"the rollout of step {self.step} came without log-probs. vLLM must return the sampled token's "
                "log-prob; a rollout_func must fill 'logprobs' with one list of floats per completion."
            )
        return found

    def run_policy(
        self, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None = None
    ) -> torch.Tensor:
        """The trainer's own no-grad pass over given sequences: log-probs (B, keep) of its own head."""
        from trl.models.utils import disable_gradient_checkpointing

        trainer, args = self.trainer, self.trainer.args
        size = batch_size or (args.per_device_train_batch_size if self.training else args.per_device_eval_batch_size)
        score = instrumentation.original(type(trainer), PRIVATE_NAMES[1])
        # DDP's own forward may sync buffers over ranks, and ranks may run different passes here
        model = trainer.model if self.sharded else self.policy
        with torch.no_grad(), disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs):
            return score(trainer, model, ids, attention, keep, batch_size=size)[0]
