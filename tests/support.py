"""What tests share: a tiny model and trainer of the real stack."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# TRL writes these when it builds a colocated engine; a child process must not join its parent's process group
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")

CHARS = "0123456789+-*=abcdefghijklmnopqrstuvwxyz ?.,"


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: this one's, but for the rendezvous that a trainer in this process left behind."""
    return {name: value for name, value in os.environ.items() if name not in RENDEZVOUS} | more


@contextlib.contextmanager
def shared_engine(**engine_args: Any) -> Iterator[None]:
    """One engine for all trainers built inside, made by TRL with TRL's arguments and these on top."""
    import trl.generation.vllm_generation as generation

    built, real = {}, generation.LLM

    def shared(**kwargs: Any) -> Any:
        if "llm" not in built:
            built["llm"] = real(**(kwargs | engine_args))
        return built["llm"]

    generation.LLM = shared
    try:
        yield
    finally:
        generation.LLM = real


def save_tokenizer(directory: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?")
    fast.save_pretrained(directory)
    return fast


def save_tiny_model(directory: Path, *, logit_std: float = 2.0, **config: Any) -> Path:
    """A random Qwen3 of 0.3 M parameters whose logits spread enough that temperature and truncation matter."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = save_tokenizer(directory)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**(settings | config)))
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=logit_std / settings["hidden_size"] ** 0.5)
    model.save_pretrained(directory)
    return directory


def save_tiny_gemma(directory: Path) -> Path:
    """A random Gemma 2: logit soft cap, scaled embeddings, tied head, a sliding window in every other layer."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = save_tokenizer(directory)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, max_position_embeddings=256, sliding_window=64,
        final_logit_softcapping=4.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config)
        for name, parameter in model.named_parameters():  # so that the layers matter and tokens are not repeated
            if parameter.ndim == 2:
                parameter.data.mul_(15.0 if "embed" in name else 3.0)
    model.save_pretrained(directory)
    return directory


def prompts(n: int = 64) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": f"{i % 10}+{i // 10}="} for i in range(n)])


def digit_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of digits: moves the policy, and so the weights, without collapsing it at once."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def grpo_args(output_dir: Path, config: str = "GRPOConfig", **overrides: Any) -> Any:
    import trl

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
    return getattr(trl, config)(**(settings | overrides))
