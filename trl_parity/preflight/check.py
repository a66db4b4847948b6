"""The whole check: trials first, then what they go back to, then the engine against itself, row by row.

Every stage is kept as soon as it is done, so a check that was killed goes on with the next one.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..engine.bench import BenchEngine, build_engine
from ..engine.live import own_random_numbers
from ..engine.weights import read_back
from ..errors import ConfigError, InterceptionError, ParityError
from ..rules import nearest
from ..variants import config_differences
from . import invariances, lengths, sampling, trials
from .baseline import Baseline, open_baseline
from .cases import Case, Prompt, Vocabulary, read_jsonl
from .engines import TITLES, variant_rows
from .equivalence import (
    Counterfactuals,
    Drift,
    Floors,
    drift_of,
    dtype_name,
    limit_rows,
    mechanism_rows,
    sampled_kl,
)
from .invariances import Ask, Noise
from .journal import Journal
from .reference import Reference
from .rows import Limits, Outcome, Row, Verdict, not_run, outcome
from .statistics import scale_curve
from .trials import Batch, Gaps, Trial

__all__ = ["CheckSettings", "Result", "run_check"]

_PROBES = 4  # trials that are answered again, to try what explains the drift
# the rows each stage makes, and their group; those of lengths depend on the model
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "drift": ("mechanisms", ()),
    "sampling": ("mechanisms", ("logprob_meaning", "sampling")),
    "lengths": ("lengths", ()),
    "own": ("invariances", ("batch", "order", "seed", "prefill_decode")),
    "baseline": ("baseline", ("baseline",)),
    "update": ("invariances", ("update", "update_back")),
    "small blocks": ("invariances", ("prefix_cache", "update_prefix_cache")),
    "engines": ("invariances", tuple(TITLES)),
}
ROWS = (
    "limits", "kl_mean", "kl_max", "pass_rate", "logprobs", "mechanisms", "dtype", "kv_cache", "weights", "config",
    "scale", "positions", "model", "lengths", "invariances", *(id for _, ids in STAGES.values() for id in ids),
)  # fmt: skip
_FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """What is checked and how. All of it decides the numbers, so a check goes on only with all of it alike."""

    model: str
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 50
    seed: int = 0
    temperature: float = 1.0  # the run's: what trials sample at
    trainer_dtype: str = "float32"  # of the weights and the forward the engine is compared with
    max_tokens: int = 16  # sampled after each prompt
    max_length: int = 256  # of a trial's prompts
    max_batch: int = 8
    target_length: int | None = None  # None: half of what the engine takes
    prompts: str | None = None  # JSONL, in place of drawn prompts
    baseline: str | None = None
    case: str | None = None  # one batch, as a failed trial prints it
    skip: tuple[str, ...] = ()  # rows, or whole groups of them
    budget: float = 900.0  # seconds after which nothing new is begun
    device: str = "cpu"  # of the reference
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("trials", "max_tokens", "max_length", "max_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a whole number >= 1.")
        if not 0.01 <= self.temperature <= 100:
            raise ConfigError(
                f"temperature is {self.temperature:g}. Expected 0.01 to 100: greedy answers have no law."
            )
        if self.trainer_dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"trainer dtype is {self.trainer_dtype!r}. Expected float32, bfloat16 or float16.")

        for name in self.skip:
            if name not in ROWS and not name.startswith("length_"):
                raise ConfigError(f"no row or group of rows is called {name!r}{nearest(name, ROWS)}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return json.loads(json.dumps(asdict(self), default=str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rows, and what is needed to read them."""

    rows: tuple[Row, ...]
    settings: CheckSettings
    facts: Mapping[str, Any]  # the engine's own settings, versions, speed
    trials: tuple[Trial, ...]
    resumed: int = 0  # findings of an earlier run that was killed

    @property
    def outcome(self) -> Outcome:
        """Fit, unfit, could not tell."""
        return outcome(self.rows)


Progress = Callable[[str, int, int], None]  # what, done, of


def run_check(settings: CheckSettings, directory: Path | None = None, progress: Progress | None = None) -> Result:
    """Check one engine against the reference and itself.

    With ``directory`` what was found is kept there and an interrupted check goes on. Raises ConfigError for settings
    that can't be used; what fails in the middle of a row is a row that was not run.
    """
    return _Check(settings, directory, progress or (lambda *_: None)).run()


class _Check:
    def __init__(self, settings: CheckSettings, directory: Path | None, progress: Progress):
        self.settings, self._progress = settings, progress
        self._start = time.monotonic()
        self._journal = Journal(directory, settings.to_json() | {"model_files": _stamp(settings.model)})
        self._engine: BenchEngine | None = None
        self._baseline: Baseline | None = None
        if settings.baseline is not None:  # first: a foreign one costs no engine
            self._baseline = open_baseline(settings.baseline, model=settings.model, tokenizer=self.tokenizer)

    # ---- what is built when it is needed ------------------------------------------------------------------------

    @property
    def engine(self) -> BenchEngine:
        if self._engine is None:
            self._progress("starting the engine", 0, 0)
            self._engine = build_engine(self.settings.model, self.settings.engine_args)
        return self._engine

    @cached_property
    def reference(self) -> Reference:
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
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.settings.model)
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(f"transformers can't load the tokenizer of {self.settings.model!r}: {e}") from e

    @cached_property
    def vocabulary(self) -> Vocabulary:
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
    def _strategy(self) -> Any:
        from .prompts import batches

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
            from .prompts import draw

            found = draw(self._strategy, settings.trials, settings.seed)
        for batch in found:
            for prompt in batch:
                if len(prompt.ids) + settings.max_tokens >= self.engine.max_model_len:
                    raise ConfigError(
                        f"a prompt has {len(prompt.ids)} tokens, and {settings.max_tokens} are sampled after it; the "
                        f"engine takes {self.engine.max_model_len}. Expected shorter ones, or fewer --max-tokens."
                    )
        return found

    def batch(self, prompts: Sequence[Prompt], index: int) -> Batch:
        """A trial's request. Seeds depend on its place alone; a case is always the first."""
        return Batch(
            prompts=tuple(p.ids for p in prompts),
            seed=self.settings.seed * 1_000_003 + index * 64,
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
        )

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        try:
            with own_random_numbers():
                found = self._trials()
                rows = list(self._rows(found))
                facts = self._stage_of("facts", self._facts)
        except (RuntimeError, AssertionError) as e:
            if isinstance(e, ParityError):
                raise
            raise InterceptionError(f"the engine or the reference broke: {type(e).__name__}: {e}") from e
        finally:
            self._close()
        self._journal.put("end")
        return Result(
            rows=tuple(rows), settings=self.settings, facts=facts["value"], trials=tuple(found),
            resumed=self._journal.resumed,
        )  # fmt: skip

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _rows(self, found: Sequence[Trial]) -> Iterator[Row]:
        gaps = sum((t.gaps for t in found), Gaps())
        floors = self._floors()
        drift = Drift(gaps, floors, self.settings.limits)
        about = self._stage("drift", lambda: self._drift_rows(drift))
        yield from self._reproducible(about, found)
        asked_for = self._stage_of("count", lambda: len(self.batches))["value"]
        if len(found) < asked_for:
            why = f"{len(found)} of {asked_for} trials were run; no time left (--budget)"
            yield not_run("trials", "limits", "all trials", why, needed=True)
        noise = Noise(sampled_kl(floors.engine), floors.engine_dtype, self.settings.limits)
        positional = any(r.id == "positions" and r.verdict is Verdict.FAIL for r in about)
        yield from self._stage("sampling", lambda: self._sampling_rows(noise))
        if self.settings.case is not None:
            return
        yield from self._stage("lengths", lambda: self._length_rows(drift, positional))
        yield from self._stage("own", lambda: self._own_rows(noise))
        if self.settings.baseline is not None:
            yield from self._stage("baseline", lambda: self._baseline_rows(noise, floors))
        facts = self._stage_of("facts", self._facts)  # while the engine is there
        if self._journal.get("engines") is None:
            _ = self._base, self._shape  # before the engine is given other weights
        yield from self._stage("update", lambda: self._update_rows(noise))
        if facts["value"]["no_block_fits"]:
            yield from self._stage("small blocks", lambda: self._small_block_rows(noise))
        yield from self._stage("engines", lambda: self._engine_rows(noise))

    def _wants(self, id: str, group: str) -> bool:
        return id not in self.settings.skip and group not in self.settings.skip

    def _left(self) -> float:
        return self.settings.budget - (time.monotonic() - self._start)

    def _stage(self, name: str, make: Callable[[], Iterable[Row]]) -> list[Row]:
        """Rows of a stage: those of an earlier run of the check, or made now and kept.

        What breaks, is left out, or has no time left is not run, and never a pass.
        """
        if (known := self._journal.get(name)) is not None:
            return [Row.from_json(row) for row in known["rows"]]
        group, ids = STAGES[name]
        rows: list[Row] = []
        why, needed = "", True
        if name != "drift" and not any(self._wants(id, group) for id in ids or (group,)):
            why, needed = "left out (--skip)", False
        elif self._left() <= 0 and name != "drift":
            why = "no time left (--budget)"
        else:
            self._progress(name, 0, 0)
            try:
                for row in make():
                    out = replace(row, verdict=Verdict.NOT_RUN, value=None, fix="", needed=False)
                    told = self._wants(row.id, row.group)
                    rows.append(row if told else replace(out, evidence="left out (--skip)"))
            except ParityError:
                raise
            except Exception as e:
                why = f"{type(e).__name__}: {str(e)[:300]}"
        if why:
            done = {row.id for row in rows}
            rows += [not_run(id, group, id, why, needed=needed) for id in ids or (name,) if id not in done]
        self._journal.put(name, rows=[row.to_json() for row in rows])
        return rows

    def _stage_of(self, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        return self._journal.get(name) or self._journal.put(name, value=make())

    # ---- trials -------------------------------------------------------------------------------------------------

    def _trials(self) -> list[Trial]:
        count = self._stage_of("count", lambda: len(self.batches))["value"]
        found: list[Trial] = []
        for index in range(count):
            known = self._journal.get(f"trial {index}")
            if known is None:
                if found and self._left() <= 0:
                    break
                batch = self.batch(self.batches[index], index)
                if index == 0:  # what is compiled or set up on first use is no part of the speed
                    trials.run_trial(index, batch, self.engine, self.reference, self.settings.limits)
                trial = trials.run_trial(index, batch, self.engine, self.reference, self.settings.limits)
                known = self._journal.put(f"trial {index}", **trial.to_json())
            found.append(Trial.from_json({k: v for k, v in known.items() if k != "kind"}))
            self._progress("trials", index + 1, count)
        return found

    @cached_property
    def _answered(self) -> list[trials.Answered]:
        """A few trials answered again: the same requests."""
        spread = len(self.batches) // min(_PROBES, len(self.batches))
        picked = list(range(0, len(self.batches), spread))[:_PROBES]
        return [trials.answer(self.engine, self.batch(self.batches[i], i), turn=i) for i in picked]

    def _floors(self) -> Floors:
        value = self._stage_of("floors", self._measure_floors)["value"]
        return Floors(
            Gaps.from_json(value["trainer"]),
            Gaps.from_json(value["engine"]),
            value["trainer_dtype"],
            value["engine_dtype"],
        )

    def _measure_floors(self) -> dict[str, Any]:
        self._progress("noise floor", 0, 0)
        engine, reference = self.engine, self.reference
        trainer, mine = reference.dtype, engine.dtype
        coarser = mine if torch.finfo(mine).eps > torch.finfo(trainer).eps else trainer
        rounded = {}
        if coarser != trainer:
            rounded = {name: t.to(coarser).float() for name, t in reference.named_tensors()}
        heads = {"trainer": trainer, "engine": engine.head_dtype}
        out = {"trainer": Gaps(), "engine": Gaps()}
        for number, answered in enumerate(self._answered):
            plain = trials.score(answered, reference)
            for side, dtype in (("trainer", trainer), ("engine", coarser)):
                with reference.holding(rounded if side == "engine" else {}), reference.rounded(
                    dtype, heads[side], seed=self.settings.seed + number
                ):  # fmt: skip
                    noisy = trials.score(answered, reference)
                out[side] += trials.against_itself(answered, noisy, plain, self.settings.limits)
        return {side: gaps.to_json() for side, gaps in out.items()} | {
            "trainer_dtype": dtype_name(trainer),
            "engine_dtype": dtype_name(coarser),
        }

    # ---- rows ---------------------------------------------------------------------------------------------------

    def _drift_rows(self, drift: Drift) -> Iterator[Row]:
        yield from limit_rows(drift)
        if not any(drift.gaps.curve):  # no whole law at temperature 1 among the trials
            laws = sampling.own_laws(self.engine, self._contexts[:6])
            scored = self.reference.score(self._contexts[:6], [torch.tensor([len(c) - 1]) for c in self._contexts[:6]])
            theirs = torch.cat([one.laws for one in scored if one.laws is not None])
            drift = replace(drift, gaps=replace(drift.gaps, curve=scale_curve(laws, theirs).tolist()))
        differs = config_differences(self.reference.config, self.engine.hf_config)
        held, error = self._held()
        yield from mechanism_rows(
            drift,
            self._what_if(drift, differs, held),
            settings=self.engine.settings(),
            config_differs={k: [str(x) for x in v] for k, v in differs.items()},
            held=held,
            held_error=error,
        )

    def _held(self) -> tuple[list[Any] | None, str]:
        engine = self.engine
        if engine.tensor_parallel > 1 or engine.settings()["quantization"] is not None:
            return None, "the engine's weights are quantized or spread over ranks: they can't be read back"
        named = {name: t.to(self.reference.dtype) for name, t in self.reference.named_tensors()}
        try:
            held = read_back(engine.model.load_weights, engine.model, named.items())
            # an engine of more digits than the trainer has: alike once rounded, and delivered so by the first sync
            return [
                replace(t, differing=0) if t.values is not None and torch.equal(t.values, named[t.name]) else t
                for t in held
            ], ""
        except Exception as e:
            return None, f"the engine's load_weights does not take the trainer's tensors: {type(e).__name__}: {e}"

    def _what_if(self, drift: Drift, differs: Mapping[str, Any], held: Sequence[Any] | None) -> Counterfactuals:
        if not drift.excessive:
            return Counterfactuals(0.0, 0.0, {})
        self._progress("what explains the drift", 0, 0)
        reference, undone = self.reference, {}

        def left() -> float:
            gaps = sum((trials.compare(a, reference, self.settings.limits) for a in self._answered), Gaps())
            return drift_of(gaps)

        base = left()
        told = _FP8.get(str(self.engine.settings()["kv_cache_dtype"]))
        for name, truncated in (("float8_e4m3fn", False), ("float8_e5m2", False), ("float8_e5m2", True)):
            if told in (None, name):  # told nothing, the engine may still do it
                with reference.cached_in(getattr(torch, name), truncated):
                    undone[f"kv:{name}{', towards zero' if truncated else ''}"] = left()
        if differs:
            try:
                with reference.built_from(self.engine.hf_config):
                    undone["config"] = left()
            except Exception:  # a config this class of model can't be built from: the row says what differs
                pass
        values = {t.name: t.values for t in held or () if t.differing and t.values is not None}
        if values:
            with reference.holding(values):
                undone["weights"] = left()
        return Counterfactuals(base, drift_of(drift.floors.engine), undone)

    def _reproducible(self, rows: Sequence[Row], found: Sequence[Trial]) -> list[Row]:
        """The rows that failed on trials, with the command that reproduces the worst of them."""
        failed = [r for r in rows if r.verdict is Verdict.FAIL and r.group == "limits"]
        if not failed:
            return list(rows)
        worst = max(found, key=lambda t: t.mean_kl)
        text = self._stage_of("case", lambda: self._shrunk(worst.index))["value"]
        return [replace(r, reproduce=f"--case {text}") if r in failed or r.id == "model" else r for r in rows]

    def _shrunk(self, index: int) -> str:
        """The worst trial's batch as small as a short search makes it."""
        batch = self.batches[index]
        if self.settings.case is None and self.settings.prompts is None:
            from .prompts import shrink

            self._progress("shrinking the worst case", 0, 0)
            limits = self.settings.limits
            most = max(limits.least_kl, limits.k * sampled_kl(self._floors().engine))

            def fails(prompts: tuple[Prompt, ...]) -> bool:
                trial = trials.run_trial(0, self.batch(prompts, 0), self.engine, self.reference, limits)
                return not trial.mean_kl <= most

            batch = shrink(self._strategy, fails, self.settings.seed, min(20.0, max(1.0, self._left() / 4)), batch)
        return Case(batch).to_text()

    @cached_property
    def _contexts(self) -> list[tuple[int, ...]]:
        """Contexts for the engine alone: short and middling ones, random."""
        rng = random.Random(f"{self.settings.seed}:contexts")
        ids = self.vocabulary.ordinary
        return [tuple(rng.choices(ids, k=min(self.room, n))) for n in (4, 9, 16, 23, 7, 30, 12, 19, 27, 5, 14, 32)]

    def _sampling_rows(self, noise: Noise) -> Iterator[Row]:
        settings = self.settings
        few = self._contexts if self.engine.vocab_size <= 8192 else self._contexts[:6]
        yield sampling.meaning_row(self.engine, few, settings.temperature, noise.kl, settings.limits)
        yield sampling.sampling_row(self.engine, few, settings.temperature, settings.seed)

    def _length_rows(self, drift: Drift, positional: bool) -> Iterator[Row]:
        settings, longest = self.settings, self.engine.max_model_len
        target = settings.target_length or longest // 2
        looked_at = lengths.points(
            self.reference.text_config, target, longest, asked_for=settings.target_length is not None
        )
        looked_at = [p for p in looked_at if self._wants(p.id, "lengths")]
        if self._left() <= 0:
            yield from (not_run(p.id, "lengths", p.title, "no time left (--budget)", needed=True) for p in looked_at)
            return
        yield from lengths.length_rows(
            self.engine, self.reference, looked_at, self.vocabulary.ordinary, settings.limits,
            seed=settings.seed, positional=positional, usual=drift.gaps.half_square,
        )  # fmt: skip

    @cached_property
    def _ask(self) -> Ask:
        rng = random.Random(f"{self.settings.seed}:ask")
        room = min(self.room, 200)
        wanted = sorted({min(room, n) for n in (1, 3, 15, 16, 17, 40, room // 2, room)})
        contexts = tuple(tuple(rng.choices(self.vocabulary.ordinary, k=n)) for n in wanted)
        return Ask(contexts, tuple(range(len(contexts))), self.settings.max_tokens)

    @cached_property
    def _base(self) -> list[Any]:
        return invariances.asked(self.engine, self._ask)

    @cached_property
    def _shape(self) -> dict[str, int]:
        engine = self.engine
        return {"eager": engine.eager, "block_size": engine.block_size, "chunk_size": engine.chunk_size}

    @cached_property
    def _cached(self) -> Ask | None:
        engine, settings = self.engine, self.settings
        if not engine.caches_prefixes:
            return None
        ids = self.vocabulary.ordinary
        return invariances.cacheable(engine, ids, settings.seed, engine.max_model_len - 1, min(4, settings.max_tokens))

    def _own_rows(self, noise: Noise) -> Iterator[Row]:
        yield from invariances.own_rows(self.engine, self._ask, self._base, noise)
        if not self.engine.caches_prefixes:
            title = invariances.PREFIX_TITLE
            yield not_run("prefix_cache", "invariances", title, "the engine keeps no prefix cache", needed=False)
        elif self._cached is not None:
            yield invariances.prefix_row(self.engine, self._cached, noise)

    def _update_rows(self, noise: Noise) -> Iterator[Row]:
        yield from invariances.update_rows(
            self.engine, self.reference, self._ask, self._cached, noise, self.settings.seed
        )

    def _engine_rows(self, noise: Noise) -> Iterator[Row]:
        wanted = [id for id in TITLES if self._wants(id, "invariances")]
        if not wanted:
            return
        base, ask, shape = self._base, self._ask, self._shape
        self._close()  # engines of one process share their process group: one at a time

        def build(over: Mapping[str, Any]) -> BenchEngine:
            return build_engine(self.settings.model, {**self.settings.engine_args, **over})

        for done, row in enumerate(variant_rows(build, shape, ask, base, noise, self._left, wanted), 1):
            self._progress("other engines", done, len(wanted))
            yield row

    def _baseline_rows(self, noise: Noise, floors: Floors) -> Iterator[Row]:
        from .against_baseline import baseline_row

        assert self._baseline is not None
        yield baseline_row(self.engine, self._baseline, noise, floors.engine.half_square)

    def _small_block_rows(self, noise: Noise) -> Iterator[Row]:
        """Prefix rows on an engine of small cache blocks, where no context fills one of this engine's."""
        titles = {"prefix_cache": invariances.PREFIX_TITLE, "update_prefix_cache": invariances.UPDATE_TITLES[1]}
        block = self.engine.block_size
        self._close()
        why = f"no context fills a cache block of {block} tokens and leaves room to answer"
        while (block := block // 2) >= 16:
            try:
                self._engine = build_engine(
                    self.settings.model, {**self.settings.engine_args, "block_size": block, "enforce_eager": True}
                )
            except ParityError as e:
                why += f"; blocks of {block}: {str(e).splitlines()[0]}"
                continue
            self.__dict__.pop("_cached")
            if self._cached is None:
                self._close()
                continue
            words = f"{why}; so in an engine with blocks of {block}: "
            rows = [invariances.prefix_row(self.engine, self._cached, noise)]
            rows += [
                row
                for row in invariances.update_rows(
                    self.engine, self.reference, self._ask, self._cached, noise, self.settings.seed
                )
                if row.id in titles
            ]
            yield from (replace(row, evidence=words + row.evidence) for row in rows)
            self._close()
            return
        yield from (not_run(id, "invariances", title, why, needed=False) for id, title in titles.items())

    # ---- facts --------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        import platform

        import transformers
        import vllm

        return {
            "engine": self.engine.everything(),
            "vocabulary": self.engine.vocab_size,
            "parameters": sum(t.numel() for _, t in self.reference.named_tensors()),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "vllm": vllm.__version__,
                "python": platform.python_version(),
            },
            "threads": torch.get_num_threads(),
            "no_block_fits": self.engine.caches_prefixes and self._cached is None,
            "speed": self._speed(),
        }

    def _speed(self) -> dict[str, float]:
        """Scored tokens a second: of the trials, and of the engine alone on the prompts of some of them."""
        tokens, alone, ours = 0, 0.0, 0.0
        for i in range(min(8, len(self.batches))):
            batch = self.batch(self.batches[i], i)
            start = time.perf_counter()
            tokens += trials.engine_alone(self.engine, batch)
            between = time.perf_counter()
            trials.run_trial(i, batch, self.engine, self.reference, self.settings.limits)
            alone += between - start
            ours += time.perf_counter() - between
        return {"tokens_per_second": tokens / ours, "engine_alone": tokens / alone, "share": alone / ours}


def _grouped(prompts: Iterable[Prompt], settings: CheckSettings) -> Iterator[tuple[Prompt, ...]]:
    """A file's prompts in batches of the largest size, as many as there are trials."""
    from itertools import islice

    prompts = iter(prompts)
    for _ in range(settings.trials):
        batch = tuple(islice(prompts, settings.max_batch))
        if not batch:
            return
        yield batch


def _stamp(model: str) -> list[list[Any]] | str:
    """Sizes and times of the model's files, so that a check does not go on with another model of the same name."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    return sorted([f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in folder.iterdir() if f.is_file())
