"""A handle on the engine that serves the rollouts: what it runs with, read from the engine itself.

vLLM's private names live here and in ``cpu.py`` only. A colocated engine is read in this process; of a server only
what it answers over HTTP is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ..scoring.dtypes import dtype_name
from ..scoring.perturb import own_random_numbers
from .base import Capability
from .pictures import Pictured
from .routing import Routed, recorded
from .uncompiled import uncompiled

__all__ = ["ColocatedEngine", "engine_of"]


class ColocatedEngine:
    """The ``vllm.LLM`` inside this process."""

    failure = None

    def __init__(self, llm: Any, tensor_parallel_size: int = 1, sleeps: bool = False):
        self.llm = llm
        self._config = llm.llm_engine.vllm_config
        self._tensor_parallel_size = tensor_parallel_size
        self._sleeps = sleeps

    def refresh(self) -> None:
        """Nothing to do: everything is read where it lies."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and weights."""
        return self._config.model_config.dtype

    @property
    def head_dtype(self) -> torch.dtype:
        """Dtype of the lm_head's product and of the logits."""
        return self._config.model_config.head_dtype

    def setting(self, section: str, name: str, default: Any = None) -> Any:
        """One attribute of a section of vLLM's config."""
        return getattr(getattr(self._config, section, None), name, default)

    def model_setting(self, name: str, default: Any = None) -> Any:
        """One entry of the transformers config the served module was built from."""
        config = self.hf_config
        return getattr(config, name, getattr(config.get_text_config(), name, default))

    def settings(self) -> dict[str, Any]:
        """What else it runs with, by the names of ``Facts``."""
        model = self._config.model_config
        return {
            "logprobs_mode": str(model.logprobs_mode),
            "engine_dtype": dtype_name(self.dtype),
            "engine_head_dtype": dtype_name(self.head_dtype),
            "kv_cache_dtype": str(self._config.cache_config.cache_dtype),
            "quantization": None if model.quantization is None else str(model.quantization),
            "prefix_caching": self.caches_prefixes,
        }

    @property
    def max_model_len(self) -> int:
        """Longest sequence the engine takes."""
        return self._config.model_config.max_model_len

    @property
    def capabilities(self) -> frozenset[Capability]:
        """No rescoring with tensor parallelism, where all its ranks would have to ask, nor while it may be asleep."""
        alone = self._tensor_parallel_size == 1 and not self._sleeps
        return frozenset(Capability) if alone else frozenset(Capability) - {Capability.RESCORE}

    @property
    def instance(self) -> str:
        """One for the life of this process."""
        return str(id(self.llm))

    @property
    def model(self) -> Any:
        """The served module, a torch.nn.Module with vLLM's ``load_weights``."""
        return self.llm.llm_engine.model_executor.driver_worker.model_runner.model

    @property
    def hf_config(self) -> Any:
        """The transformers config the served module was built from, overrides included."""
        return self._config.model_config.hf_config

    def everything(self) -> dict[str, Any]:
        """Settings worth keeping with an incident: JSON."""
        cache, scheduler, model = self._config.cache_config, self._config.scheduler_config, self._config.model_config
        names = (
            (cache, ("block_size", "enable_prefix_caching", "num_gpu_blocks")),
            (scheduler, ("enable_chunked_prefill", "max_num_batched_tokens", "max_num_seqs", "async_scheduling")),
            (model, ("enforce_eager", "max_logprobs", "generation_config", "seed", "model")),
        )
        found = {name: getattr(owner, name, None) for owner, some in names for name in some}
        out = self.settings() | {n: v if isinstance(v, int | float | str | None) else str(v) for n, v in found.items()}
        return out | {"max_model_len": self.max_model_len, "tensor_parallel_size": self._tensor_parallel_size}

    @property
    def caches_prefixes(self) -> bool:
        """Whether keys and values of earlier requests are read again."""
        return bool(self._config.cache_config.enable_prefix_caching)

    def rescore(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Log-prob of every token but the first under the engine's own prefill: T = 1, no processors, (len - 1,) each.

        Prompt log-probs never read the prefix cache, and what is written to it can't be read by the run's requests.
        """
        params = self._params(temperature=0.0, prompt_logprobs=0)
        outputs = self._ask(sequences, params, self._salt())
        scores = []
        for ids, output in zip(sequences, outputs, strict=True):
            given = output.prompt_logprobs[1:]
            scores.append(torch.tensor([given[i][token].logprob for i, token in enumerate(ids[1:])]))
        return scores

    def last_states(self, sequence: Sequence[int], places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens are predicted from: last hidden states (n, H), and the logits (n, V) the module makes of them.

        ``places``: ascending, of tokens within the sequence, from 1 on. By its own prefill, before temperature and
        processors. Raises RuntimeError where the engine asks its module for logits in another order than expected.
        """
        model, before = self.model, vars(self.model).get("compute_logits")
        real = model.compute_logits
        wanted, done, sampled = torch.tensor(places) - 1, 0, False
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def watched(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal done, sampled
            logits = real(hidden, *args, **kwargs)
            if len(hidden) == 1 and not sampled:  # of the one token that is sampled
                sampled = True
                return logits
            mine = wanted[(wanted >= done) & (wanted < done + len(hidden))].to(hidden.device) - done
            kept.append((hidden[mine].detach(), logits[mine].detach()))
            done += len(hidden)
            return logits

        model.compute_logits = watched
        try:
            self._ask([sequence], self._params(temperature=0.0, prompt_logprobs=0), self._salt())
        finally:
            del model.compute_logits
            if before is not None:
                model.compute_logits = before
        if done != len(sequence) - 1:
            raise RuntimeError(f"the engine made logits of {done} tokens of {len(sequence) - 1}")
        states, logits = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return states, logits

    def routing(self, sequence: Sequence[int]) -> list[Routed]:
        """Which experts each of its layers takes for the tokens of a sequence, by its own prefill; empty if dense."""
        with uncompiled(self.model), recorded(self.model) as layers:  # on a CPU routers are compiled with the rest
            self._ask([sequence], self._params(temperature=0.0, prompt_logprobs=0), self._salt())
        return [layer.of(len(sequence)) for layer in layers]

    def next_token(
        self,
        contexts: Sequence[Sequence[int]],
        targets: Sequence[int],
        temperature: float,
        *,
        cached: bool,
        features: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the engine would report now for a token after a context, (N,), and how many tokens it read from cache.

        Temperature only, no other request setting. ``cached``: the prefix cache and kept features of pictures are read
        as the run's requests do, else each context is computed anew, all but ``features`` where that is set.
        """
        # each request draws from a generator of its own: no random number of the run is used up
        params = [self._params(temperature=temperature, seed=0, logprob_token_ids=[token]) for token in targets]
        outputs = self._ask(contexts, params, None if cached else self._salt(), features)
        reported = [
            output.outputs[0].logprobs[0][token].logprob for output, token in zip(outputs, targets, strict=True)
        ]
        return torch.tensor(reported), torch.tensor([output.num_cached_tokens or 0 for output in outputs])

    def continued(
        self, contexts: Sequence[Sequence[int]], tokens: int, temperature: float
    ) -> list[tuple[list[int], torch.Tensor]]:
        """What it samples now after each context, all at once: token ids, and what it reports for them, (n,).

        Temperature only, no other request setting; every context is computed anew.
        """
        params = [
            self._params(temperature=temperature, seed=i, logprobs=0, max_tokens=tokens) for i in range(len(contexts))
        ]
        answers = [output.outputs[0] for output in self._ask(contexts, params, self._salt())]
        return [
            (
                list(one.token_ids),
                torch.tensor([given[t].logprob for given, t in zip(one.logprobs, one.token_ids, strict=True)]),
            )
            for one in answers
        ]

    @staticmethod
    def _params(**settings: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(**({"max_tokens": 1, "detokenize": False} | settings))

    def _ask(self, sequences: Sequence[Sequence[int]], params: Any, salt: str | None, features: bool = False) -> Any:
        name = "" if salt is None or features else salt
        prompts: Any = [_prompt(ids, name) | ({"cache_salt": salt} if salt else {}) for ids in sequences]
        with own_random_numbers():
            outputs = self.llm.generate(prompts, sampling_params=params, use_tqdm=False)
        for ids, output in zip(sequences, outputs, strict=True):
            if isinstance(ids, Pictured) and list(output.prompt_token_ids) != ids:
                raise RuntimeError(
                    f"with a prompt's pictures the engine read {len(output.prompt_token_ids)} ids. Expected the "
                    f"{len(ids)} it was asked for"
                )
        return outputs

    def _salt(self) -> str:
        """A name under which nothing was cached yet: the weights may have changed since the last."""
        return f"trl-parity-{next(_salts)}"


_salts = itertools.count()


def _prompt(ids: Sequence[int], name: str = "") -> dict[str, Any]:
    return ids.pictures.request(ids, name) if isinstance(ids, Pictured) else {"prompt_token_ids": list(ids)}


def engine_of(generation: Any) -> ColocatedEngine | None:
    """The engine behind TRL's ``VLLMGeneration``; None when none is in this process."""
    if generation is None or generation.mode != "colocate":
        return None
    return ColocatedEngine(generation.llm, generation.tensor_parallel_size, generation.enable_sleep_mode)
