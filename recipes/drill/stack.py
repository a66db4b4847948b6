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
sys.path.insert(0, str(ROOT / "recipes" / "grpo"))


@contextlib.contextmanager
def shared_engine(**engine_args: Any) -> Iterator[None]:
    """All trainers made inside get one engine, built by TRL with its own arguments and ``engine_args`` laid over."""
    import trl.generation.vllm_generation as generation

    real, built = generation.LLM, {}

    def shared(**kwargs: Any) -> Any:
        if "llm" not in built:
            built["llm"] = real(**(kwargs | engine_args))
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


def make_trainer(
    model: str,
    callbacks: list[Any],
    *,
    chat: bool = False,
    prompt_prefix: str = "",
    trainer: str = "grpo",
    **overrides: Any,
) -> Any:
    """A GRPOTrainer (or ``trainer="rloo"``) on the recipe's task; ``overrides``: fields of its config."""
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
    return getattr(trl, kind)(
        model=model,
        args=args,
        reward_funcs=[task.exact, task.closeness],
        train_dataset=prompts,
        callbacks=callbacks,
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
