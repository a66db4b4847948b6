"""What is checked, built when it is first needed: the engine, the reference, and what they are asked."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ...engine.offline import BenchEngine, Sampled, build_engine
from ...errors import ConfigError, InterceptionError
from ..prompts.cases import Case, Prompt, Vocabulary, read_jsonl
from ..prompts.draws import Drawing
from . import invariances, trials
from .aside import Aside
from .drift import Gaps
from .engines import chunk_for
from .invariances import Ask
from .noise import coarser, noise_of
from .reference import Reference, Scored
from .sequential import planned_look
from .settings import CheckSettings
from .trials import Answered, Batch, Trial

__all__ = ["Subject", "stamp"]

_PROBES = 4  # trials whose answers are kept, to measure the noise and try what explains the drift

_SECONDS = 1.0  # of the engine alone: enough to tell how fast it is

Progress = Callable[[str, int, int], None]  # what, done, of


class Subject:
    """One engine and one reference of one model. Engines of a process share a process group: one at a time."""

    def __init__(self, settings: CheckSettings, progress: Progress):
        self.settings, self._progress = settings, progress
        self._engine: BenchEngine | None = None
        self._kept: dict[int, tuple[Answered, list[Scored]]] = {}
        self._noise: dict[int, Callable[[], dict[str, Gaps]]] = {}
        self.other_block: tuple[list[Sampled], int] | None = (
            None  # answers of an engine of other blocks, and their size
        )

    def build(self, **over: Any) -> BenchEngine:
        """A new engine with other arguments laid over."""
        return build_engine(self.settings.model, {**self.settings.engine_args, **over})

    def replace(self, **over: Any) -> None:
        """From now on the engine is another one; what it was asked before is forgotten where it depends on it."""
        self.close()
        self._engine = self.build(**over)
        self.__dict__.pop("cached", None)

    def close(self) -> None:
        """Free the engine; it is built again when it is needed."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def end(self) -> None:
        """Free the engine, and wait for the reference."""
        self.close()
        if "aside" in self.__dict__:
            self.aside.close()

    @property
    def engine(self) -> BenchEngine:
        """The engine of these settings, unless ``replace`` was called."""
        if self._engine is None:
            self._progress("starting the engine", 0, 0)
            self._engine = self.build()
        return self._engine

    @cached_property
    def reference(self) -> Reference:
        """The model in fp32, on weights in the trainer's dtype."""
        self._progress("loading the reference", 0, 0)
        found = Reference(self.settings.model, getattr(torch, self.settings.trainer_dtype), self.settings.device)
        if found.vocab_size != self.engine.vocab_size:
            raise ConfigError(
                f"the engine's laws have {self.engine.vocab_size:,} entries, the reference's {found.vocab_size:,}. "
                "Expected one vocabulary on both sides."
            )
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.settings.model)
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(f"transformers can't load the tokenizer of {self.settings.model!r}: {e}") from e

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What prompts are made of."""
        return Vocabulary.of(self.tokenizer, self.engine.vocab_size)

    @cached_property
    def room(self) -> int:
        """Longest prompt of a trial."""
        room = self.engine.max_model_len - self.settings.max_tokens - 1  # one more is asked for to score the whole
        if room < 1:
            raise ConfigError(
                f"max_model_len is {self.engine.max_model_len} and {self.settings.max_tokens} tokens are sampled. "
                "Expected room for a prompt: --max-tokens."
            )
        return min(room, self.settings.max_length)

    @cached_property
    def drawing(self) -> Drawing[tuple[Prompt, ...]]:
        """How batches are drawn."""
        from ..prompts.prompts import batches

        bounds = {self.engine.block_size, self.engine.chunk_size, 16}
        return batches(
            self.vocabulary, self.room, sorted(b for b in bounds if b <= self.room), self.settings.max_batch
        )

    @cached_property
    def batches(self) -> list[tuple[Prompt, ...]]:
        """The prompts of each trial."""
        settings = self.settings
        if settings.case is not None:
            found = [Case.from_text(settings.case).batch]
        elif settings.prompts is not None:
            room = self.engine.max_model_len - settings.max_tokens - 1
            found = list(_grouped(read_jsonl(settings.prompts, self.tokenizer, room), settings))
            if not found:
                raise ConfigError(f"{settings.prompts} holds no prompt. Expected a JSONL file of them.")
        else:
            from ..prompts.prompts import draw

            found = draw(self.drawing, settings.trials, settings.seed)
        for batch in found:
            for prompt in batch:
                if len(prompt.ids) + settings.max_tokens >= self.engine.max_model_len:
                    raise ConfigError(
                        f"a prompt has {len(prompt.ids)} tokens, and {settings.max_tokens} are sampled after it; the "
                        f"engine takes {self.engine.max_model_len}. Expected shorter ones, or fewer --max-tokens."
                    )
        return found

    @cached_property
    def look(self) -> int | None:
        """The trial after which all may be settled; None: all are run. A user's own prompts are all asked."""
        if self.settings.prompts is not None:
            return None
        vocab, most = self.engine.vocab_size, self.settings.max_tokens
        exact = [trials.whole_laws(len(batch), vocab, most) * most for batch in self.batches]
        return planned_look(exact, self.settings.limits.pass_rate, self.settings.early_error)

    def batch(self, prompts: Sequence[Prompt], index: int) -> Batch:
        """A trial's request. Seeds depend on its place alone; a case is always the first."""
        return Batch(
            prompts=tuple(p.ids for p in prompts),
            seed=self.settings.seed * 1_000_003 + index * 64,
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
        )

    @cached_property
    def contexts(self) -> list[tuple[int, ...]]:
        """Contexts for the engine alone: short and middling ones, random."""
        rng = random.Random(f"{self.settings.seed}:contexts")
        ids = self.vocabulary.ordinary
        return [tuple(rng.choices(ids, k=min(self.room, n))) for n in (4, 9, 16, 23, 7, 30, 12, 19, 27, 5, 14, 32)]

    @cached_property
    def ask(self) -> Ask:
        """Contexts that the engine is asked for again and again."""
        rng = random.Random(f"{self.settings.seed}:ask")
        room = min(self.room, 200)
        wanted = sorted({min(room, n) for n in (1, 3, 15, 16, 17, 40, room // 2, room)})
        contexts = tuple(tuple(rng.choices(self.vocabulary.ordinary, k=n)) for n in wanted)
        return Ask(contexts, tuple(range(len(contexts))), self.settings.max_tokens)

    @cached_property
    def base(self) -> list[Sampled]:
        """The engine's answers to them, cold and in one batch."""
        return invariances.asked(self.engine, self.ask)

    @cached_property
    def chunked(self) -> list[Sampled] | None:
        """The same with prompts in chunks, of the same engine; None where it can't be made to, or none is long."""
        longest, chunk = chunk_for(self.ask, self.engine.chunk_size)
        if longest <= chunk:
            return None
        try:
            with self.engine.taking_in(chunk):
                return invariances.asked(self.engine, self.ask)
        except InterceptionError:
            return None

    @cached_property
    def shape(self) -> dict[str, int]:
        """What other engines are built to differ in."""
        engine = self.engine
        return {"eager": engine.eager, "block_size": engine.block_size, "chunk_size": engine.chunk_size}

    @cached_property
    def cached(self) -> Ask | None:
        """Contexts that fill a block of the prefix cache; None where none fits, or there is no cache."""
        engine, settings = self.engine, self.settings
        if not engine.caches_prefixes:
            return None
        ids = self.vocabulary.ordinary
        return invariances.cacheable(engine, ids, settings.seed, engine.max_model_len - 1, min(4, settings.max_tokens))

    @cached_property
    def aside(self) -> Aside:
        """Where the reference works."""
        return Aside(self.engine.device_type, self.settings.device)

    @cached_property
    def probes(self) -> list[int]:
        """A few of the trials that are run in any case."""
        count = self.look or len(self.batches)
        return list(range(0, count, count // min(_PROBES, count)))[:_PROBES]

    @cached_property
    def _rounded(self) -> dict[str, torch.Tensor]:
        """The reference's weights in the engine's dtype, where that is the coarser one."""
        dtype = coarser(self.engine.dtype, self.reference.dtype)
        if dtype == self.reference.dtype:
            return {}
        return {name: t.to(dtype).float() for name, t in self.reference.named_tensors()}

    def _begin_noise(self, index: int) -> Callable[[], dict[str, Gaps]]:
        answered, plain = self._kept[index]
        made = partial(
            noise_of, self.reference, answered, plain, self.settings.limits,
            dtype=coarser(self.engine.dtype, self.reference.dtype), head_dtype=self.engine.head_dtype,
            weights=self._rounded, seed=self.settings.seed + self.probes.index(index),
        )  # fmt: skip
        return self.aside.begin(made)

    def noises(self) -> list[dict[str, Gaps]]:
        """Of each probe, of both sides' dtypes. Nothing is under way then."""
        self.probed()
        return [(self._noise.pop(index, None) or self._begin_noise(index))() for index in self.probes]

    def begin(self, index: int, batch: Batch, *, noise: bool = True) -> Callable[[], Trial]:
        """Have the engine answer and the reference begin; what is returned waits for it.

        Probes are kept, and with ``noise`` theirs is begun, for ``noises`` to wait for.
        """
        reference, limits = self.reference, self.settings.limits
        start = time.perf_counter()
        answered = trials.answer(self.engine, batch, turn=index)
        asked = time.perf_counter() - start

        def compared() -> tuple[list[Scored], Gaps]:
            scored = trials.score(answered, reference)
            return scored, trials.compared(answered, scored, limits)

        result = self.aside.begin(compared)

        def finished() -> Trial:
            start = time.perf_counter()
            scored, gaps = result()
            if index in self.probes:
                self._kept[index] = answered, scored
                if noise:
                    self._noise[index] = self._begin_noise(index)
            return Trial(
                index=index, gaps=gaps, sequences=len(batch.prompts), tokens=sum(map(len, answered.sequences)),
                mean_kl=gaps.worst, engine_seconds=asked, seconds=asked + time.perf_counter() - start,
                cached=sum(one.cached for one in answered.sampled),
            )  # fmt: skip

        return finished

    def probed(self) -> list[tuple[Answered, list[Scored]]]:
        """The probes' answers and the plain reference's scores: kept, or had again where another process ran them."""
        for index in self.probes:
            if index not in self._kept:
                self.begin(index, self.batch(self.batches[index], index), noise=False)()
        return [self._kept[index] for index in self.probes]

    def facts(self, found: Sequence[Trial]) -> dict[str, Any]:
        """The engine's own settings, versions, speed: JSON."""
        import platform

        import transformers

        from ...engine.argument_schema import installed

        return {
            "engine": self.engine.everything(),
            "vocabulary": self.engine.vocab_size,
            "parameters": sum(t.numel() for _, t in self.reference.named_tensors()),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "vllm": installed(),
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
            "no_block_fits": self.engine.caches_prefixes and self.cached is None,
            "speed": self._speed(found),
        }

    def _speed(self, found: Sequence[Trial]) -> dict[str, float]:
        """Scored tokens a second of some trials, and of the engine alone on their prompts: seconds enough to tell."""
        tokens, alone, ours = 0, 0.0, 0.0
        self.engine.forget()  # the trials found nothing of theirs in the prefix cache
        for trial in found[:8]:
            start = time.perf_counter()
            tokens += trials.engine_alone(self.engine, self.batch(self.batches[trial.index], trial.index))
            alone += time.perf_counter() - start
            ours += trial.seconds
            if alone > _SECONDS:
                break
        return {"tokens_per_second": tokens / ours, "engine_alone": tokens / alone, "share": alone / ours}


def _grouped(prompts: Iterable[Prompt], settings: CheckSettings) -> Iterator[tuple[Prompt, ...]]:
    """A file's prompts in batches of the largest size, as many as there are trials."""
    prompts = iter(prompts)
    for _ in range(settings.trials):
        batch = tuple(islice(prompts, settings.max_batch))
        if not batch:
            return
        yield batch


def stamp(model: str) -> list[list[Any]] | str:
    """Sizes and times of the model's files, so that a check does not go on with another model of the same name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return sorted([f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in folder.iterdir() if f.is_file())
