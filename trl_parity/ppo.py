"""vLLM rollouts for TRL's PPOTrainer, which by itself samples with transformers' ``generate``."""

from __future__ import annotations

from typing import Any

from .engine.cpu import prepare_cpu_engine, require_live_weights
from .errors import ConfigError
from .taps import instrument
from .taps.ppo import VLLMRollouts

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
    if getattr(trainer, "vllm_generation", None) is not None:
        raise ConfigError("this PPOTrainer samples with vLLM already. Call use_vllm once a trainer.")
    prepare_cpu_engine()  # before the engine is built
    instrument()
    generation = VLLMRollouts(trainer, settings).generation
    if generation.mode == "colocate":
        require_live_weights(generation.llm)
