"""A tiny PPO run of the real stack: policy, value model, a rule in the place of a reward model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from support.models import CHARS

DIGITS = [2 + CHARS.index(c) for c in "0123456789"]  # ids: <pad>, <eos>, then CHARS


class DigitReward(torch.nn.Module):
    """The share of digits, in the interface that PPO asks of a reward model: a backbone and a ``score`` of its states.

    PPO reads the score at the last token before the padding; here every position holds that of the whole sequence.
    """

    base_model_prefix = "rule"

    def rule(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        digits = torch.isin(input_ids, torch.tensor(DIGITS, device=input_ids.device)) & attention_mask
        share = digits.sum(1) / attention_mask.sum(1)
        return SimpleNamespace(hidden_states=[share[:, None, None].expand(*input_ids.shape, 1)])

    def score(self, states: torch.Tensor) -> torch.Tensor:
        return states


def queries(tokenizer: Any, n: int = 64) -> Any:
    """Prompts of two lengths, so that some are padded."""
    from datasets import Dataset

    texts = [f"{i % 10}+{i // 10}=" if i % 3 else f"what is {i % 10}?" for i in range(n)]
    return Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])


def ppo_trainer(
    model_dir: Path, output_dir: Path, *callbacks: Any, updates: int = 4, eval_size: int = 0, **args: Any
) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "local_rollout_forward_batch_size": 8,
        "total_episodes": 16 * updates,
        "num_sample_generations": 0,
        "response_length": 24,
        "stop_token": "eos",
        "temperature": 0.7,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    set_seed(0)  # PPOTrainer leaves numpy unseeded, which shuffles its mini-batches
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    return PPOTrainer(
        args=PPOConfig(**(settings | args)),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        ref_model=None,
        reward_model=DigitReward(),
        value_model=AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1),
        train_dataset=queries(tokenizer),
        eval_dataset=queries(tokenizer, eval_size) if eval_size else None,
        callbacks=list(callbacks),
    )
