"""What the tests of asynchronous GRPO add to the real stack so that it runs on a CPU."""

from __future__ import annotations

import functools
import itertools
import queue
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


class PlainKernel:
    """FlashAttention 3's varlen function in plain torch; the kernel itself needs a GPU.

    Segment i of the queries attends to path i of the keys, causal, aligned at their ends.
    """

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size):  # type: ignore[no-untyped-def]
        assert causal
        assert window_size == (-1, -1)
        out = []
        for (a, b), (c, d) in zip(_pairs(cu_q), _pairs(cu_k), strict=True):
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            seen = scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
            out.append(seen[0].transpose(0, 1))
        return torch.cat(out)


def _pairs(bounds: torch.Tensor) -> Iterator[tuple[int, int]]:
    ends = bounds.tolist()
    return itertools.pairwise(ends)


def on_a_cpu() -> None:
    """The kernel behind TRL's own tree attention, which gathers keys and values as on a GPU; no GPU's peak speed."""
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    packing._flash_attn = lambda: PlainKernel
    async_grpo_trainer.get_peak_flops_per_device = lambda *args: None


def saved_tokenizer(model_dir: Path) -> Any:
    """The model's, made to chat: a conversation is its messages' contents, end to end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    content = {"close_pattern": "<eos>|$", "content": "text"}
    tokenizer.response_template = {
        "start_anchor": "=", "defaults": {"role": "assistant"}, "fields": {"content": content},
    }  # fmt: skip
    return tokenizer


def chats(n: int = 64) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i % 10}+{i // 10}="}]} for i in range(n)])


def digit_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """Share of digits in the answer."""
    texts = [messages[-1]["content"] for messages in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


class NoTransfer:
    """Weights go nowhere."""

    def init_weight_transfer(self) -> None:
        pass

    pause = resume = destroy = init_weight_transfer

    def send_weights(self, iterator: Iterable[Any]) -> None:
        for _ in iterator:
            pass


@functools.cache
def lossy(arrive: int) -> type:
    """A FileTransfer whose weights are lost on the way after the first few syncs, and nobody is told."""
    from trl_parity.engine.weight_transfer import FileTransfer

    class Lossy(FileTransfer):
        syncs = 0

        def send_weights(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
            self.syncs += 1
            if self.syncs <= arrive:
                super().send_weights(named)

    return Lossy


def sampled(model_dir: Path, count: int, turns: int = 1) -> list[Any]:
    """Samples as a worker would make them of the model as saved, at temperature 1, in groups of 4 of one prompt.

    With several turns, five tokens that the model did not sample stand between them.
    """
    import numpy as np
    from transformers import AutoModelForCausalLM
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), saved_tokenizer(model_dir)
    samples = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for i in range(count):
            messages = chats()[i // 4]["prompt"]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            mask = [0] * len(ids)
            for turn in range(turns):
                more = model.generate(torch.tensor([ids]), do_sample=True, top_k=0, max_new_tokens=12 + 3 * (i % 4))
                mask += [1] * (more.shape[1] - len(ids)) + [0] * 5 * (turn < turns - 1)
                ids = more[0].tolist() + [5, 6, 7, 8, 9] * (turn < turns - 1)
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores = [0.0, *logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]
            samples.append(
                RolloutSample(
                    prompt=messages,
                    completion=[],
                    input_ids=np.array(ids),
                    completion_mask=np.array(mask),
                    old_log_probs=np.array(scores, dtype=np.float32) * np.array(mask, dtype=np.float32),
                    advantage=(-1.0) ** i,
                    model_version=1,
                    group_id=i // 4,
                    metrics={"reward": i / count},
                    enqueued_at=None,
                )
            )
    return samples


class Replay:
    """A rollout worker that hands out given samples, in order."""

    def __init__(self, samples: Iterable[Any]):
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for sample in samples:
            self.rollout_buffer.put(sample)

    def start(self) -> None:
        pass

    stop = start

    def update_model_version(self, model_version: int) -> None:
        self.model_version = model_version

    def check_health(self, stale_after_s: float) -> None:
        assert not self.rollout_buffer.empty(), "all samples are handed out"


def async_args(output_dir: Path, **overrides: Any) -> Any:
    from trl.experimental.async_grpo import AsyncGRPOConfig

    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "token_budget": -1,
        "num_generations": 4,
        "max_completion_length": 24,
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    return AsyncGRPOConfig(**(settings | overrides))


def async_trainer(model_dir: Path, output_dir: Path, *callbacks: Any, transfer: Any, worker: Any = None, **args: Any):  # type: ignore[no-untyped-def]
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    return AsyncGRPOTrainer(
        model=str(model_dir),
        args=async_args(output_dir, **args),
        reward_funcs=digit_reward,
        train_dataset=chats(),
        processing_class=saved_tokenizer(model_dir),
        callbacks=list(callbacks),
        weight_transfer=transfer,
        rollout_worker=worker,
    )
