"""PPO with vLLM rollouts, and trl-parity watching that engine and trainer are the same policy. TRL 1.12 only.

On a CPU, with the tiny model of the GRPO recipe (``make setup-ppo`` makes the environment):

    .venv-ppo/bin/accelerate launch --cpu --num_processes 1 recipes/ppo/train.py --config configs/ppo_tiny_cpu.yaml

Every field of the YAML file is also an option, e.g. ``--total_episodes 128 --action log``.

Exit codes: 0 the run went through; 3 trl-parity halted it, and the last line of stderr says why (``accelerate launch``
exits with 1 then; with ``--quiet`` it adds no traceback of its own to that line); anything else is an error.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from grpo import task, tiny_model
from grpo.train import (
    HALTED,
    TINY,
    count_statuses,
    exit_code,
    metrics_path,
    read_windows,
    set_environment,
    train_watched,
    trend,
    worst,
)


@dataclass
class RecipeArguments:
    """What this recipe adds to TRL's own arguments."""

    model_name_or_path: str = field(default=TINY, metadata={"help": "The policy; tiny: built on the spot."})
    rollouts: str = field(default="vllm", metadata={"help": "Who samples.", "choices": ["vllm", "transformers"]})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "On a CPU: share of the memory."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Prompt and response, in tokens."})
    train_size: int = field(default=512, metadata={"help": "Prompts in the training set."})
    tiny_cache: str = field(default=".cache/trl-parity", metadata={"help": "Where the tiny model is kept."})


class SortingReward(torch.nn.Module):
    """The task's rule in the interface of a reward model: a backbone, and a ``score`` of its hidden states.

    PPO reads the score at a sequence's last token; here each position holds that of the whole sequence.
    """

    base_model_prefix = "rule"

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer

    def rule(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        rows = [ids[real] for ids, real in zip(input_ids, attention_mask.bool(), strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        scores = torch.tensor([grade(text) for text in texts], device=input_ids.device)
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])

    def score(self, states: torch.Tensor) -> torch.Tensor:
        return states


def grade(text: str) -> float:
    """1 for the exact answer, and up to 0.5 for right positions, of ``sort 83052:fox mint = 02358``."""
    prompt, _, completion = text.partition(":")
    answer = [task.expected_answer(prompt.removeprefix("sort "))]
    return task.exact([completion], answer)[0] + 0.5 * task.closeness([completion], answer)[0]


def main(argv: list[str]) -> int:
    set_environment(argv)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import TrlParser
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from trl_parity import ParityCallback, ParityConfig
    from trl_parity.ppo import use_vllm

    parser = TrlParser(
        (RecipeArguments, PPOConfig, ParityConfig),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe, args, parity_args = parser.parse_args_and_config(argv)
    set_seed(args.seed)  # PPOTrainer seeds torch, not numpy, which shuffles its mini-batches
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DIR", str(args.output_dir))
    model = recipe.model_name_or_path
    if model == TINY:
        model = str(tiny_model.build(recipe.tiny_cache))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    texts = task.make_dataset(recipe.train_size, args.seed, "train")["prompt"]

    parity = ParityCallback(parity_args)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(model),
        ref_model=None,
        reward_model=SortingReward(tokenizer),
        value_model=AutoModelForSequenceClassification.from_pretrained(model, num_labels=1),
        train_dataset=Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts]),
        callbacks=[parity],
    )
    if recipe.rollouts == "vllm":
        use_vllm(
            trainer,
            gpu_memory_utilization=recipe.vllm_gpu_memory_utilization,
            max_model_length=recipe.vllm_max_model_length,
        )
    halted = train_watched(trainer, parity)
    if trainer.accelerator.is_main_process:
        path = metrics_path(args, parity_args)
        windows, history = read_windows(path), trainer.state.log_history
        print(f"windows measured   {len(windows)}: {count_statuses(windows)}")
        print(f"worst k3 KL        {worst(windows, 'kl_k3')} nats/token")
        print(f"worst |log-ratio|  {worst(windows, 'logp_abs_diff/max')} nats")
        print(f"score              {trend(history, 'objective/scores')}")
        print(f"every window       {path}")
        if halted:
            print(f"trl-parity halted this run; the condemned batch was not learned from. Exit code {HALTED}.")
    return exit_code(halted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
