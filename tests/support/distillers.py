"""Tiny runs of TRL's trainers that learn from a teacher, with vLLM for the student."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from trl.generation import vllm_client

from .trainers import digit_reward, prompts, run_settings

# kind: where its trainer is, the name of trainer and config, settings of its own
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "distillation": ("trl", "Distillation", {}),
    "server_distillation": (
        "trl.experimental.server_distillation",
        "ServerDistillation",
        {"loss_top_k": 8, "teacher_model_server_url": "http://teacher"},
    ),
    "sdft": ("trl.experimental.sdft", "SDFT", {"num_loss_tokens_to_skip": 0, "distillation_topk": 20}),
    "sdpo": ("trl.experimental.sdpo", "SDPO", {"success_reward_threshold": 0.3}),
    "gold": ("trl.experimental.gold", "GOLD", {"lmbda": 1.0, "max_length": 64}),
    "iw_opd": ("trl.experimental.iw_opd", "IWOPD", {"lmbda": 1.0, "max_length": 64}),
}


def teacher(model_dir: Path) -> Any:
    """The student with another head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    weight = model.get_output_embeddings().weight
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        weight.add_(torch.randn_like(weight) * 0.3)
    return model


class TeacherServer:
    """In the place of TRL's client of a teacher's server: log-probs by a model at hand."""

    def __init__(self, model: Any):
        self._model = model

    def get_sequence_logprobs(
        self, sequences: Any, prompt_lengths: Any, top_logprobs: int = 1, temperature: float = 1.0
    ) -> dict[str, Any]:
        out: dict[str, list[Any]] = {"actual_logprobs": [], "logprobs": [], "logprob_token_ids": []}
        for ids, start in zip(sequences, prompt_lengths, strict=True):
            with torch.no_grad():
                logits = self._model(torch.tensor([ids])).logits[0, start - 1 : -1]
            logprobs = (logits / temperature).log_softmax(-1)
            most = logprobs.topk(top_logprobs)
            out["actual_logprobs"].append(logprobs.gather(-1, torch.tensor(ids[start:])[:, None]).tolist())
            out["logprobs"].append(most.values.tolist())
            out["logprob_token_ids"].append(most.indices.tolist())
        return out


def distiller(kind: str, model_dir: Path, output_dir: Path, *callbacks: Any, **args: Any) -> Any:
    """A trainer of one of ``KINDS``; ``args``: of its config. A teacher's server that is not given is a stand-in."""
    where, name, own = KINDS[kind]
    module = import_module(where)
    config, trainer = getattr(module, f"{name}Config"), getattr(module, f"{name}Trainer")
    settings = {key: value for key, value in run_settings(output_dir).items() if key in config.__dataclass_fields__}
    given: dict[str, Any] = {
        "model": str(model_dir),
        "train_dataset": dataset(kind, model_dir),
        "callbacks": list(callbacks),
    }
    if kind in ("distillation", "gold", "iw_opd"):
        given["teacher_model"] = teacher(model_dir)
    if kind == "sdpo":
        given["reward_funcs"] = digit_reward
    stand_in = patch.object(vllm_client, "VLLMClient", lambda **_: TeacherServer(teacher(model_dir)))
    with nullcontext() if "teacher_model_server_url" in args else stand_in:
        return trainer(args=config(**(settings | own | args)), **given)


def dataset(kind: str, model_dir: Path) -> Any:
    """Prompts, with what the trainer wants beside them."""
    from transformers import AutoTokenizer

    if kind in ("sdft", "sdpo"):
        return prompts().map(lambda row: {"privileged_context": "the answer is 1234567890"})
    if kind == "iw_opd":
        answer = {"role": "assistant", "content": "2"}
        asked = prompts().map(lambda row: {"messages": [{"role": "user", "content": row["prompt"]}, answer]})
        return asked.remove_columns("prompt")
    if kind == "gold":  # which tokenizes only where tokens are bytes
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        both = prompts().map(lambda row: {"input_ids": tokenizer(row["prompt"] + "2")["input_ids"]})
        return both.map(lambda row: {"completion_mask": [0] * (len(row["input_ids"]) - 1) + [1]})
    return prompts()
