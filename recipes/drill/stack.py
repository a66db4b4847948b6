"""Real GRPO runs: real TRL, one real colocated vLLM engine per process, shared by its runs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model only waits for a second thread
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".cache" / "trl-parity"
_BLOCKS = 4096
sys.path.insert(0, str(ROOT / "recipes" / "grpo"))


@contextlib.contextmanager
def shared_engine(**engine_args: Any) -> Iterator[None]:
    """All trainers made inside get one engine, built by TRL with its own arguments and ``engine_args`` laid over.

    Of the cache's GiB it has ``_BLOCKS`` blocks, unless told otherwise: each reset goes through all of them.
    """
    import trl.generation.vllm_generation as generation

    real, built = generation.LLM, {}

    def shared(**kwargs: Any) -> Any:
        if "llm" not in built:
            built["llm"] = real(**({"num_gpu_blocks_override": _BLOCKS} | kwargs | engine_args))
        return built["llm"]

    generation.LLM = shared
    try:
        yield
    finally:
        generation.LLM = real


def tiny() -> str:
    """The recipe's tiny model."""
    import tiny_model

    return str(tiny_model.build(CACHE))


def tiny_experts() -> str:
    """A mixture of experts on the recipe's tokens, not trained: of eight, each token takes two."""
    import tiny_model
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = tiny_model.make_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "mlp" in name:  # so that which experts are taken matters
                    parameter.mul_(1.5)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.25)
    folder = CACHE / "tiny-experts"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_trainer(
    model: str,
    callbacks: list[Any],
    *,
    chat: bool = False,
    prompt_prefix: str = "",
    trainer: str = "grpo",
    adapter: bool | str = False,
    **overrides: Any,
) -> Any:
    """A GRPOTrainer (or ``trainer="rloo"``) on the recipe's task; ``overrides``: fields of its config.

    ``adapter``: a LoRA on the attention's projections, begun as PEFT does (True) or as named.
    """
    import task
    import trl

    kind, config = {"grpo": ("GRPOTrainer", "GRPOConfig"), "rloo": ("RLOOTrainer", "RLOOConfig")}[trainer]

    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="trl-parity-") if "output_dir" not in overrides else "",
        "use_cpu": True,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.1,
        "vllm_max_model_length": 256 if chat else 128,
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 40,
        "temperature": 0.7,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "max_steps": 25,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "beta": 0.0,
        "reward_weights": [1.0, 0.5],
    }
    args = getattr(trl, config)(**(settings | overrides))
    rows = args.max_steps * args.per_device_train_batch_size // args.num_generations + 64
    prompts = task.make_dataset(rows, seed=args.seed, split="train", chat=chat)
    if prompt_prefix and not chat:
        prompts = prompts.map(lambda row: {"prompt": prompt_prefix + row["prompt"]})
    peft = {}
    if adapter:
        from peft import LoraConfig

        peft["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=adapter)
    return getattr(trl, kind)(
        model=model,
        args=args,
        reward_funcs=[task.exact, task.closeness],
        train_dataset=prompts,
        callbacks=callbacks,
        **peft,
    )


def quiet() -> None:
    """Leave only our own words on the terminal."""
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("trl_parity", "transformers", "trl", "accelerate", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def versions() -> str:
    """Machine and versions, for under a table."""
    import platform

    import torch
    import trl
    import vllm

    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{machine}; torch {torch.__version__}, trl {trl.__version__}, vllm {vllm.__version__}"
