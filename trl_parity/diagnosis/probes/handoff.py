"""Probes of the hand-off: what arrived at the trainer, against what the engine was given and returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..counterfactual import Counterfactual, DiagnosedBatch
from ..findings import NOTHING, EnginePrompts, Findings
from .asking import answered, asked_again
from .base import Candidate, NotPossible, Probe, independent, probe, require_engine, with_forward

__all__ = ["HANDOFF"]


def finite(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """Leave out tokens without a finite number on either side."""
    good = torch.isfinite(batch.as_scored) & torch.isfinite(current.reported)
    bad = int((current.kept & ~good).sum())
    if not bad:
        return None
    engine = int((current.kept & ~torch.isfinite(current.reported)).sum())
    return Candidate(
        counterfactual=replace(current, kept=current.kept & good),
        finding=f"{bad} of {int(current.kept.sum())} tokens have no finite log-prob ({engine} of them the engine's)",
        details={"nonfinite": bad, "engine": engine},
    )


def handover(batch: DiagnosedBatch, current: Counterfactual) -> Candidate | None:
    """The engine's own numbers, as it returned them, in place of those that arrived.

    Tokens that it did not generate are left out, with all that follow them: those have another context here.
    """
    answers = _answers(batch)
    reported, kept = current.reported.clone(), current.kept.clone()
    moved, foreign = 0, torch.zeros(max(map(len, answers)), dtype=torch.long)  # the latter by turn
    for i, at in enumerate(batch.rows.tolist()):
        off = False  # a token before is another
        for n in (batch.row == i).nonzero().squeeze(-1).tolist():
            turn, t = (int(batch.turn[n]), int(batch.offset[n])) if len(answers[at]) > 1 else (0, int(batch.column[n]))
            if turn >= len(answers[at]):
                raise NotPossible(f"row {at} has more turns than the engine made answers for it")
            ids, token = answers[at][turn].token_ids, int(batch.targets[n])
            if t >= len(ids) or ids[t] != token:
                kept[n], off = False, True
                foreign[turn] += 1
                continue
            if off:
                kept[n] = False
                continue
            true = answers[at][turn].logprobs[t]
            moved += abs(true - float(current.reported[n])) > 1e-6 or bool(torch.isnan(current.reported[n]))
            reported[n] = true
    if not moved and not foreign.any():
        return None
    total = int(current.kept.sum())
    words = [f"{moved} of {total} log-probs that arrived are not those the engine returned for their token"] * (
        moved > 0
    )
    if foreign.any():
        onset = f", from turn {int(foreign.nonzero()[0]) + 1} of {len(foreign)} on" if len(foreign) > 1 else ""
        words.append(f"{int(foreign.sum())} tokens are not those the engine generated{onset}")
    return Candidate(
        counterfactual=replace(current, reported=reported, kept=kept),
        finding="; ".join(words),
        details={
            "moved": moved,
            "foreign": int(foreign.sum()),
            "foreign_by_turn": foreign.tolist(),
            "compared": total,
        },
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    prompt: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]  # of these tokens


def _answers(batch: DiagnosedBatch) -> list[list[_Answer]]:
    """What the engine returned, by row of the batch and turn."""
    require_engine(batch)
    requests, rows = batch.capture.requests, len(batch.rollout.completion_ids)
    if not batch.has_answers:
        raise NotPossible(
            "what the engine itself returned is not at hand (another rank asked the server, or a batch gone by)"
        )
    first, *later = (
        _of_server(request.outputs) if isinstance(request.outputs, dict) else _of_engine(request.outputs)
        for request in requests
    )
    if isinstance(requests[0].outputs, dict):  # one answer for all ranks: the rank that asked has the first rows
        first = first[:rows]
    if len(first) != rows:
        raise NotPossible(f"the engine's first call returned {len(first)} completions for {rows} rows")
    chains = [[answer] for answer in first]
    for call in later:
        continued = _continued(chains, call)
        if len(call) == rows and len(continued) >= rows / 2:  # some may have been rendered anew: then by their place
            continued = list(range(rows))
        if len(continued) != len(call):
            raise NotPossible("the engine was called several times a batch, and not turn by turn")
        for row, answer in zip(continued, call, strict=True):
            chains[row].append(answer)
    return chains


def _of_engine(outputs: Any) -> list[_Answer]:
    flat = []
    for output in outputs:
        for one in output.outputs:
            numbers = [float(given[token].logprob) for given, token in zip(one.logprobs, one.token_ids, strict=True)]
            flat.append(_Answer(output.prompt_token_ids, one.token_ids, numbers))
    return flat


def _of_server(answer: dict[str, Any]) -> list[_Answer]:
    prompts, completions = answer["prompt_ids"], answer["completion_ids"]
    each = len(completions) // len(prompts)
    flat = []
    for i, ids in enumerate(completions):
        given = zip(ids, answer["logprob_token_ids"][i], answer["logprobs"][i], strict=True)
        numbers = [some[tokens.index(token)] for token, tokens, some in given]
        flat.append(_Answer(prompts[i // each], ids, [math.nan if x is None else x for x in numbers]))
    return flat


def _continued(chains: list[list[_Answer]], call: list[_Answer]) -> list[int]:
    """Rows, in order, whose turns so far are what the answers' prompts begin with."""
    found: list[int] = []
    for answer in call:
        for row in range(found[-1] + 1 if found else 0, len(chains)):
            last = chains[row][-1]
            so_far = [*last.prompt, *last.token_ids]
            if list(answer.prompt[: len(so_far)]) == so_far:
                found.append(row)
                break
    return found


def _before(batch: DiagnosedBatch, at: int, column: int) -> list[int]:
    """What the trainer has in row ``at`` before a column of the completion."""
    prompt = batch.rollout.prompt_ids[at][batch.rollout.prompt_mask[at].bool()].tolist()
    return prompt + batch.rollout.completion_ids[at, :column].tolist()


def context(batch: DiagnosedBatch, current: Counterfactual, findings: Findings) -> tuple[Candidate | None, Findings]:
    """The trainer scores the prompts the engine was really given."""
    answers = _answers(batch)
    prompts = findings.engine_prompts or _engine_prompts(batch, answers)
    found = Findings(engine_prompts=prompts)
    if not prompts.by_row:
        return _later_contexts(batch, current, answers), found
    at, theirs = next(iter(prompts.by_row.items()))
    ours = _before(batch, at, 0)
    first, count = _first_difference(theirs, ours), len(prompts.by_row)
    words = (
        f"{count} of {batch.sequences} prompts are not the ids the engine was given: the first differs from position "
        f"{first} on ({len(theirs)} tokens at the engine, {len(ours)} here)"
    )
    details = {"prompts": count, "first_difference": first, "lengths": [len(theirs), len(ours)]}
    if batch.rollout.image_keys is not None:
        try:
            return replace(_on_ours(batch, current, at, words), details=details), found
        except NotPossible as e:
            raise NotPossible(f"{words}; {e}", found) from e
    some = batch.of_few
    other = with_forward(current, layout="unpadded", prompts=prompts, few=True)
    candidate = Candidate(
        counterfactual=replace(other, kept=current.kept & some), over=some, finding=words, details=details
    )
    return candidate, found


def _on_ours(batch: DiagnosedBatch, current: Counterfactual, at: int, words: str) -> Candidate:
    """The engine is asked on the trainer's prompts: a model takes as many image tokens as there are features.

    ``at``: a row whose prompt is another to the engine.
    """
    again = asked_again(batch, current, NOTHING)
    candidate = answered(batch, current, again, f"{words}; here it is asked on the trainer's prompts")
    given = None if batch.capture.pictures is None else batch.capture.pictures[at]
    twice = given is not None and given.asked == _before(batch, at, 0)
    return replace(candidate, fix=_EXPANDED_TWICE if twice else "")


_EXPANDED_TWICE = (
    "TRL's processor had put in each picture's tokens, and vLLM put them in once more (huggingface/trl#6294): before "
    "trainer.train(), trl_parity.trainers.pictures.expand_pictures_once(trainer)."
)


def _engine_prompts(batch: DiagnosedBatch, answers: list[list[_Answer]]) -> EnginePrompts:
    given = {at: list(answers[at][0].prompt) for at in batch.rows.tolist()}
    return EnginePrompts({at: ids for at, ids in given.items() if ids != _before(batch, at, 0)})


def _later_contexts(batch: DiagnosedBatch, current: Counterfactual, answers: list[list[_Answer]]) -> Candidate | None:
    """Leave out turns that the engine began from other ids than the trainer has before them."""
    kept, found, words = current.kept.clone(), 0, ""
    for i, at in enumerate(batch.rows.tolist()):
        for turn, answer in enumerate(answers[at][1:], 1):
            tokens = (batch.row == i) & (batch.turn == turn)
            if not tokens.any():
                continue
            ours, theirs = _before(batch, at, int(batch.column[tokens].min())), list(answer.prompt)
            if theirs != ours:
                kept &= ~((batch.row == i) & (batch.turn >= turn))
                found += 1
                words = words or (
                    f"turn {turn + 1} of row {at}: the ids differ from position {_first_difference(theirs, ours)} on "
                    f"({len(theirs)} tokens at the engine, {len(ours)} here)"
                )
                break
    if not found:
        return None
    return Candidate(
        counterfactual=replace(current, kept=kept),
        finding=f"{found} of {batch.sequences} sequences have other ids before a turn than the engine had; {words}",
        details={"sequences": found},
    )


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


HANDOFF: tuple[Probe, ...] = (
    probe("finite", "nonfinite_logprobs", "none", independent(finite),
           "some log-probs are not finite", "without these tokens the drift is gone"),
    probe("handover", "token_misalignment", "none", independent(handover),
           "what arrived is not what the engine returned", "with the engine's own answer the drift is gone"),
    probe("context", "token_misalignment", "head", context,
           "the engine was given other prompt ids", "on the engine's own ids the trainer agrees",
           uses=("engine_prompts",), gives=("engine_prompts",)),
)  # fmt: skip
