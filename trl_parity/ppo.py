"""vLLM rollouts for TRL's PPOTrainer, which by itself samples with transformers' ``generate``."""

from __future__ import annotations

from typing import Any

from .engine.cpu import prepare_cpu_engine, require_live_weights
from .errors import ConfigError
from .trainers.instrumentation import instrument
from .trainers.ppo_rollouts import VLLMRollouts, require_ppo_trainer
from .trainers.server_client import sync_without_cuda

__all__ = ["use_vllm"]


def use_vllm(trainer: Any, **settings: Any) -> None:
    """Let a ``PPOTrainer`` sample with vLLM from its next ``train()`` on.

        trainer = PPOTrainer(..., callbacks=[ParityCallback()])
        use_vllm(trainer, gpu_memory_utilization=0.3, max_model_length=512)
        trainer.train()

    TRL's own ``VLLMGeneration`` is built for the policy (``trainer.vllm_generation``) and gets the policy's weights
    before each rollout batch. The engine samples at PPO's temperature up to PPO's response length, ends at PPO's stop
    token and at no other, and reports log-probs after processing. PPO's maths stays: its old log-probs come from one
    no-grad pass of the policy over what was sampled, which is also the pass ParityCallback compares with the engine.
    Samples for show (``num_sample_generations``) still come from transformers.

    Args:
        trainer: A ``trl.experimental.ppo.PPOTrainer``, with or without a ParityCallback.
        **settings: Arguments of ``VLLMGeneration``, e.g. ``mode``, ``gpu_memory_utilization``, ``max_model_length``,
            ``top_p``; ``generation_kwargs`` are laid over each request's ``SamplingParams``.

    Raises:
        ConfigError: not a PPOTrainer, it samples with vLLM already, or a setting VLLMGeneration does not have.
        InterceptionError: on a CPU, an engine that weight sync can't reach.
    """
    require_ppo_trainer(trainer)
    if getattr(trainer, "vllm_generation", None) is not None:
        raise ConfigError("this PPOTrainer samples with vLLM already. Call use_vllm once a trainer.")
    if prepare_cpu_engine():  # before the engine is built
        sync_without_cuda()
    instrument()
    generation = VLLMRollouts(trainer, settings).generation
    if generation.mode == "colocate":
        require_live_weights(generation.llm)
