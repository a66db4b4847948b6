"""What is said of a batch whose two sides are one policy: nothing, or why it teaches nothing all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..causes import CAUSES
from ..engine.base import Engine
from ..records import Diagnosis, NamedCause, RolloutBatch
from .duplicates import collisions, duplicates_in_words

__all__ = ["agreed", "counts", "unseen_law"]

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


def unseen_law(rollout: RolloutBatch, engine: Engine | None) -> tuple[str, str]:
    """What the requests do to the law sampled from that raw log-probs don't show: the cause, and in words.

    Two empty ones where there is nothing, or where the engine reports processed log-probs.
    """
    sampling = rollout.sampling
    if engine is None or not str(engine.settings()["logprobs_mode"]).startswith("raw"):
        return "", ""
    name = "truncated_sampling" if sampling.truncates else "penalties" if sampling.penalizes else ""
    words = "the requests truncate or penalize, and the raw log-probs the engine reports know nothing of it"
    return name, words if name else ""


def agreed(
    step: int, rows: Sequence[Sequence[float]], details: dict[str, Any], unseen: tuple[str, str] = ("", "")
) -> Diagnosis:
    """The diagnosis where the drift is within the noise floor. ``rows``: the ranks' ``counts``."""
    pairs, equal, chance, sequences, dropped, tokens = (sum(row[i] for row in rows) for i in range(6))
    within = f"({details['residual']:.3g}, Huber) is within the noise floor ({details['floor']:.3g})"
    if details["residual"] > details["floor"]:
        within += f", as far as {details['chance']:.2g} of chance either way let one tell"
    if words := duplicates_in_words(int(pairs), int(equal), chance):
        name = "duplicate_rollouts"
    elif dropped > _DROPPED * sequences:
        name = "correction_weights"
        words = (
            f"{dropped:g} of {sequences:g} sequences, {tokens / sequences:.0f} tokens long on average, have weight 0: "
            "what their tokens' log-ratios add up to is beyond the correction's bounds"
        )
    elif unseen[0]:
        name, words = unseen
    else:
        return Diagnosis(
            step=step,
            cause="unknown",
            explained=0.0,
            confidence=0.0,
            summary=f"Nothing to explain: the drift {within}.",
            fix="",
            details=details,
        )
    cause = CAUSES[name]
    return Diagnosis(
        step=step,
        cause=name,
        explained=0.0,
        confidence=1.0,
        summary=f"{cause.what} {words[:1].upper()}{words[1:]}. The drift {within}"
        + ("." if name == unseen[0] else ": engine and trainer are one policy."),
        fix=cause.fix,
        causes=(NamedCause(cause=name, explained=0.0, confidence=1.0, finding=words, fix=cause.fix),),
        details=details,
    )
