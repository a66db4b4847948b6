"""From a GRPOTrainer with vLLM to rollout batches. Written against TRL 1.16; private names used:

GRPOTrainer: ``_generate_and_score_completions``, ``_generate``, ``_get_per_token_logps_and_entropies``,
``_compute_loss``, ``_metrics``, ``_logs``, ``_step``, ``_last_loaded_step``, ``vllm_generation`` (attributes of
VLLMGeneration).
"""

from __future__ import annotations

import functools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..engine.requests import recorded_requests
from ..errors import InterceptionError
from ..records import UNREPLAYED, RolloutBatch, SamplingSettings
from . import instrumentation
from .capture import Capture
from .instrumentation import Wrapper, replaced
from .row_keys import picture_key

_GENERATE, _SCORE, _LOSS = "_generate_and_score_completions", "_get_per_token_logps_and_entropies", "_compute_loss"

_TRAINER = ("_metrics", "_logs", "_step", "reward_func_names", "reward_weights", "temperature", "num_iterations")

# of a batch with pictures, by TRL's names: what its pass takes beside ids
_IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids", "num_images", "num_tiles",
)  # fmt: skip

_BY_TOKEN = "token_type_ids"  # of these, the two that have a column for each token

_GENERATION = (
    "mode", "logprobs", "generation_kwargs", "structured_outputs_regex", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "tensor_parallel_size", "enable_sleep_mode",
)  # fmt: skip


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    return wrappers_of(GRPOTrainer, GRPOCapture)


def wrappers_of(cls: type, capture: type[GRPOCapture]) -> Iterator[Wrapper]:
    """For a trainer class that works the way GRPOTrainer does."""
    if not hasattr(cls, _SCORE):
        raise instrumentation.moved(cls, _SCORE)
    yield cls, _GENERATE, functools.partial(around_generation, capture)
    yield cls, _LOSS, _around_loss


def around_generation(kind: type[Any], original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Hand over what a trainer's method samples, as a capture of this kind, before anything is learned from it."""
    observer = instrumentation.observer_of(trainer)
    training = bool(trainer.model.training)
    if observer is None or not (training or observer.measurement.evaluation):
        return original(trainer, *args, **kwargs)
    kind.require_interceptable(trainer)
    capture = kind(trainer, observer, training)
    start = time.perf_counter()
    with recorded_requests(capture.generation) as capture.requests, capture.recording():
        capture.output = original(trainer, *args, **kwargs)
    capture.batch_seconds = time.perf_counter() - start - capture.seconds
    try:
        observer.on_generation(capture)
    finally:
        capture.requests = [replace(request, outputs=None) for request in capture.requests]  # many small objects
    return capture.output


def _around_loss(original: Callable[..., Any], trainer: Any, model: Any, inputs: dict[str, Any]) -> Any:
    observer = instrumentation.observer_of(trainer)
    old = inputs.get("old_per_token_logps")
    if observer is None or old is None or not trainer.model.training:
        return original(trainer, model, inputs)
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    score = getattr(trainer, _SCORE)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = score(*args, **kwargs)
        observer.on_update(result[0].detach(), old, mask)
        return result

    with replaced(trainer, _SCORE, watched):
        return original(trainer, model, inputs)


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


def require_engine(trainer: Any, synced: str = "_last_loaded_step") -> None:
    """Raise InterceptionError where a trainer samples without TRL's VLLMGeneration, or can't be told log-probs by it.

    ``synced``: the trainer's attribute with the optimizer step of the weights last handed to the engine.
    """
    if not trainer.use_vllm:
        raise InterceptionError(
            "the trainer generates with transformers (use_vllm=False), so there is no engine to compare with. "
            "Set use_vllm=True (and vllm_mode='colocate' or 'server'), or remove ParityCallback."
        )
    instrumentation.require_attributes(trainer, (synced, "vllm_generation"))
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


class GRPOCapture(Capture):
    """One generation batch of a GRPOTrainer."""

    def __init__(self, trainer: Any, observer: instrumentation.Observer, training: bool):
        super().__init__(trainer, observer, training)
        args = trainer.args
        generate_every = args.steps_per_generation * trainer.num_iterations  # micro-batches per generation
        self.step = int(trainer.state.global_step)
        self.micro_batches = generate_every - trainer._step % generate_every
        self.last_in_step = self.ends_step()
        with self.trying():
            self.sampling = sampling_settings(trainer.vllm_generation)
        self._generated: Any = None  # what TRL's _generate returned: prompt ids, completion ids, tool mask, ...

    @classmethod
    def require_interceptable(cls, trainer: Any) -> None:
        """Raise InterceptionError when this trainer's rollouts can't be measured, before any is generated."""
        instrumentation.require_attributes(trainer, _TRAINER)
        require_engine(trainer)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Open while the trainer generates and scores: looks on at what this trainer does both with.

        That is whatever it finds by these names, a subclass's or another library's as well as TRL's.
        """
        with replaced(self.trainer, _SCORE, self._watched(getattr(self.trainer, _SCORE))), ExitStack() as stack:
            if (generate := getattr(self.trainer, "_generate", None)) is not None:
                stack.enter_context(replaced(self.trainer, "_generate", self._remembered(generate)))
            yield

    def _watched(self, score: Callable[..., Any]) -> Callable[..., Any]:
        def watched(
            model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **kwargs: Any
        ) -> Any:
            # only the first pass over the policy can be the one behind old_per_token_logps; later ones are reference
            if self.scorer is not None or model is not self.trainer.model:
                return score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            with ExitStack() as stack:
                with self.trying():
                    plain = getattr(attention_mask, "ndim", 0) == 2  # else another's forward
                    tokens = attention_mask[:, -logits_to_keep:].sum() if plain else None
                    self.scorer = self.new_scorer(logits_to_keep, tokens=tokens)
                    if (self.sampling.penalizes or self.scorer.sample is not None) and len(self._tool_mask()):
                        self.scorer.engine_mask = self._sampled(input_ids[:, -logits_to_keep:]).bool()
                    stack.enter_context(self.scorer)
                result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            self.pass_logprobs = result[0]
            return result

        return watched

    def _remembered(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            self._generated = generate(*args, **kwargs)
            return self._generated

        return remembered

    def _sampled(self, like: torch.Tensor) -> torch.Tensor:
        """(B, C): 1 for what the engine sampled, 0 for what tools or an environment said, of truncated ones, too."""
        sampled = torch.ones_like(like)
        for row, values in zip(sampled, self._tool_mask(), strict=False):
            row[: len(values)] = torch.as_tensor(values)
        return sampled

    def _tool_mask(self) -> Sequence[Any]:
        """By completion, as ``_generate`` returned it; empty: the engine sampled everything."""
        return (None if self._generated is None else self._generated[2]) or ()

    def _completion_mask(self, out: dict[str, Any]) -> torch.Tensor:
        """(B, C): which completion tokens there are, also in completions that TRL has taken out as truncated."""
        mask = out["completion_mask"]
        if self._generated is None or not getattr(self.trainer, "mask_truncated_completions", False):
            return mask
        lengths = torch.tensor([len(ids) for ids in self._generated[1]], device=mask.device)
        return (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]).to(mask.dtype)

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

    def reward_prompts(self) -> list[int]:
        """A checksum of each completion's prompt, as TRL logs it."""
        prompts = list(self.trainer._logs["prompt"])[-self._global_batch() :]
        return [zlib.crc32(repr(_without_pixels(prompt)).encode()) for prompt in prompts]

    def stopped(self) -> dict[str, float]:
        """Of a colocated engine's last call, which names the reason: a server's answer does not."""
        trainer, outputs = self.trainer, self.requests[-1].outputs if self.requests else None
        ends = getattr(trainer, "eos_token_ids", None)
        if not getattr(trainer, "mask_truncated_completions", False) or not isinstance(outputs, list) or ends is None:
            return {}
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        ends = {*ends, tokenizer.pad_token_id}
        last = [c.token_ids[-1] for out in outputs for c in out.outputs if c.finish_reason == "stop" and c.token_ids]
        return {"stopped": len(last), "stopped_masked": sum(token not in ends for token in last)}

    def start_of_reference(self) -> dict[str, float]:
        """Where the trainer has both by now: with beta, and a pass of its own over the policy."""
        out = self.output
        policy, reference = out.get("old_per_token_logps"), out.get("ref_per_token_logps")
        if policy is None or reference is None:
            return {}
        mask = (out["completion_mask"] * out.get("tool_mask", 1)).bool()
        delta = (reference.double() - policy.double())[mask]
        return {"reference_tokens": len(delta), "reference_k3": float((torch.expm1(delta) - delta).sum())}

    def _global_batch(self) -> int:
        return len(self.output["completion_ids"]) * self.trainer.accelerator.num_processes

    def log(self, values: dict[str, float]) -> None:
        """One value a key, so nothing is averaged."""
        for name, value in values.items():
            self.trainer._metrics["train" if self.training else "eval"][name] = [value]

    def rollout(self) -> RolloutBatch:
        """What the engine handed over. Raises InterceptionError without log-probs, DataError on contradictions."""
        out = self.output
        mask, loss_mask, tools = self._completion_mask(out), out["completion_mask"], out.get("tool_mask")
        if tools is not None and mask is not loss_mask:
            tools = self._sampled(mask)
        return RolloutBatch(
            prompt_ids=out["prompt_ids"],
            prompt_mask=out["prompt_mask"],
            completion_ids=out["completion_ids"],
            completion_mask=mask,
            engine_mask=(mask if tools is None else mask * tools).bool(),
            loss_mask=None if mask is loss_mask else loss_mask,
            rollout_logprobs=self.rollout_logprobs(),
            own_logprobs=out.get("old_per_token_logps"),
            sampling=self.sampling,
            trainer_temperature=self.temperature,
            step=self.step,
            sync_step=int(self.trainer._last_loaded_step),
            training=self.training,
            last_in_step=self.last_in_step,
            correction_weights=out.get("importance_sampling_ratio"),
            image_keys=self._image_keys(),
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
        self, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None = None, **images: Any
    ) -> torch.Tensor:
        """The trainer's own no-grad pass over given sequences: log-probs (B, keep) of its own head."""
        from trl.models.utils import disable_gradient_checkpointing

        trainer, args = self.trainer, self.trainer.args
        size = batch_size or (args.per_device_train_batch_size if self.training else args.per_device_eval_batch_size)
        score = getattr(trainer, _SCORE)  # as the trainer finds it: what the run learns with
        # DDP's own forward may sync buffers over ranks, and ranks may run different passes here
        model = trainer.model if self.sharded else self.policy
        with torch.no_grad(), disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs):
            if 0 not in images.get("num_images", ()):
                return score(model, ids, attention, keep, batch_size=size, **images)[0]
            # TRL's own parts may be without a picture, which no model takes
            parts = torch.arange(len(ids)).split(size)
            return torch.cat(
                [score(model, ids[at], attention[at], keep, **_of_rows(images, at.tolist()))[0] for at in parts]
            )

    def image_inputs(self, rows: torch.Tensor, width: int, keep: int) -> dict[str, Any]:
        """The trainer's arguments for pictures in these rows' prompts; empty: there are none."""
        if "pixel_values" not in self.output:
            return {}
        given = {name: self.output[name] for name in _IMAGES if self.output.get(name) is not None}
        end = self.output["prompt_ids"].shape[1] + keep
        kinds = {name: value[:, end - width : end] for name, value in given.items() if name.endswith(_BY_TOKEN)}
        return _of_rows(given | kinds, rows.tolist())

    def _image_keys(self) -> torch.Tensor | None:
        """(B,) of the rollout batch."""
        if "pixel_values" not in self.output:
            return None
        from trl.trainer.utils import split_pixel_values_by_grid

        pixels = split_pixel_values_by_grid(self.output)["pixel_values"]
        counts = self.output.get("num_images") or [1] * len(pixels)
        none = torch.zeros((), dtype=torch.int64, device=self.output["prompt_ids"].device)
        return torch.stack([picture_key(some) if n else none for some, n in zip(pixels, counts, strict=True)])


def _of_rows(given: dict[str, Any], at: list[int]) -> dict[str, Any]:
    """TRL's arguments for pictures, of some rows.

    Its tensors lie picture by picture, patch by patch or row by row, as the model has them: its own functions take
    them apart and put them together.
    """
    from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

    rows = {
        name: [value[i] for i in at] if isinstance(value, list) else value[at]
        for name, value in split_pixel_values_by_grid(given).items()
    }
    if not any(rows.get("num_images", at)):
        return {name: value for name, value in rows.items() if name.endswith(_BY_TOKEN)}
    return dict(unsplit_pixel_values_by_grid(rows))


def _without_pixels(prompt: Any) -> Any:
    """A prompt with numbers for its pictures, whose ``repr`` tells where they lie and not what they show."""
    if isinstance(prompt, dict):
        return {name: _without_pixels(value) for name, value in prompt.items()}
    if isinstance(prompt, list):
        return [_without_pixels(part) for part in prompt]
    return zlib.crc32(prompt.tobytes()) if hasattr(prompt, "tobytes") else prompt
