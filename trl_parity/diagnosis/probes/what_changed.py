"""Why an engine, asked again, does not give back what it said."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..counterfactual import Counterfactual, DiagnosedBatch
from ..distribution import huber
from ..honesty import excess
from .asking import size_of
from .base import recomputed, with_forward

__all__ = ["NEWER", "NO_LAW", "OneUpdate", "by_one_update", "dishonest", "what_changed"]

_STEP = 3.0  # a change within sequences: this much more drift on one side of it

_WITHIN = 5.0  # times as much drift before or after a point: weights changed there

_SIDE = 0.15  # and at least this share of the tokens on either side

_TELLING = 16  # tokens, for which update they are of

_APART = 25.0  # floors between what the two updates say of a token that tells

_NEARER = 4.0  # times as near to one of them

NEWER = 0.04  # of the tokens that tell, nearer to the newer weights: all of one update leave 2 % there

NO_LAW = "tokens drawn from the law it reports would have a mean of min(ratio, 2) of 1 at most, and it is {:.3f}"


def what_changed(batch: DiagnosedBatch, current: Counterfactual) -> tuple[str, str]:
    """Why an engine may not give back what it said: the cause, and what speaks for it; no cause where nothing does."""
    if told := batch.rollout.sampling.unreplayed:
        return (
            "constrained_decoding",
            f"the requests set {', '.join(told)}, which was left out when asking again",
        )
    if not batch.has_answers and (turn := _turn_of_change(batch, current)) is not None:  # else it would be known
        return (
            "token_misalignment",
            f"the drift begins with turn {turn + 1}: what the engine was given before it are other ids than here",
        )
    if (ratio := dishonest(batch, current)) is not None:
        return "token_misalignment", f"{NO_LAW.format(ratio)}: numbers and tokens were mixed up before it answered"
    if batch.began_healthy is False:
        return "", "there are no older weights that it could have had, as the drift is there since the first batch"
    at, (before, after) = _change(batch, current)
    if at is not None:
        return (
            "in_flight_update",
            f"the drift changes at completion token {at}: {before:.3g} before, {after:.3g} after (Huber)",
        )
    if (spared := _spared(batch, current)) > 0.0:
        return "in_flight_update", f"{spared:.0%} of the sequences have no drift at all, the others from their start"
    return "stale_weights", "it does now, on the weights it holds: it had older ones when it was asked to sample"


def dishonest(batch: DiagnosedBatch, current: Counterfactual) -> float | None:
    """``honesty.excess`` of the engine's numbers, the trainer's law being whole: nothing is cut off it."""
    base = replace(recomputed(current), distribution=batch.plain)
    return excess(batch.log_probs(base) - base.reported, base.kept, batch.row, batch.floor)


class OneUpdate(NamedTuple):
    """What the weights before the last update make of a drift."""

    left: float  # share of it, where each token may be of them or of those now
    newer: float | None  # share of the tokens that are clearly of those now, of the ones that tell; None: too few do


def by_one_update(batch: DiagnosedBatch, current: Counterfactual) -> OneUpdate | None:
    """Whether tokens are of the weights before the last update; None where these are not known."""
    try:
        known = bool(batch.passes.one_update_ago)
    except torch.OutOfMemoryError:  # no room for a second copy of the policy
        known = False
    if not known:
        return None
    base = recomputed(current)
    now, then = batch.log_probs(base), batch.log_probs(with_forward(current, weights="one update ago"))
    good = current.kept & torch.isfinite(now - current.reported) & torch.isfinite(then)
    of_now, of_then = (huber(x - current.reported)[good] for x in (now, then))
    left = float(torch.minimum(of_now, of_then).sum() / of_now.sum().clamp(min=1e-30))
    telling = huber(then - now)[good] > _APART * batch.floor
    newer = (_NEARER * of_now < of_then)[telling].double()
    return OneUpdate(left, float(newer.mean()) if len(newer) >= _TELLING else None)


def _spared(batch: DiagnosedBatch, current: Counterfactual) -> float:
    """Share of the sequences within the noise floor, where some are and the others are far from it; else 0."""
    sums, _ = batch.residual(current)
    size = (sums[:, 0] / sums[:, 1])[sums[:, 1] > 0]
    calm, off = size <= _STEP * batch.floor, size > _STEP**2 * batch.floor
    some = min(int(calm.sum()), int(off.sum())) >= _SIDE * len(size) > 0
    return float(calm.double().mean()) if some and bool((calm | off).all()) else 0.0


def _turn_of_change(batch: DiagnosedBatch, current: Counterfactual) -> int | None:
    """The turn from which on there is drift, when the ones before have little and it does not grow within turns."""
    delta = (batch.log_probs(current) - current.reported).nan_to_num(0.0)
    size = huber(delta)
    for turn in range(1, int(batch.turn.max()) + 1):
        before, after = (size[current.kept & side] for side in (batch.turn < turn, batch.turn >= turn))
        if min(len(before), len(after)) < _SIDE * int(current.kept.sum()):
            continue
        if (
            after.mean() > _STEP * before.mean()
            and size_of(delta[current.kept & (batch.turn < turn)]) <= 3 * batch.floor
        ):
            return turn
    return None


def _change(batch: DiagnosedBatch, current: Counterfactual) -> tuple[int | None, tuple[float, float]]:
    """The completion position at which the drift steps up or down, if it does."""
    delta = (batch.log_probs(current) - current.reported)[current.kept]
    column = batch.column[current.kept]
    good = torch.isfinite(delta)
    size, column = huber(delta[good]).double(), column[good]
    width = int(column.max()) + 1 if len(column) else 0
    counts = torch.zeros(width, dtype=torch.float64).scatter_add(0, column, torch.ones_like(size))
    sums = torch.zeros(width, dtype=torch.float64).scatter_add(0, column, size)
    best: tuple[float, int, float, float] | None = None
    for at in range(2, width - 1):
        left, right = counts[:at].sum(), counts[at:].sum()
        if min(left, right) < _SIDE * counts.sum():
            continue
        before, after = float(sums[:at].sum() / left), float(sums[at:].sum() / right)
        between = float(left * right / (left + right)) * (before - after) ** 2
        if best is None or between > best[0]:
            best = between, at, before, after
    if best is None:
        return None, (0.0, 0.0)
    _, at, before, after = best
    high, low = max(before, after), min(before, after)
    return (at if high > _WITHIN * low else None), (before, after)
