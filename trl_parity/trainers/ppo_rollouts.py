"""vLLM rollouts for a PPOTrainer, which samples with transformers' ``generate``. Written against TRL 1.12.

Private names used: the ``policy`` of the trainer's model; TRL's ``VLLMGeneration``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..engine.requests import recorded_requests
from ..errors import ConfigError
from . import instrumentation

if TYPE_CHECKING:
    from .capture import Capture

__all__ = ["ROLLOUTS", "VLLMRollouts", "policy_logits", "require_ppo_trainer", "temperature_of"]

ROLLOUTS = "_trl_parity_rollouts"  # attribute of the trainer


def temperature_of(trainer: Any) -> float:
    """What PPO divides logits by, and what it has the sampler divide by."""
    return trainer.args.temperature + 1e-7


def policy_logits(
    trainer: Any, policy: Any, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int
) -> Iterator[torch.Tensor]:
    """(b, keep, V) fp32 logits over PPO's temperature that predict the last ``keep`` tokens, some rows at a time.

    As PPO's own passes: padding masked, positions counted from the first token, the run's mixed precision.
    """
    for one, its in zip(ids.split(batch_size), attention.split(batch_size), strict=True):
        with torch.no_grad(), trainer.accelerator.autocast():
            output = policy(
                input_ids=one.masked_fill(~its, 0),
                attention_mask=its,
                position_ids=its.cumsum(1) - its.long(),
                return_dict=True,
                use_cache=False,
            )
        yield output.logits[:, -(keep + 1) : -1].float() / temperature_of(trainer)


def require_ppo_trainer(trainer: Any) -> None:
    """Raise ConfigError for anything but a PPOTrainer, and where this TRL has none."""
    try:
        from trl.experimental.ppo import PPOTrainer
    except ImportError as e:
        import trl

        raise ConfigError(f"trl {trl.__version__} has no PPOTrainer. Its last version is trl==1.12.*.") from e
    if not isinstance(trainer, PPOTrainer):
        raise ConfigError(
            f"use_vllm got a {type(trainer).__name__}. Expected a PPOTrainer; TRL's other trainers have an argument "
            "use_vllm."
        )


class VLLMRollouts:
    """vLLM in the place of transformers' ``generate``, for one PPOTrainer. Sets ``trainer.vllm_generation``.

    ``settings``: arguments of TRL's VLLMGeneration. Raises ConfigError for what it does not take.
    """

    def __init__(self, trainer: Any, settings: Mapping[str, Any]):
        from trl.generation.vllm_generation import VLLMGeneration

        args, tokenizer = trainer.args, trainer.processing_class
        policy = trainer.accelerator.unwrap_model(trainer.model).policy
        fixed = {
            "model": policy,
            "accelerator": trainer.accelerator,
            "processing_class": tokenizer,
            "temperature": temperature_of(trainer),
            "max_completion_length": args.response_length,
            "logprobs": 0,
        }
        allowed = [name for name in inspect.signature(VLLMGeneration).parameters if name not in fixed]
        if unknown := sorted(set(settings) - set(allowed)):
            raise ConfigError(
                f"use_vllm got {', '.join(unknown)}. Expected arguments of TRL's VLLMGeneration: "
                f"{', '.join(allowed)}. Temperature and response length are those of PPOConfig."
            )
        if not policy.name_or_path:
            raise ConfigError(
                "the policy has no name_or_path. Expected a model that was loaded with from_pretrained: vLLM reads "
                "the same checkpoint before weights are synced into it. Save the model and load it from there."
            )
        stop = trainer.stop_token_id  # PPO's alone: without one it samples on to the response length
        extra = {"ignore_eos": True, "stop_token_ids": [] if stop is None else [stop]}
        defaults = {"max_num_seqs": args.local_batch_size * settings.get("tensor_parallel_size", 1)}
        fixed["generation_kwargs"] = extra | (settings.get("generation_kwargs") or {})
        observer = instrumentation.observer_of(trainer)
        if observer is not None and observer.engine_request is not None:
            observer.engine_request.apply_to(policy)
        self.generation = VLLMGeneration(**(defaults | dict(settings) | fixed))
        self.sync_step = -1  # optimizer step of the weights last handed to the engine
        self._trainer = trainer
        trainer.vllm_generation = self.generation
        setattr(trainer, ROLLOUTS, self)

    @torch.no_grad()
    def generate(
        self, queries: torch.Tensor, pad_token_id: int, batch_size: int, capture: Capture | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's responses after the queries, (B, P + C), and the policy's logits (B, C, V) for them."""
        step = int(self._trainer.state.global_step)
        recording: Any = nullcontext([]) if capture is None else recorded_requests(self.generation)
        with recording as requests:
            if self.sync_step != step:
                self.generation.sync_weights()
                self.sync_step = step
            prompts = [row[row != pad_token_id].tolist() for row in queries]
            _, completions, reported, _ = self.generation.generate(prompts, images=None, num_generations=1)
        responses = _padded(completions, pad_token_id, queries.dtype).to(queries.device)
        sequences = torch.cat([queries, responses], dim=1)
        keep = responses.shape[1]
        policy = self._trainer.accelerator.unwrap_model(self._trainer.model).policy
        parts = policy_logits(self._trainer, policy, sequences, sequences != pad_token_id, keep, batch_size)
        if capture is None:
            return sequences, torch.cat(list(parts))
        capture.requests = requests
        capture.output |= {"responses": responses, "reported": None}
        if reported is not None:
            numbers = [[torch.nan if token[0] is None else token[0] for token in row] for row in reported]
            capture.output["reported"] = _padded(numbers, 0.0, torch.float32)
        capture.scorer = capture.new_scorer(keep, tokens=sum(map(len, completions)))
        with capture.scorer:
            logits = torch.cat(list(parts))
        from trl.trainer.utils import selective_log_softmax

        capture.pass_logprobs = selective_log_softmax(logits, responses)
        return sequences, logits


def _padded(rows: list[list[Any]], value: Any, dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return out
