"""The whole check: trials first, then what they go back to, then the engine against itself, row by row.

Every stage is kept as soon as it is done, so a check that was killed goes on with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from ...engine.offline import BenchEngine
from ...errors import InterceptionError, ParityError
from ...scoring.perturb import config_differences, own_random_numbers
from ..baseline.baseline import Baseline, open_baseline
from ..prompts.cases import Case, Prompt
from . import invariances, lengths, sampling, sequential, trials
from .drift import Counterfactuals, Drift, Floors, Gaps, sampled_kl
from .engines import variant_rows
from .equivalence import limit_rows, mechanism_rows
from .explain import held_tensors, measure_floors, what_if
from .invariances import Noise
from .journal import Journal
from .rows import Row, RowVerdict, not_run
from .settings import EARLY_ERROR, STAGES, TITLES, CheckSettings, Result
from .statistics import scale_curve
from .subject import Progress, Subject, stamp
from .trials import Trial

__all__ = ["run_check"]


def run_check(settings: CheckSettings, directory: Path | None = None, progress: Progress | None = None) -> Result:
    """Check one engine against the reference and itself.

    With ``directory`` what was found is kept there and an interrupted check goes on. Raises ConfigError for settings
    that can't be used; what fails in the middle of a row is a row that was not run.
    """
    return _Check(settings, directory, progress or (lambda *_: None)).run()


_NO_TIME = "no time left (--budget)"


class _Check:
    def __init__(self, settings: CheckSettings, directory: Path | None, progress: Progress):
        self.settings, self._progress = settings, progress
        self._start = time.monotonic()
        self.subject = Subject(settings, progress)
        self._complete = True
        self._baseline: Baseline | None = None
        # what can't be used is said before an engine is built or a file is written
        if settings.case is not None:
            Case.from_text(settings.case)
        if settings.baseline is not None:
            self._baseline = open_baseline(settings.baseline, model=settings.model, tokenizer=self.subject.tokenizer)
        told = settings.to_json()
        del told["budget"]  # it decides no number
        if settings.early_error == EARLY_ERROR:
            del told["early_error"]  # as in what was begun before there was such a setting
        self._journal = Journal(directory, told | {"model_files": stamp(settings.model)})

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        try:
            with own_random_numbers():
                found = self._trials()
                rows = list(self._rows(found))
                facts = self._facts(found)
        except (RuntimeError, AssertionError) as e:
            if isinstance(e, ParityError):
                raise
            raise InterceptionError(f"the engine or the reference broke: {type(e).__name__}: {e}") from e
        finally:
            self.subject.end()
        if self._complete and self._enough(found):
            self._journal.put("end")  # the same command starts over
        return Result(
            rows=tuple(rows), settings=self.settings, facts=facts["value"], trials=tuple(found),
            resumed=self._journal.resumed,
        )  # fmt: skip

    def _rows(self, found: Sequence[Trial]) -> Iterator[Row]:
        floors, drift = self._floors(), self._drift([trial.gaps for trial in found])
        about = self._stage("drift", lambda: self._drift_rows(drift))
        yield from self._reproducible(about, found)
        if not self._enough(found):
            why = f"{len(found)} of {self._count} trials were run; no time left (--budget)"
            yield not_run("trials", "limits", "all trials", why, needed=True)
        noise = Noise(sampled_kl(floors.engine), floors.engine_dtype, self.settings.limits)
        positional = any(r.id == "positions" and r.verdict is RowVerdict.FAIL for r in about)
        yield from self._stage("sampling", lambda: self._sampling_rows(noise))
        if self.settings.case is not None:
            return
        yield from self._stage("lengths", lambda: self._length_rows(drift, positional))
        yield from self._stage("own", lambda: self._own_rows(noise))
        if self.settings.baseline is not None:
            yield from self._stage("baseline", lambda: self._baseline_rows(noise, floors))
        facts = self._facts(found)  # while the engine is there
        if self._journal.get("engines") is None and any(self._wants(id, "invariances") for id in TITLES):
            _ = self.subject.base, self.subject.shape  # before the engine is given other weights
            if self._wants("chunked_prefill", "invariances"):
                _ = self.subject.chunked
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
            why = _NO_TIME
        else:
            self._progress(name, 0, 0)
            try:
                for row in make():
                    out = replace(row, verdict=RowVerdict.NOT_RUN, value=None, fix="", needed=False)
                    told = self._wants(row.id, row.group)
                    rows.append(row if told else replace(out, evidence="left out (--skip)"))
            except ParityError:
                raise
            except Exception as e:
                why = f"{type(e).__name__}: {str(e)[:300]}"
        if why:
            done = {row.id for row in rows}
            rows += [not_run(id, group, id, why, needed=needed) for id in ids or (name,) if id not in done]
        if why != _NO_TIME:  # the same command has time again
            self._journal.put(name, rows=[row.to_json() for row in rows])
        else:
            self._complete = False
        return rows

    def _stage_of(self, name: str, make: Callable[[], Any]) -> dict[str, Any]:
        return self._journal.get(name) or self._journal.put(name, value=make())

    # ---- trials -------------------------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return int(self._stage_of("count", lambda: len(self.subject.batches))["value"])

    @property
    def _look(self) -> int | None:
        """After how many trials they may end."""
        look: int | None = self._stage_of("plan", lambda: self.subject.look)["value"]
        return look

    def _trials(self) -> list[Trial]:
        """The engine answers one batch while the reference scores the one before."""
        subject, look, count = self.subject, self._look, self._count
        known = takewhile(lambda line: line is not None, (self._journal.get(f"trial {i}") for i in range(count)))
        found = [Trial.from_json({k: v for k, v in line.items() if k != "kind"}) for line in known if line]
        under_way: Callable[[], Trial] | None = None
        for index in range(len(found), count):
            if index == look:
                found += self._finished(under_way)
                under_way = None
                if self._settled(found):
                    break
            if (found or under_way) and self._left() <= 0:
                break
            batch = subject.batch(subject.batches[index], index)
            if index == 0:  # what is compiled or set up on first use is no part of the speed
                trials.compare(trials.answer(subject.engine, batch), subject.reference, self.settings.limits)
            begun = subject.begin(index, batch)
            found += self._finished(under_way)
            under_way = begun
        return found + self._finished(under_way)

    def _finished(self, under_way: Callable[[], Trial] | None) -> list[Trial]:
        """The trial under way, if one is, once it is over and kept."""
        if under_way is None:
            return []
        trial = under_way()
        self._journal.put(f"trial {trial.index}", **trial.to_json())
        look, done = self._look, trial.index + 1
        self._progress("trials", done, look if look is not None and done <= look else self._count)
        return [trial]

    def _settled(self, found: Sequence[Trial]) -> bool:
        each = [trial.gaps for trial in found]
        drift, error = self._drift(each), self.settings.early_error
        return bool(self._stage_of("look", lambda: sequential.settled(drift, each, error))["value"])

    def _enough(self, found: Sequence[Trial]) -> bool:
        """Whether all trials were run that have to be."""
        look = self._journal.get("look")
        return len(found) == self._count or (look is not None and look["value"])

    def _drift(self, each: Sequence[Gaps]) -> Drift:
        early = 0.0 if self._look is None else self.settings.early_error
        return Drift(sum(each, Gaps()), self._floors(), self.settings.limits, early)

    def _facts(self, found: Sequence[Trial]) -> dict[str, Any]:
        return self._stage_of("facts", lambda: self.subject.facts(found))

    def _floors(self) -> Floors:
        value = self._stage_of("floors", lambda: measure_floors(self.subject))["value"]
        return Floors(
            Gaps.from_json(value["trainer"]),
            Gaps.from_json(value["engine"]),
            value["trainer_dtype"],
            value["engine_dtype"],
        )

    # ---- rows ---------------------------------------------------------------------------------------------------

    def _drift_rows(self, drift: Drift) -> Iterator[Row]:
        yield from limit_rows(drift)
        if not any(drift.gaps.curve):  # no whole law at temperature 1 among the trials
            few = self.subject.contexts[:6]
            laws = sampling.own_laws(self.subject.engine, few)
            scored = self.subject.reference.score(few, [torch.tensor([len(ids) - 1]) for ids in few])
            theirs = torch.cat([one.laws for one in scored if one.laws is not None])
            drift = replace(drift, gaps=replace(drift.gaps, curve=scale_curve(laws, theirs).tolist()))
        differs = config_differences(self.subject.reference.config, self.subject.engine.hf_config)
        held, error, needed = held_tensors(self.subject)
        yield from mechanism_rows(
            drift,
            what_if(self.subject, drift, differs, held) if drift.excessive else Counterfactuals(0.0, 0.0, {}),
            settings=self.subject.engine.settings(),
            config_differs={k: [str(x) for x in v] for k, v in differs.items()},
            held=held,
            held_error=error,
            held_needed=needed,
        )

    def _reproducible(self, rows: Sequence[Row], found: Sequence[Trial]) -> list[Row]:
        """The rows that failed on trials, with the command that reproduces the worst of them."""
        failed = [r for r in rows if r.verdict is RowVerdict.FAIL and r.group == "limits"]
        if not failed:
            return list(rows)
        worst = max(found, key=lambda t: t.mean_kl)
        text = self._stage_of("case", lambda: self._shrunk(worst.index))["value"]
        return [replace(r, reproduce=f"--case {text}") if r in failed or r.id == "model" else r for r in rows]

    def _shrunk(self, index: int) -> str:
        """The worst trial's batch as small as a short search makes it."""
        batch = self.subject.batches[index]
        if self.settings.case is None and self.settings.prompts is None:
            from ..prompts.prompts import shrink

            self._progress("shrinking the worst case", 0, 0)
            limits = self.settings.limits
            most = max(limits.least_kl, limits.k * sampled_kl(self._floors().engine))

            def fails(prompts: tuple[Prompt, ...]) -> bool:
                batch = self.subject.batch(prompts, 0)
                return not trials.drift_of_samples(self.subject.engine, self.subject.reference, batch) <= most

            spent = time.monotonic() - self._start
            seconds = max(1.0, min(20.0, self._left() / 4, spent / 2))
            batch = shrink(self.subject.drawing, fails, self.settings.seed, seconds, batch)
        return Case(batch).to_text()

    def _sampling_rows(self, noise: Noise) -> Iterator[Row]:
        settings = self.settings
        few = self.subject.contexts if self.subject.engine.vocab_size <= 8192 else self.subject.contexts[:6]
        yield sampling.meaning_row(self.subject.engine, few, settings.temperature, noise.kl, settings.limits)
        yield sampling.sampling_row(self.subject.engine, few, settings.temperature, settings.seed)

    def _length_rows(self, drift: Drift, positional: bool) -> Iterator[Row]:
        settings, longest = self.settings, self.subject.engine.max_model_len
        target = settings.target_length or longest // 2
        looked_at = lengths.points(
            self.subject.reference.text_config, target, longest, asked_for=settings.target_length is not None
        )
        looked_at = [p for p in looked_at if self._wants(p.id, "lengths")]
        yield from lengths.length_rows(
            self.subject.engine, self.subject.reference, looked_at, self.subject.vocabulary.ordinary, settings.limits,
            self.subject.aside, seed=settings.seed, positional=positional, usual=drift.gaps.half_square,
        )  # fmt: skip

    def _own_rows(self, noise: Noise) -> Iterator[Row]:
        yield from invariances.own_rows(self.subject.engine, self.subject.ask, self.subject.base, noise)
        if not self.subject.engine.caches_prefixes:
            title = invariances.PREFIX_TITLE
            yield not_run("prefix_cache", "invariances", title, "the engine keeps no prefix cache", needed=False)
        elif self.subject.cached is not None:
            yield invariances.prefix_row(self.subject.engine, self.subject.cached, noise)

    def _update_rows(self, noise: Noise) -> Iterator[Row]:
        yield from invariances.update_rows(
            self.subject.engine,
            self.subject.reference,
            self.subject.ask,
            self.subject.base,
            self.subject.cached,
            noise,
            self.settings.seed,
        )

    def _engine_rows(self, noise: Noise) -> Iterator[Row]:
        wanted = [id for id in TITLES if self._wants(id, "invariances")]
        if not wanted:
            return
        base, ask, shape = self.subject.base, self.subject.ask, self.subject.shape
        chunked = self.subject.chunked if "chunked_prefill" in wanted else None
        self.subject.close()  # engines of one process share their process group: one at a time

        def build(over: Mapping[str, Any]) -> BenchEngine:
            return self.subject.build(**over)

        made = variant_rows(
            build, shape, ask, base, noise, self._left, wanted, chunked=chunked, other_block=self.subject.other_block
        )
        for done, row in enumerate(made, 1):
            self._progress("other engines", done, len(wanted))
            yield row

    def _baseline_rows(self, noise: Noise, floors: Floors) -> Iterator[Row]:
        from .against_baseline import baseline_row

        assert self._baseline is not None
        yield baseline_row(self.subject.engine, self._baseline, noise, floors.engine.half_square)

    def _small_block_rows(self, noise: Noise) -> Iterator[Row]:
        """Prefix rows on an engine of small cache blocks, where no context fills one of this engine's."""
        titles = {"prefix_cache": invariances.PREFIX_TITLE, "update_prefix_cache": invariances.UPDATE_TITLES[1]}
        block = self.subject.engine.block_size
        self.subject.close()
        why = f"no context fills a cache block of {block} tokens and leaves room to answer"
        while (block := block // 2) >= 16:
            try:
                self.subject.replace(block_size=block, enforce_eager=True)
            except ParityError as e:
                why += f"; blocks of {block}: {str(e).splitlines()[0]}"
                continue
            if self.subject.cached is None:
                self.subject.close()
                continue
            words = f"{why}; so in an engine with blocks of {block}: "
            engine, cached = self.subject.engine, self.subject.cached
            if self._wants("block_size", "invariances"):
                self.subject.other_block = invariances.asked(engine, self.subject.ask), engine.block_size
            rows = (
                invariances.prefix_row(engine, cached, noise),
                invariances.update_prefix_row(engine, self.subject.reference, cached, noise, self.settings.seed),
            )
            yield from (replace(row, evidence=words + row.evidence) for row in rows)
            self.subject.close()
            return
        yield from (not_run(id, "invariances", title, why, needed=False) for id, title in titles.items())
