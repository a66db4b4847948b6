"""Probes of what arrived at the trainer, against what the engine returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..scene import FEW, Scene, World
from .base import Candidate, NotPossible, Probe, probe, with_variant

__all__ = ["ARRIVED"]


def finite(scene: Scene, world: World) -> Candidate | None:
    """Leave out tokens without a finite number on either side."""
    good = torch.isfinite(scene.as_scored) & torch.isfinite(world.reported)
    bad = int((world.kept & ~good).sum())
    if not bad:
        return None
    engine = int((world.kept & ~torch.isfinite(world.reported)).sum())
    return Candidate(
        world=replace(world, kept=world.kept & good),
        finding=f"{bad} of {int(world.kept.sum())} tokens have no finite log-prob ({engine} of them the engine's)",
        details={"nonfinite": bad, "engine": engine},
    )


def handover(scene: Scene, world: World) -> Candidate | None:
    """The engine's own numbers and ids, as it returned them, in place of those that arrived."""
    answers = _answers(scene)
    reported, kept = world.reported.clone(), world.kept.clone()
    moved, foreign = 0, 0
    for i, at in enumerate(scene.rows.tolist()):
        ids, numbers = list(answers[at].token_ids), answers[at].logprobs
        prompt = list(answers[at].prompt)
        ours = scene.rollout.prompt_ids[at][scene.rollout.prompt_mask[at].bool()].tolist()
        if prompt != ours:
            scene.engine_prompts[at] = prompt
        own = scene.rollout.completion_ids[at].tolist()
        for n in (scene.row == i).nonzero().squeeze(-1).tolist():
            t = int(scene.column[n])
            if t >= len(ids) or ids[t] != own[t]:
                kept[n], foreign = False, foreign + 1
                continue
            true = numbers[t]
            moved += abs(true - float(world.reported[n])) > 1e-6 or bool(torch.isnan(world.reported[n]))
            reported[n] = true
    if not moved and not foreign:
        return None
    total = int(world.kept.sum())
    words = [f"{moved} of {total} log-probs that arrived are not those the engine returned for their token"] * (
        moved > 0
    )
    words += [f"{foreign} tokens are not those the engine generated"] * (foreign > 0)
    return Candidate(
        world=replace(world, reported=reported, kept=kept),
        finding="; ".join(words),
        details={"moved": moved, "foreign": foreign, "compared": total},
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    prompt: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]  # of these tokens


def _answers(scene: Scene) -> list[_Answer]:
    """What the engine returned, by row of the batch."""
    requests = scene.capture.requests
    if len(requests) != 1 or requests[0].outputs is None:
        raise NotPossible(
            "what the engine itself returned is not at hand (another rank asked the server, several calls a batch, or "
            "a batch gone by)"
        )
    rows = len(scene.rollout.completion_ids)
    outputs = requests[0].outputs
    flat = _of_server(outputs, rows) if isinstance(outputs, dict) else _of_engine(outputs)
    if len(flat) != rows:
        raise NotPossible(f"the engine returned {len(flat)} completions for {rows} rows")
    return flat


def _of_engine(outputs: Any) -> list[_Answer]:
    flat = []
    for output in outputs:
        for one in output.outputs:
            numbers = [float(given[token].logprob) for given, token in zip(one.logprobs, one.token_ids, strict=True)]
            flat.append(_Answer(output.prompt_token_ids, one.token_ids, numbers))
    return flat


def _of_server(answer: dict[str, Any], rows: int) -> list[_Answer]:
    """One answer for all ranks; the rank that asked, the main one, has the first rows."""
    prompts, completions = answer["prompt_ids"], answer["completion_ids"]
    each = len(completions) // len(prompts)
    flat = []
    for i, ids in enumerate(completions[:rows]):
        given = zip(ids, answer["logprob_token_ids"][i], answer["logprobs"][i], strict=True)
        numbers = [some[tokens.index(token)] for token, tokens, some in given]
        flat.append(_Answer(prompts[i // each], ids, [math.nan if x is None else x for x in numbers]))
    return flat


def context(scene: Scene, world: World) -> Candidate | None:
    """The trainer scores the prompts the engine was really given."""
    answers = _answers(scene)
    for at in scene.rows.tolist():
        ours = scene.rollout.prompt_ids[at][scene.rollout.prompt_mask[at].bool()].tolist()
        if list(answers[at].prompt) != ours:
            scene.engine_prompts[at] = list(answers[at].prompt)
    if not scene.engine_prompts:
        return None
    at, theirs = next(iter(scene.engine_prompts.items()))
    ours = scene.rollout.prompt_ids[at][scene.rollout.prompt_mask[at].bool()].tolist()
    first = next(
        (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
    )
    some = scene.row < FEW
    other = with_variant(world, batch="unpadded", contexts="engine", few=True)
    return Candidate(
        world=replace(other, kept=world.kept & some),
        over=some,
        finding=f"{len(scene.engine_prompts)} of {scene.sequences} prompts are not the ids the engine was given: the "
        f"first differs from position {first} on ({len(theirs)} tokens at the engine, {len(ours)} here)",
        details={"prompts": len(scene.engine_prompts), "first_difference": first,
                 "lengths": [len(theirs), len(ours)]},
    )  # fmt: skip


ARRIVED: tuple[Probe, ...] = (
    probe("finite", "nonfinite_logprobs", "none", finite,
           "some log-probs are not finite", "without these tokens the drift is gone"),
    probe("handover", "token_misalignment", "none", handover,
           "what arrived is not what the engine returned", "with the engine's own answer the drift is gone"),
    probe("context", "token_misalignment", "head", context,
           "the engine was given other prompt ids", "on the engine's own ids the trainer agrees"),
)  # fmt: skip
