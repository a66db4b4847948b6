"""What the engine is asked again, once for all probes that build on it.

Requests of ours draw from generators of their own, and what they cache lies under a name that no request of the run
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ...engine.base import Capability, Engine, InProcessEngine, in_process
from ...records import SamplingSettings
from ..counterfactual import Counterfactual, DiagnosedBatch
from ..distribution import PROCESSED, Distribution, huber
from ..findings import AskedAgain, EnginePrompts, EngineWeights, Findings, Prefill
from .base import Candidate, NotPossible, recomputed, require_engine

__all__ = [
    "answered", "askable", "asked_again", "on_trainers_weights", "others", "prefill_drift", "prefill_of",
    "requests_for", "size_of", "whole_sequences",
]  # fmt: skip

_TOKENS = 96  # asked for again, one request each


def askable(batch: DiagnosedBatch) -> Engine:
    """The engine. Raises NotPossible where it can't be asked from this rank alone, NothingThere without one."""
    require_engine(batch)
    if batch.engine is None:
        raise NotPossible("no engine to ask: the server does not answer /server_info, or another rank talks to it")
    if Capability.RESCORE not in batch.engine.capabilities:
        raise NotPossible("with tensor parallelism or sleep mode one rank can't ask the engine alone")
    if batch.rollout.image_keys is not None and batch.capture.pictures is None:
        raise NotPossible("the prompts' pictures were handed to a server, in several turns, or by another rank")
    return batch.engine


def on_trainers_weights(batch: DiagnosedBatch, findings: Findings) -> InProcessEngine | None:
    """The engine in this process; None where it holds other weights than the trainer's: that comes first.

    Raises NotPossible where its module can't be read.
    """
    engine, weights = askable(batch), findings.engine_weights
    if not in_process(engine):
        raise NotPossible("a server's module can't be read")
    if weights is None:
        raise NotPossible("the engine's parameters were not read")
    return None if weights.differing or weights.ignored else engine


def asked_again(batch: DiagnosedBatch, current: Counterfactual, findings: Findings) -> AskedAgain:
    """The engine's numbers for some of the tokens, asked for now where they were not before."""
    engine = askable(batch)
    return findings.asked_again or _ask_again(batch, current, engine, findings.engine_prompts)


def _ask_again(
    batch: DiagnosedBatch, current: Counterfactual, engine: Engine, prompts: EnginePrompts | None
) -> AskedAgain:
    """One by one at the trainer's temperature."""
    usable = (current.kept & torch.isfinite(current.reported)).nonzero().squeeze(-1)
    picked = usable[torch.linspace(0, len(usable) - 1, min(_TOKENS, len(usable))).long().unique()]
    kept = [n for n in picked.tolist() if len(_context(batch, n, prompts)) < engine.max_model_len]
    if not kept:
        raise NotPossible("no context fits the engine's max_model_len")
    contexts, targets = requests_for(batch, kept, prompts)
    cached, read = None, torch.zeros(1)
    if engine.caches_prefixes or batch.rollout.image_keys is not None:  # first, while the cache is as the run left it
        cached, read = engine.next_token(contexts, targets, batch.temperature, cached=True)
    anew, _ = engine.next_token(contexts, targets, batch.temperature, cached=False)
    return AskedAgain(
        picked=torch.tensor(kept),
        anew=anew.double(),
        cached=None if cached is None else cached.double(),
        tokens_read=int(read.sum()),
    )


def _context(batch: DiagnosedBatch, n: int, prompts: EnginePrompts | None) -> list[int]:
    at, t = int(batch.rows[batch.row[n]]), int(batch.column[n])
    ids = batch.prompt(at, prompts) + batch.rollout.completion_ids[at, :t].tolist()
    return batch.capture.for_engine(at, ids)


def requests_for(
    batch: DiagnosedBatch, picked: Sequence[int], prompts: EnginePrompts | None
) -> tuple[list[list[int]], list[int]]:
    """What the engine is asked for some of the batch's tokens: their contexts, and themselves."""
    return [_context(batch, n, prompts) for n in picked], [int(batch.targets[n]) for n in picked]


def size_of(delta: torch.Tensor) -> float:
    """Mean Huber(Δ) of the finite ones, in nats."""
    return float(huber(delta[torch.isfinite(delta)]).mean()) if len(delta) else 0.0


def answered(
    batch: DiagnosedBatch, current: Counterfactual, again: AskedAgain, finding: str, cause: str = ""
) -> Candidate:
    """As if the engine had said what it says now."""
    base = recomputed(current)
    reported, over = base.reported.clone(), torch.zeros(len(batch), dtype=torch.bool)
    reported[again.picked], over[again.picked] = again.anew, True
    return Candidate(
        counterfactual=replace(base, distribution=batch.plain, reported=reported, kept=over),
        over=over,
        cause=cause,
        finding=finding,
    )


def prefill_of(batch: DiagnosedBatch, findings: Findings) -> Prefill:
    """The engine's own scores of a few sequences, asked for now where they were not before."""
    engine = askable(batch)
    return findings.prefill or _ask_prefill(batch, engine, findings.engine_prompts)


def _ask_prefill(batch: DiagnosedBatch, engine: Engine, prompts: EnginePrompts | None) -> Prefill:
    some = whole_sequences(batch, engine, prompts)
    scores = [
        x.double()[one.start + batch.column[one.tokens] - 1]
        for x, one in zip(engine.rescore([one.ids for one in some]), some, strict=True)
    ]
    return Prefill(picked=torch.cat([one.tokens for one in some]), logprobs=torch.cat(scores))


class Whole(NamedTuple):
    """One of the few, up to its last token looked at."""

    ids: list[int]
    tokens: torch.Tensor  # which of the batch's
    start: int  # where its completion begins
    at: int  # its row of the rollout batch


def whole_sequences(batch: DiagnosedBatch, engine: Engine | None, prompts: EnginePrompts | None) -> list[Whole]:
    """The few sequences as the engine would read them; all, where none is asked. NotPossible where none fits it."""
    some = []
    for i in batch.few.tolist():
        at = int(batch.rows[i])
        mine = (batch.row == i).nonzero().squeeze(-1)
        prompt = batch.prompt(at, prompts)
        if len(mine):
            ids = prompt + batch.rollout.completion_ids[at, : int(batch.column[mine].max()) + 1].tolist()
            if engine is None or len(ids) < engine.max_model_len:
                some.append(Whole(batch.capture.for_engine(at, ids), mine, len(prompt), at))
    if not some:
        raise NotPossible("no sequence fits the engine's max_model_len")
    return some


def prefill_drift(
    batch: DiagnosedBatch, current: Counterfactual, distribution: Distribution, known: Prefill
) -> torch.Tensor:
    """Δ (M,) of the trainer against the engine's prefill, both at T = 1: without what is done to sample.

    ``distribution``: what of it a model itself may do (scale, bias, rounding) is taken over.
    """
    scale = distribution.sampling.temperature / batch.temperature
    at_one = replace(distribution, sampling=SamplingSettings(temperature=scale), report=PROCESSED)
    ours = batch.log_probs(replace(recomputed(current), distribution=at_one))
    return ours[known.picked] - known.logprobs


def others(weights: EngineWeights | None) -> bool:
    """Whether the engine's weights were read, and are not the trainer's."""
    return weights is not None and bool(weights.values)
