"""A handle on the engine that serves the rollouts: what it runs with, read from the engine itself.

vLLM's private names live here and in ``cpu.py`` only. A colocated engine is read in this process; of a server only
what it answers over HTTP is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["ColocatedEngine", "engine_of", "requested_temperatures"]


class ColocatedEngine:
    """The ``vllm.LLM`` inside this process."""

    def __init__(self, llm: Any, tensor_parallel_size: int = 1, sleeps: bool = False):
        self.llm = llm
        self._config = llm.llm_engine.vllm_config
        self._tensor_parallel_size = tensor_parallel_size
        self._sleeps = sleeps

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and weights."""
        return self._config.model_config.dtype

    @property
    def head_dtype(self) -> torch.dtype:
        """Dtype of the lm_head's product and of the logits."""
        return self._config.model_config.head_dtype

    def settings(self) -> dict[str, Any]:
        """What else it runs with, by the names of :class:`trl_parity.lint.Facts`."""
        model = self._config.model_config
        return {
            "logprobs_mode": str(model.logprobs_mode),
            "engine_dtype": str(self.dtype).removeprefix("torch."),
            "engine_head_dtype": str(self.head_dtype).removeprefix("torch."),
            "kv_cache_dtype": str(self._config.cache_config.cache_dtype),
            "quantization": None if model.quantization is None else str(model.quantization),
        }

    @property
    def max_model_len(self) -> int:
        """Longest sequence the engine takes."""
        return self._config.model_config.max_model_len

    def can_rescore(self) -> bool:
        """Whether this rank can ask the engine alone: with tensor parallelism all its ranks would have to."""
        return self._tensor_parallel_size == 1 and not self._sleeps

    def rescore(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Log-prob of every token but the first under the engine's own prefill: T = 1, no processors, (len - 1,) each.

        Prompt log-probs never read the prefix cache. The one token generated per request is greedy, so that no
        random number is drawn.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts: Any = [{"prompt_token_ids": list(ids)} for ids in sequences]
        outputs = self.llm.generate(prompts, sampling_params=params, use_tqdm=False)
        scores = []
        for ids, output in zip(sequences, outputs, strict=True):
            given = output.prompt_logprobs[1:]
            scores.append(torch.tensor([given[i][token].logprob for i, token in enumerate(ids[1:])]))
        return scores


def engine_of(generation: Any) -> ColocatedEngine | None:
    """The engine behind TRL's ``VLLMGeneration``; None when it is not in this process (a server)."""
    if generation.mode != "colocate":
        return None
    return ColocatedEngine(generation.llm, generation.tensor_parallel_size, generation.enable_sleep_mode)


@contextmanager
def requested_temperatures(generation: Any) -> Iterator[list[float]]:
    """The temperature of each call the engine gets inside the block, read from what is really sent to it."""
    colocated = generation.mode == "colocate"
    target = generation.llm if colocated else getattr(generation, "vllm_client", None)
    seen: list[float] = []
    if target is None:  # not the process that talks to the server
        yield seen
        return
    generate, own = target.generate, target.__dict__.get("generate")

    def recording(*args: Any, **kwargs: Any) -> Any:
        if colocated:
            params = kwargs.get("sampling_params", args[1] if len(args) > 1 else None)
            params = params[0] if isinstance(params, list) else params
            temperature = None if params is None else params.temperature
        else:
            temperature = (kwargs.get("generation_kwargs") or {}).get("temperature", kwargs.get("temperature"))
        if temperature is not None:
            seen.append(float(temperature))
        return generate(*args, **kwargs)

    target.generate = recording
    try:
        yield seen
    finally:
        if own is None:
            del target.generate
        else:
            target.generate = own
