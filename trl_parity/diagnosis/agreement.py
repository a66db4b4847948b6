"""What is said of a batch whose two sides are one policy: nothing, or why it teaches nothing all the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..causes import CAUSES
from ..records import Diagnosis, NamedCause, RolloutBatch
from .counterfactual import DiagnosedBatch
from .distribution import Distribution, Tokens
from .duplicates import collisions, duplicates_in_words
from .fitting import mle_temperature
from .probes.base import recomputed

__all__ = ["agreed", "counts", "sampled_law", "unseen_law"]

_SURE = math.log(1e6)  # of a likelihood ratio

_EITHER = math.log(20.0)  # between two of them

_DROPPED = 0.5  # share of the sequences that the correction takes out, as the rule on it has


def counts(rollout: RolloutBatch) -> list[float]:
    """Of a rank's batch, to be added over ranks: ``collisions`` and ``_dropped``."""
    return [*collisions(rollout), *_dropped(rollout)]


def _dropped(rollout: RolloutBatch) -> tuple[int, int, int]:
    """Sequences with a weight of the trainer's correction, those whose loss it makes 0, and tokens of all of them."""
    if rollout.correction_weights is None:
        return 0, 0, 0
    mask = rollout.engine_mask
    weights = rollout.correction_weights.to(mask.device).nan_to_num(nan=0.0).expand(mask.shape)
    some = mask.any(1)
    dropped = some & ~((weights > 0) & mask).any(1)
    return int(some.sum()), int(dropped.sum()), int(mask.sum())


def unseen_law(batch: DiagnosedBatch) -> tuple[str, str]:
    """What is done to the law sampled from that raw log-probs don't show: the cause, and in words.

    By the requests, or by what was never sampled. Two empty ones where there is nothing, or where the engine reports
    processed log-probs.
    """
    sampling, engine = batch.rollout.sampling, batch.engine
    if engine is None or not str(engine.settings()["logprobs_mode"]).startswith("raw"):
        return "", ""
    name = "truncated_sampling" if sampling.truncates else "penalties" if sampling.penalizes else ""
    if name:
        return name, "the requests truncate or penalize, and the raw log-probs the engine reports know nothing of it"
    if batch.sharded:  # a pass that all ranks make, or none
        return "", ""
    base = recomputed(batch.start)
    return sampled_law(batch.fit_tokens(base), base.distribution)


def sampled_law(tokens: Tokens, distribution: Distribution) -> tuple[str, str]:
    """What law the sampled tokens speak for in place of ``distribution``: the cause, in words; two empty ones: none.

    The furthest of n tokens from the likeliest one, by rank, mass before it or ratio, is a cut-off that none is
    beyond. Of tokens drawn from the whole law Π P(not beyond) is a p-value, the probability that all keep to it. Its
    inverse is the likelihood ratio of the law cut off there, which is held against that of the best temperature.
    """
    t = distribution.sampling.temperature
    law = (tokens.logits.double() / t).log_softmax(-1)
    ordered, ids = law.sort(-1, descending=True)
    rank = (ids == tokens.targets[:, None]).double().argmax(-1)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    row, ratio = torch.arange(len(law), device=law.device), ordered - ordered[:, :1]
    k, mass, least = rank.max(), before[row, rank].max(), ratio[row, rank].min()
    inside = {
        f"top_k {int(k) + 1}": torch.arange(law.shape[-1], device=law.device)[None] <= k,
        f"top_p {float(mass):.2f}": before <= mass,
        f"min_p {float(least.exp()):.2g}": ratio >= least,
    }
    gains = {name: -float((ordered.exp() * kept).sum(-1).clamp(max=1.0).log().sum()) for name, kept in inside.items()}
    name = max(gains, key=lambda name: gains[name])
    best, _ = mle_temperature(tokens, distribution)
    flatter = (tokens.logits.double() / best).log_softmax(-1) - law
    gain = float(flatter.gather(-1, tokens.targets[:, None]).sum())
    if max(gain, gains[name]) < _SURE or abs(gain - gains[name]) < _EITHER:
        return "", ""
    words = f"the raw log-probs the engine reports show nothing, but {len(law)} sampled tokens "
    if gain > gains[name]:
        return "temperature", f"{words}speak for temperature {best:.3g} instead of {t:.3g}"
    chance = f"10^{-gains[name] / math.log(10):.0f}"
    return "truncated_sampling", f"{words}all keep to {name}, which drawn from them they would do once in {chance}"


def agreed(
    step: int,
    rows: Sequence[Sequence[float]],
    details: dict[str, Any],
    unseen: tuple[str, str] = ("", ""),
    health: Sequence[NamedCause] = (),
) -> Diagnosis:
    """The diagnosis where the drift is within the noise floor, or what chance adds. ``rows``: the ranks' ``counts``.

    ``health``: causes that the windows' statistics tell by themselves.
    """
    residual, floor, chance = details["residual"], details["floor"], details.get("chance")
    within = f"({residual:.3g}, Huber) is within the noise floor ({floor:.3g})"
    if residual > floor:
        reach = "of so few, or dependent, draws" if chance is None else f"({chance:.2g}, once in 40)"
        within = f"({residual:.3g}, Huber) is above the noise floor ({floor:.3g}) by no more than chance {reach} makes"
    found = [*_told_by_rows(rows), *([_named(*unseen)] if unseen[0] else [])]
    found += [cause for cause in health if cause.cause not in {known.cause for known in found}]
    if not found:
        return Diagnosis(
            step=step,
            cause="unknown",
            explained=0.0,
            confidence=0.0,
            summary=f"Nothing to explain: the drift {within}.",
            fix="",
            details=details,
        )
    first, *others = found
    summary = f"{CAUSES[first.cause].what} {first.finding[:1].upper()}{first.finding[1:]}. The drift {within}"
    summary += "." if first.cause == unseen[0] else ": engine and trainer are one policy."
    return Diagnosis(
        step=step,
        cause=first.cause,
        explained=0.0,
        confidence=1.0,
        summary=summary + "".join(f" Then {cause.cause}: {cause.finding}." for cause in others),
        fix=first.fix,
        causes=tuple(found),
        details=details,
    )


def _told_by_rows(rows: Sequence[Sequence[float]]) -> Iterator[NamedCause]:
    pairs, equal, chance, sequences, dropped, tokens = (sum(row[i] for row in rows) for i in range(6))
    if words := duplicates_in_words(int(pairs), int(equal), chance):
        yield _named("duplicate_rollouts", words)
    elif dropped > _DROPPED * sequences:
        words = (
            f"{dropped:g} of {sequences:g} sequences, {tokens / sequences:.0f} tokens long on average, have weight 0: "
            "what their tokens' log-ratios add up to is beyond the correction's bounds"
        )
        yield _named("correction_weights", words)


def _named(name: str, words: str) -> NamedCause:
    return NamedCause(cause=name, explained=0.0, confidence=1.0, finding=words, fix=CAUSES[name].fix)
