"""From a drift to its cause: probes cheapest first, the one that explains most is named, what remains is asked again.

All decisions come from residuals gathered over ranks, so every rank runs the same probes and names the same cause.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..causes import CAUSES
from ..collectives import gather_rows
from ..records import Diagnosis, Evidence, NamedCause
from .counterfactual import Scene, World
from .distribution import huber
from .probes import PROBES
from .probes.base import COSTS, FREE, Candidate, NotPossible, Probe, redone
from .probes.rescore import sampling_alone

__all__ = ["diagnose"]

logger = logging.getLogger(__name__)

_ROUNDS = 3  # causes looked for, one after the other

_FIRST, _LATER = 0.3, 0.5  # share of what remains that a cause must explain: the first one, further ones

_NAMED = 0.5  # of all the excess, by all causes together, or the cause is unknown

_EXACT = 0.75  # a fitted law must explain this much of what remained, or all causes together must

_ENOUGH = 0.9  # explained for sure: dearer probes are left out

_LEFT = 0.2  # of the excess: less is not looked into

_TIE = 0.04  # shares this close are equal

_RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class _Result:
    probe: Probe
    candidate: Candidate | None  # of this rank
    cause: str
    share: float  # of the excess that remained
    shares: torch.Tensor  # (R,) the same in bootstrap resamples of sequences
    misfit: float  # what is left, dearer by the number of fitted values
    evidence: Evidence


class _Stopwatch:
    """Time spent, as of the slowest rank when they last met."""

    def __init__(self, budget: float | None):
        self._start, self.budget, self.spent = time.perf_counter(), budget, 0.0

    def now(self) -> float:
        return time.perf_counter() - self._start

    @property
    def over(self) -> bool:
        return self.budget is not None and self.spent > self.budget


def diagnose(scene: Scene, step: int, *, budget: float | None = None, ranks: int = 1) -> Diagnosis:
    """Name the cause of the drift in a scene. A collective: all ranks call it with theirs.

    ``budget``: seconds; probes beyond those on one recompute are left out once they are spent (None: no bound).
    A probe that fails is an entry in the evidence.
    """
    watch = _Stopwatch(budget)
    world = scene.base
    evidence: list[Evidence] = []
    named: list[NamedCause] = []
    inexact: set[str] = set()  # named after fits that leave much
    scene.prepare()
    sums = _gathered(scene.residual(world)[0], ranks)
    drift = _mean(sums)
    excess = drift - scene.floor
    remaining = 1.0
    details: dict[str, Any] = {
        "residual": drift, "floor": scene.floor, "tokens": int(sums[:, 1].sum()), "sequences": len(sums),
    }  # fmt: skip
    if excess <= 0 or not len(sums):
        details["seconds"] = watch.now()
        return _nothing(step, details)
    for turn in range(_ROUNDS):
        results = _try_all(scene, world, turn, watch, ranks)
        best = _best(results)
        evidence += [result.evidence for result in results]
        if best is None or best.share < (_FIRST if turn == 0 else _LATER):
            break
        named.append(
            NamedCause(
                cause=best.cause,
                explained=remaining * best.share,
                confidence=_confidence(best, results),
                finding=best.evidence.finding,
                fix=CAUSES[best.cause].fix,
            )
        )
        if best.probe.exact and best.share < _EXACT:
            inexact.add(best.cause)
        if turn == 0 and (rivals := _rivals(best, results)):
            details["as_well"] = list(rivals)
        remaining *= 1.0 - best.share
        if best.candidate is not None:
            world = best.candidate.world
        if remaining < _LEFT or best.probe.cost == "last":
            break
    details |= {**_profiles(scene, scene.base), **scene.notes, "seconds": watch.now()}
    total = 1.0 - remaining
    vague = any(c.cause in inexact for c in named) and total < _EXACT
    if not named or total < _NAMED or vague:
        return _unknown(step, total, named, evidence, details)
    named.sort(key=lambda c: -c.explained)
    first = named[0]
    rest = "".join(f" Then {c.cause} ({c.explained:.0%}): {c.finding}." for c in named[1:])
    if "as_well" in details:
        rest += f" The same numbers could come from {' or '.join(details['as_well'])}."
    return Diagnosis(
        step=step,
        cause=first.cause,
        explained=total,
        confidence=first.confidence,
        summary=f"{CAUSES[first.cause].what} {_sentence(first.finding)}{rest}",
        fix=first.fix,
        causes=tuple(named),
        evidence=tuple(evidence),
        details=details,
    )


def _try_all(scene: Scene, world: World, turn: int, watch: _Stopwatch, ranks: int) -> list[_Result]:
    """Probes cheapest first, until one explains enough for sure."""
    results: list[_Result] = []
    for cost in COSTS:
        for probe in PROBES:
            if probe.cost != cost or (turn and probe.cost == "last"):
                continue
            if watch.over and cost not in FREE:
                text = f"not run: {watch.spent:.1f} s spent of a budget of {watch.budget:.1f} s"
                results.append(_without_result(probe, turn, "", text, 0.0))
                continue
            results.append(_try(scene, world, probe, turn, watch, ranks))
        best = _best(results)
        if best is not None and best.probe.exact and cost == "fit":
            results = _checked(scene, world, best, results, ranks)
            best = _best(results)
        sure = best is not None and float(best.shares.quantile(0.05)) >= _ENOUGH
        if best is not None and sure:
            break
        if cost == "repeat" and world.variant is None:
            if best is not None and best.share >= _FIRST:  # the trainer's own, before anything is asked of it
                break
            world = redone(world)
    return results


def _checked(scene: Scene, world: World, best: _Result, results: list[_Result], ranks: int) -> list[_Result]:
    """Fitted laws count for nothing where the two models differ before anything is sampled."""
    row: dict[str, Any] = {"agree": None}
    if best.candidate is not None:
        try:
            row["agree"] = sampling_alone(scene, world, best.candidate.world.law)
        except Exception as e:  # can't be asked: the fit stands for what it is
            logger.debug("the engine's prefill could not be asked: %s", e)
    rows = gather_rows([row]) if ranks > 1 else [row]
    answers = [r["agree"] for r in rows if r["agree"] is not None]
    if 2 * sum(answers) >= len(answers):
        return results
    word = "; but before sampling, at T = 1 by prefill, engine and trainer differ too, and not in this way"
    return [_refuted(r, word) if r.probe.exact and r.share > 0 else r for r in results]


def _refuted(result: _Result, word: str) -> _Result:
    evidence = replace(result.evidence, finding=result.evidence.finding + word, explained=0.0)
    return replace(result, share=0.0, shares=torch.zeros_like(result.shares), evidence=evidence)


def _try(scene: Scene, world: World, probe: Probe, turn: int, watch: _Stopwatch, ranks: int) -> _Result:
    """One probe on all ranks, and what became of the residual."""
    start = time.perf_counter()
    candidate: Candidate | None = None
    row: dict[str, Any] = {"before": [], "after": [], "finding": "", "error": "", "cause": probe.cause, "details": {}}
    try:
        candidate = probe.run(scene, world)
        if candidate is not None:
            over = world if candidate.over is None else replace(world, kept=world.kept & candidate.over)
            row["after"] = scene.residual(candidate.world)[0].tolist()
            row["before"] = scene.residual(over)[0].tolist()
            row |= {"finding": candidate.finding, "cause": candidate.cause or probe.cause}
            row["details"] = candidate.details
    except NotPossible as e:
        row["error"] = f"not possible here: {e}"
    except Exception as e:  # out of memory, engine gone, ...: the others go on
        row["error"] = f"{type(e).__name__}: {e}"
        logger.debug("probe %s failed", probe.name, exc_info=True)
        candidate = None
    row["spent"] = watch.now()
    rows = gather_rows([row]) if ranks > 1 else [row]
    watch.spent = max(r["spent"] for r in rows)
    seconds = time.perf_counter() - start
    good = [r for r in rows if r["after"]]
    error = next((r["error"] for r in rows if r["error"]), "")
    if not good:
        return _without_result(probe, turn, "nothing to undo was found", error, seconds)
    before, after = (torch.tensor([s for r in good for s in r[k]], dtype=torch.float64) for k in ("before", "after"))
    causes = [r["cause"] for r in good]
    cause = max(set(causes), key=lambda c: (causes.count(c), c))
    share, shares = _shares(before, after, scene.floor)
    evidence = Evidence(
        name=probe.name if not turn else f"{probe.name} (after cause {turn})",
        cause=cause,
        hypothesis=probe.hypothesis,
        prediction=probe.prediction,
        cost=probe.cost,
        before=_mean(before),
        after=_mean(after),
        explained=share,
        finding=good[0]["finding"],
        seconds=seconds,
        details=good[0]["details"],
        error=error,
    )
    values = 1 if candidate is None else max(1, candidate.values)
    return _Result(probe, candidate, cause, share, shares, _mean(after) * (1.0 + 0.15 * values), evidence)


def _without_result(probe: Probe, turn: int, finding: str, error: str, seconds: float) -> _Result:
    evidence = Evidence(
        name=probe.name if not turn else f"{probe.name} (after cause {turn})",
        cause=probe.cause,
        hypothesis=probe.hypothesis,
        prediction=probe.prediction,
        cost=probe.cost,
        finding="" if error else finding,
        seconds=seconds,
        error=error,
    )
    return _Result(probe, None, probe.cause, 0.0, torch.zeros(_RESAMPLES, dtype=torch.float64), 0.0, evidence)


def _gathered(sums: torch.Tensor, ranks: int) -> torch.Tensor:
    rows = gather_rows([{"sums": sums.tolist()}]) if ranks > 1 else [{"sums": sums.tolist()}]
    return torch.tensor([s for row in rows for s in row["sums"]], dtype=torch.float64).reshape(-1, 2)


def _mean(sums: torch.Tensor) -> float:
    """Residual per token of (S, 2) sums and counts."""
    return float(sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1))


def _shares(before: torch.Tensor, after: torch.Tensor, floor: float) -> tuple[float, torch.Tensor]:
    """1 - (after - floor)+ / (before - floor), of all sequences and of bootstrap resamples of them."""
    weights = torch.poisson(torch.ones(_RESAMPLES, len(before), dtype=torch.float64), torch.Generator().manual_seed(0))
    weights = torch.cat([torch.ones(1, len(before), dtype=torch.float64), weights])

    def mean(sums: torch.Tensor) -> torch.Tensor:
        return (weights @ sums[:, 0]) / (weights @ sums[:, 1]).clamp(min=1)

    b, a = mean(before), mean(after)
    shares = 1.0 - (a - floor).clamp(min=0) / (b - floor).clamp(min=1e-12)
    shares = torch.where(b > floor, shares, 0.0).clamp(-1.0, 1.0)
    return float(shares[0]), shares[1:]


def _best(results: Sequence[_Result]) -> _Result | None:
    """The cause that explains most. Of nearly equal ones: found rather than fitted, then the cheapest, or best fit.

    A fitted law that leaves much is not the law: it is named only where nothing was found on the run itself. By
    elimination (cost "last") a cause is named only where nothing else explains half.
    """
    tried = [r for r in results if r.share > 0]
    good = [r for r in tried if r.probe.cost != "last" and r.share >= (_EXACT if r.probe.exact else _FIRST)]
    if not good or max(r.share for r in good) < _NAMED:
        good += [r for r in tried if r.probe.cost == "last" and r.share >= _NAMED]
    if not (good := good or tried):
        return None
    top = max(r.share for r in good)
    equal = [r for r in good if r.share >= top - _TIE]
    found = [r for r in equal if not r.probe.exact]
    return found[0] if found else min(equal, key=lambda r: r.misfit)


def _rivals(best: _Result, results: Sequence[_Result]) -> tuple[str, ...]:
    """Other causes whose fitted laws explain as much as the fitted one that is named."""
    equal = [r for r in results if best.probe.exact and r.probe.exact and r.share >= best.share - _TIE]
    return tuple(sorted({r.cause for r in equal} - {best.cause}))


def _confidence(best: _Result, results: Sequence[_Result]) -> float:
    """Mean over resamples of 1 / the number of causes that explain as much as the most, where this is one of them.

    Causes found on the run itself count before fitted ones, as in ``_best``; a resample in which the cause
    explains too little counts 0.
    """
    others = [r for r in results if r.cause != best.cause and (r.probe.cost != "last" or r is best)]
    if not others:
        return float((best.shares >= _FIRST).double().mean())
    shares = torch.stack([r.shares for r in others])
    fitted = torch.tensor([r.probe.exact for r in others])
    rivals = shares if best.probe.exact else torch.where(fitted[:, None], shares - 2 * _TIE, shares)
    highest = torch.maximum(rivals.amax(0), best.shares)
    near = rivals >= highest - _TIE
    causes = torch.stack([near[[r.cause == c for r in others]].any(0) for c in {r.cause for r in others}]).sum(0)
    good = (best.shares >= _FIRST) & (best.shares >= highest - _TIE)
    return float((good / (1.0 + causes)).mean())


def _profiles(scene: Scene, world: World) -> dict[str, list[dict[str, float]]]:
    """The drift of this rank by eighths of the completion, by turn, and by quarters of the entropy."""
    delta = scene.log_probs(world) - world.reported
    good = torch.isfinite(delta) & world.kept
    if not good.any():
        return {}
    column = scene.column[good].double()
    eighths = torch.linspace(0, float(column.max()) + 1, 9, dtype=torch.float64)
    out = {"by_position": _profile(delta[good], column, eighths)}
    if turns := int(scene.turn.max()):
        out["by_turn"] = _profile(delta[good], scene.turn[good].double(), torch.arange(turns + 2.0))
    if scene.entropy is not None:
        entropy = scene.entropy[good]
        quarters = entropy.quantile(torch.linspace(0, 1, 5, dtype=torch.float64))
        quarters[-1] += 1.0
        out["by_entropy"] = _profile(delta[good], entropy, quarters)
    return out


def _profile(delta: torch.Tensor, by: torch.Tensor, edges: torch.Tensor) -> list[dict[str, float]]:
    """Tokens, mean Huber(Δ) and mean Δ between one edge and the next."""
    out = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        d = delta[(by >= low) & (by < high)]
        if len(d):
            out.append({"from": low, "tokens": len(d), "residual": float(huber(d).mean()),
                        "log_ratio": float(d.mean())})  # fmt: skip
    return out


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _nothing(step: int, details: dict[str, Any]) -> Diagnosis:
    return Diagnosis(
        step=step,
        cause="unknown",
        explained=0.0,
        confidence=0.0,
        summary=f"Nothing to explain: the drift ({details['residual']:.3g}, Huber) is within the noise floor "
        f"({details['floor']:.3g}).",
        fix="",
        details=details,
    )


def _unknown(
    step: int, total: float, named: list[NamedCause], evidence: list[Evidence], details: dict[str, Any]
) -> Diagnosis:
    tried = [e for e in evidence if e.explained is not None]
    closest = max(tried, key=lambda e: e.explained or 0.0, default=None)
    near = f" Closest: {closest.cause} ({closest.name}) with {closest.explained:.0%}." if closest is not None else ""
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
