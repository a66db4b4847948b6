"""From a drift to its cause: probes cheapest first, the one that explains most is named, what remains is asked again.

All decisions come from residuals gathered over ranks, so every rank runs the same probes and names the same cause.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..causes import CAUSES
from ..collectives import gather_rows
from ..records import Diagnosis, Evidence, NamedCause
from .agreement import agreed, counts, unseen_law
from .counterfactual import Counterfactual, DiagnosedBatch
from .duplicates import collisions, duplicates_in_words
from .findings import NOTHING
from .probes import PROBES
from .probes.asking import prefill_of
from .probes.base import COSTS, FREE, Candidate, NothingThere, NotPossible, Probe, Unexplained, recomputed
from .probes.rescore import sampling_alone
from .profiles import drift_profiles
from .selection import (
    EXACT,
    FIRST,
    NAMED,
    RESAMPLES,
    Result,
    best_of,
    chance_in,
    confidence_in,
    mean,
    not_excluded,
    rivals_of,
    shares_of,
)

__all__ = ["diagnose"]

logger = logging.getLogger(__name__)

_ROUNDS = 3  # causes looked for, one after the other

_LATER = 0.5  # share of what remains that a further cause must explain

_ENOUGH = 0.9  # explained for sure: dearer probes are left out

_OF_THE_MODEL = frozenset({
    "stale_weights", "partial_sync", "model_definition", "engine_state", "dtype_gap", "kv_cache_precision",
    "trainer_numerics",
})  # fmt: skip

_NEAR = 0.1  # of the excess: what explains less is not close

_LEFT = 0.2  # of the excess: less is not looked into


def diagnose(
    batch: DiagnosedBatch,
    step: int,
    *,
    budget: float | None = None,
    ranks: int = 1,
    probes: Sequence[Probe] | None = None,
    alarmed: bool = True,
    health: Sequence[NamedCause] = (),
) -> Diagnosis:
    """Name the cause of the drift in a batch. A collective: all ranks call it with theirs.

    ``budget``: seconds; once they are spent, probes beyond those on one recompute are left out, and then nothing is
    named: what time was there does not decide what is true (None: no bound). ``probes``: None: all there are. A probe
    that fails or is not possible here is an entry in the evidence, and a reason for doubt (``confidence_in``).
    ``alarmed``: a drift is over a limit; else only a drift that chance does not raise over the floor is looked into.
    ``health``: what the run's windows tell of by themselves, to be named where the two sides agree.
    """
    runner = _ProbeRunner(batch, PROBES if probes is None else probes, budget, ranks)
    current = batch.start
    batch.passes.prepare(batch.temperature)
    sums = runner.gathered(batch.residual(current)[0])
    drift = mean(sums)
    details: dict[str, Any] = {
        "residual": drift, "floor": batch.floor, "tokens": int(sums[:, 1].sum()), "sequences": len(sums),
    }  # fmt: skip
    chance = 0.0 if alarmed else chance_in(sums, runner.copies())
    if drift - chance <= batch.floor or not len(sums):
        found, unseen = runner.agreement()
        details |= {"chance": chance if chance < math.inf else None, "seconds": runner.seconds}
        return agreed(step, found, details, unseen, health)
    explained = _Explained()
    evidence: list[Evidence] = []
    for turn in range(_ROUNDS):
        results = runner.run(current, turn)
        evidence += [result.evidence for result in results]
        if late := [result.probe.name for result in results if result.unasked == "time"]:
            details |= {"left_out": late, "seconds": runner.seconds}
            return _unfinished(step, explained, late, evidence, details)
        best = best_of(results)
        if best is None or best.share < (FIRST if turn == 0 else _LATER):
            break
        explained.add(best, results, runner.excluded(best))
        if best.candidate is not None:
            current = best.candidate.counterfactual
        if explained.remaining < _LEFT or best.probe.cost == "last":
            break
    if explained.as_well:
        details["as_well"] = list(explained.as_well)
    if explained.unasked:
        details["unasked"] = list(explained.unasked)
    details |= {**drift_profiles(batch, batch.start), **runner.findings.details(), "seconds": runner.seconds}
    return explained.diagnosis(step, evidence, details)


class _ProbeRunner:
    """Runs probes one after the other, on all ranks at once, and hands on what they find."""

    def __init__(self, batch: DiagnosedBatch, probes: Sequence[Probe], budget: float | None, ranks: int):
        self._batch, self._probes, self._budget, self._ranks = batch, probes, budget, ranks
        self._start, self._spent = time.perf_counter(), 0.0  # the latter as of the slowest rank when they last met
        self.findings = NOTHING  # of this rank
        self._models_agree = False  # by prefill, before anything is sampled; as most ranks saw it

    @property
    def seconds(self) -> float:
        """Since the diagnosis began."""
        return time.perf_counter() - self._start

    def gathered(self, sums: torch.Tensor) -> torch.Tensor:
        """(sequences, 2) of all ranks."""
        rows = self._gather({"sums": sums.tolist()})
        return torch.tensor([s for row in rows for s in row["sums"]], dtype=torch.float64).reshape(-1, 2)

    def copies(self) -> float:
        """How many rows a draw has, on average, over all ranks; infinite where their draws are no independent ones."""
        rollout = self._batch.rollout
        rows = self._gather({"told": [*collisions(rollout), int(rollout.engine_mask.any(1).sum())]})
        pairs, equal, chance, sequences = (sum(row["told"][i] for row in rows) for i in range(4))
        if duplicates_in_words(pairs, equal, chance):
            return math.inf
        return 1.0 + 2.0 * equal / max(1, sequences)

    def agreement(self) -> tuple[list[list[float]], tuple[str, str]]:
        """What each rank's batch tells of a run whose two sides agree: ``counts``; ``unseen_law``, of any rank."""
        unseen = ("", "")
        try:
            unseen = unseen_law(self._batch)
        except Exception as e:  # a server that is gone, on the rank that talks to it: the others do not wait
            logger.debug("the engine's settings could not be read: %s", e)
        rows = self._gather({"counts": counts(self._batch.rollout), "unseen": unseen})
        cause, words = next((row["unseen"] for row in rows if row["unseen"][0]), unseen)
        return [row["counts"] for row in rows], (cause, words)

    def run(self, current: Counterfactual, turn: int) -> list[Result]:
        """Probes cheapest first, until one explains enough for sure. ``turn``: causes that are explained already."""
        results: list[Result] = []
        for cost in COSTS:
            if turn and cost == "last":
                continue
            results += [self._result(probe, current, turn) for probe in self._probes if probe.cost == cost]
            best = best_of(results)
            if best is not None and best.probe.fitted and cost == "fit":
                results = self._checked(current, best, results)
                best = best_of(results)
            if best is not None and best.sure >= _ENOUGH:
                break
            if cost == "repeat" and current.forward is None:
                if best is not None and best.share >= FIRST:  # the trainer's own, before anything is asked of it
                    break
                current = recomputed(current)
        return results

    def _result(self, probe: Probe, current: Counterfactual, turn: int) -> Result:
        """One probe on all ranks, and what became of the residual."""
        if self._budget is not None and self._spent > self._budget and probe.cost not in FREE:
            text = f"not run: {self._spent:.1f} s spent of a budget of {self._budget:.1f} s"
            self.findings = self.findings.lacking(probe.gives, text)
            return _without_result(probe, turn, "", text, 0.0, "time")
        start = time.perf_counter()
        candidate, row = self._look(probe, current)
        rows = self._gather(row | {"spent": self.seconds})
        self._spent = max(r["spent"] for r in rows)
        seconds = time.perf_counter() - start
        good = [r for r in rows if r["after"]]
        error = next((r["error"] for r in rows if r["error"]), "")
        if not good:
            unasked = next((r["unasked"] for r in rows if r["unasked"]), "")
            seen = next((r["finding"] for r in rows if r["finding"]), "nothing to undo was found")
            return _without_result(probe, turn, seen, error, seconds, unasked)
        return _with_result(probe, turn, candidate, good, error, seconds, self._batch.floor)

    def _look(self, probe: Probe, current: Counterfactual) -> tuple[Candidate | None, dict[str, Any]]:
        """One probe on this rank: its candidate, and for the other ranks what it leaves of the residual."""
        row: dict[str, Any] = {
            "before": [], "after": [], "finding": "", "error": "", "unasked": "", "cause": probe.cause, "fix": "",
            "details": {}, "most": 1.0,
        }  # fmt: skip
        candidate: Candidate | None = None
        try:
            candidate, found = probe.look(self._batch, current, self.findings)
            self.findings = self.findings.plus(found)
            if candidate is not None:
                row |= self._residuals(candidate, current)
                row |= {"finding": candidate.finding, "cause": candidate.cause or probe.cause}
                row |= {"details": candidate.details, "fix": candidate.fix, "most": candidate.most}
        except NotPossible as e:
            self.findings = self.findings.plus(e.found).lacking(probe.gives, str(e))
            if isinstance(e, Unexplained):
                row["finding"] = str(e)
            else:
                row["error"] = f"not possible here: {e}"
            row["unasked"] = "" if isinstance(e, NothingThere) else "not possible"
        except Exception as e:  # out of memory, engine gone, ...: the others go on
            row |= {"error": f"{type(e).__name__}: {e}", "unasked": "failed"}
            self.findings = self.findings.lacking(probe.gives, f"{probe.name} failed: {row['error']}")
            logger.debug("probe %s failed", probe.name, exc_info=True)
            candidate = None
        return candidate, row

    def _residuals(self, candidate: Candidate, current: Counterfactual) -> dict[str, Any]:
        over = current if candidate.over is None else replace(current, kept=current.kept & candidate.over)
        after = self._batch.residual(candidate.counterfactual)[0].tolist()
        return {"before": self._batch.residual(over)[0].tolist(), "after": after}

    def _checked(self, current: Counterfactual, best: Result, results: list[Result]) -> list[Result]:
        """Fitted distributions count for nothing where the two models differ before anything is sampled."""
        agree: bool | None = None
        if best.candidate is not None:
            try:
                known = prefill_of(self._batch, self.findings)
                distribution = best.candidate.counterfactual.distribution
                self.findings = replace(self.findings, prefill=known)
                agree = sampling_alone(self._batch, current, distribution, known, self.findings.engine_weights)
            except Exception as e:  # can't be asked: the fit stands for what it is
                logger.debug("the engine's prefill could not be asked: %s", e)
        answers = [r["agree"] for r in self._gather({"agree": agree}) if r["agree"] is not None]
        if 2 * sum(answers) >= len(answers):
            self._models_agree = bool(answers)
            return results
        word = "; but before sampling, at T = 1 by prefill, engine and trainer differ too, and not in this way"
        return [_refuted(r, word) if r.probe.fitted and r.share > 0 else r for r in results]

    def excluded(self, best: Result) -> frozenset[str]:
        """Causes that need no probe of their own to be ruled out.

        Where the two models agree before anything is sampled, a fitted law has none of the model's for a rival. A run
        that began healthy began with one model on both sides.
        """
        if best.probe.fitted and self._models_agree:
            return _OF_THE_MODEL
        return frozenset({"model_definition"} if self._batch.began_healthy else ())

    def _gather(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        return gather_rows([row]) if self._ranks > 1 else [row]


def _refuted(result: Result, word: str) -> Result:
    evidence = replace(result.evidence, finding=result.evidence.finding + word, explained=0.0)
    return replace(result, share=0.0, shares=torch.zeros_like(result.shares), evidence=evidence)


def _with_result(
    probe: Probe,
    turn: int,
    candidate: Candidate | None,
    rows: list[dict[str, Any]],
    error: str,
    seconds: float,
    floor: float,
) -> Result:
    """``rows``: of the ranks on which there is a candidate; the first speaks for them."""
    before, after = (torch.tensor([s for r in rows for s in r[k]], dtype=torch.float64) for k in ("before", "after"))
    causes = [r["cause"] for r in rows]
    cause = max(set(causes), key=lambda c: (causes.count(c), c))
    share, shares = shares_of(before, after, floor)
    evidence = replace(
        _evidence(probe, turn, error, seconds),
        cause=cause,
        before=mean(before),
        after=mean(after),
        explained=share,
        finding=rows[0]["finding"],
        details=rows[0]["details"],
    )
    values = 1 if candidate is None else max(1, candidate.values)
    misfit, most = mean(after) * (1.0 + 0.15 * values), min(r["most"] for r in rows)
    return Result(probe, candidate, cause, share, shares, misfit, evidence, fix=rows[0]["fix"], most=most)


def _without_result(probe: Probe, turn: int, finding: str, error: str, seconds: float, unasked: str) -> Result:
    evidence = replace(_evidence(probe, turn, error, seconds), finding="" if error else finding)
    nothing = torch.zeros(RESAMPLES, dtype=torch.float64)
    return Result(probe, None, probe.cause, 0.0, nothing, 0.0, evidence, unasked=unasked)


def _evidence(probe: Probe, turn: int, error: str, seconds: float) -> Evidence:
    return Evidence(
        name=probe.name if not turn else f"{probe.name} (after cause {turn})",
        cause=probe.cause,
        hypothesis=probe.hypothesis,
        prediction=probe.prediction,
        cost=probe.cost,
        seconds=seconds,
        error=error,
    )


@dataclass(slots=True)
class _Explained:
    """Causes named so far, and what they leave of the excess over the floor."""

    named: list[NamedCause] = field(default_factory=list)
    remaining: float = 1.0
    inexact: bool = False  # one of them was named after fits that leave much
    as_well: tuple[str, ...] = ()  # causes that the same numbers could come from
    unasked: tuple[str, ...] = ()  # causes that could not be asked for, and that nothing speaks against

    def add(self, best: Result, results: Sequence[Result], excluded: frozenset[str]) -> None:
        """The cause of a round, which had these results; what is ``excluded`` is no rival."""
        unasked = not_excluded(best, results, excluded)
        if not self.named:
            self.as_well, self.unasked = rivals_of(best, results), unasked
        self.named.append(
            NamedCause(
                cause=best.cause,
                explained=self.remaining * best.share,
                confidence=confidence_in(best, results, unasked),
                finding=best.evidence.finding,
                fix=best.fix or CAUSES[best.cause].fix,
            )
        )
        self.inexact |= best.probe.fitted and best.share < EXACT
        self.remaining *= 1.0 - best.share

    def diagnosis(self, step: int, evidence: list[Evidence], details: dict[str, Any]) -> Diagnosis:
        """The cause that explains most, and further ones; unknown where they explain too little together."""
        total = 1.0 - self.remaining
        if not self.named or total < NAMED or (self.inexact and total < EXACT):
            return _unknown(step, total, self.named, evidence, details)
        first, *others = sorted(self.named, key=lambda c: -c.explained)
        rest = "".join(f" Then {c.cause} ({c.explained:.0%}): {c.finding}." for c in others)
        if self.as_well:
            rest += f" The same numbers could come from {' or '.join(self.as_well)}."
        if self.unasked and first.confidence < _ENOUGH:
            rest += f" Not asked, so not ruled out: {', '.join(self.unasked)}."
        return Diagnosis(
            step=step,
            cause=first.cause,
            explained=total,
            confidence=first.confidence,
            summary=f"{CAUSES[first.cause].what} {_sentence(first.finding)}{rest}",
            fix=first.fix,
            causes=(first, *others),
            evidence=tuple(evidence),
            details=details,
        )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _unfinished(
    step: int, explained: _Explained, late: list[str], evidence: list[Evidence], details: dict[str, Any]
) -> Diagnosis:
    """Nothing is named: there was no time to ask all that could have another answer."""
    found = _unknown(step, 1.0 - explained.remaining, explained.named, evidence, details)
    words = (
        f"No name yet: the time for a diagnosis was over before {', '.join(late)} could be asked. The next one of "
        f"this episode, at the halt, asks all; so does callback.diagnose()."
    )
    near = found.summary.removeprefix(CAUSES["unknown"].what)
    return replace(found, summary=words + near, fix="callback.diagnose() asks all probes now, or a larger "
                   "diagnose_budget.")  # fmt: skip


def _unknown(
    step: int, total: float, named: list[NamedCause], evidence: list[Evidence], details: dict[str, Any]
) -> Diagnosis:
    tried = [e for e in evidence if e.explained is not None]
    closest = max(tried, key=lambda e: e.explained or 0.0, default=None)
    near = ""
    if closest is not None and (closest.explained or 0.0) >= _NEAR:
        near = f" Closest: {closest.cause} ({closest.name}) with {closest.explained:.0%}."
    return Diagnosis(
        step=step,
        cause="unknown",
        explained=total,
        confidence=0.0,
        summary=f"{CAUSES['unknown'].what}{near}",
        fix=CAUSES["unknown"].fix,
        causes=tuple(named),
        evidence=tuple(evidence),
        details=details,
    )
