"""A tiny GRPO run of the real stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stack import shared_engine as shared_engine


def prompts(n: int = 64) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": f"{i % 10}+{i // 10}="} for i in range(n)])


def digit_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of digits: moves the policy, and so the weights, without collapsing it at once."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def grpo_args(output_dir: Path, config: str = "GRPOConfig", **overrides: Any) -> Any:
    """Arguments of a GRPO run, or of another trainer's, whose config class of TRL's is named."""
    import trl

    return getattr(trl, config)(**run_settings(output_dir, **overrides))


def run_settings(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    """The same by name."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.1,
        "vllm_max_model_length": 256,
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 24,
        "temperature": 0.7,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "beta": 0.0,
    }
    return settings | overrides
