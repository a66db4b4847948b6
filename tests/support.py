"""What tests share: a tiny model and trainer of the real stack."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recipes" / "drill"))
from stack import shared_engine as shared_engine  # noqa: E402

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="trl-parity-trackio-"))  # read when it is imported


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# TRL writes these when it builds a colocated engine; a child process must not join its parent's process group
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")

CHARS = "0123456789+-*=abcdefghijklmnopqrstuvwxyz ?.,"


def environment(**more: str) -> dict[str, str]:
    """For a process of its own: this one's, but for the rendezvous that a trainer in this process left behind."""
    own = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    return own | {"MASTER_PORT": str(free_port())} | more


def run_on_two_ranks(code: str, directory: Path, *args: Any, **more: str) -> str:
    """Run a script under torchrun on two gloo ranks; what it wrote to stderr. ``more``: environment variables.

    One such run at a time on this machine: with more ranks than cores they wait for each other for minutes.
    """
    script = directory / "run.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command = [*launcher, str(free_port()), str(script), *map(str, args)]
    env = environment(PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]), OMP_NUM_THREADS="1")
    with open(Path(tempfile.gettempdir()) / "trl-parity-ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True, env=env | more, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


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


CHAT_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role }} {{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant {% endif -%}
"""


def save_tool_tokenizer(directory: Path) -> Any:
    """The same with a chat template and tokens that spell a whole tool call, so that a random model makes some."""
    from transformers import PreTrainedTokenizerFast
    from trl import chat_template_utils as templates

    base = save_tokenizer(directory)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?"
    )
    fast.add_tokens(
        [f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}, "b": 2}}}}\n</tool_call>' for a in range(8)]
    )
    fast.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.response_template = getattr(templates, "qwen3_template", None)  # TRL 1.0 to 1.6 have none
    fast.save_pretrained(directory)
    return fast


def save_tiny_model(directory: Path, *, logit_std: float = 2.0, tokenizer: Any = None, **config: Any) -> Path:
    """A random Qwen3 of 0.3 M parameters whose logits spread enough that temperature and truncation matter."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tokenizer or save_tokenizer(directory)
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
    """Arguments of a GRPO run, or of another trainer's, whose config class of TRL's is named."""
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
