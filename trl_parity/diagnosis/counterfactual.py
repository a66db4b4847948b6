"""A batch to ask "what if" of: some of its tokens, and what the trainer would have said of them had one thing been so.

A ``Counterfactual`` is one way the two sides' log-probs could have come about: a forward pass, the distribution made
of its logits, and the engine's numbers it is compared with. Probes undo one cause by changing one thing in it, so that
causes can be undone one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..engine.base import Engine
from ..records import RolloutBatch, SamplingSettings, ScoredBatch
from ..scoring.head import logits_chunk, score_tokens
from ..scoring.sampling import turns
from ..trainers.capture import Capture
from ..trainers.row_keys import prompt_keys
from ..trainers.some_rows import rows_within
from .distribution import Distribution, Tokens, describe, huber, log_probs
from .findings import EnginePrompts
from .forward_passes import FEW, ForwardPass, ForwardPasses
from .weight_versions import WeightVersions

__all__ = ["Counterfactual", "DiagnosedBatch"]

_FIT_BYTES = 96 << 20  # of the whole logits of the tokens that distributions are fitted to

_FIT_TOKENS = 256

_LOGITS_BYTES = 64 << 20  # of whole logits at once

NONFINITE = 1.0  # nats that a token counts for when either side has no finite number for it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counterfactual:
    """How the two sides' numbers came about. ``forward=None``: the trainer's numbers as the run scored them."""

    forward: ForwardPass | None
    distribution: Distribution
    reported: torch.Tensor  # (N,) the engine's side
    kept: torch.Tensor  # (N,) bool: tokens that are looked at


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiagnosedBatch:
    """Some rows of one rank's rollout batch. N tokens: those that were compared, row by row; all (N,) on the CPU."""

    capture: Capture
    rollout: RolloutBatch
    engine: Engine | None
    passes: ForwardPasses
    floor: float  # the noise floor of the mean residual
    began_healthy: bool | None  # whether the run's first window was OK; None: not known
    redacted: bool  # name no token ids
    rows: torch.Tensor  # (sequences,) of the rollout batch
    few: torch.Tensor  # within rows, of passes one by one: those that disagree most, of several prompts
    row: torch.Tensor  # within rows
    column: torch.Tensor  # within the completion
    turn: torch.Tensor  # which run of engine tokens, from 0
    offset: torch.Tensor  # where in that run
    targets: torch.Tensor  # their ids, where the rollout batch is
    as_scored: torch.Tensor  # the trainer's log-probs
    own_scored: torch.Tensor  # by the trainer's own head
    entropy: torch.Tensor | None
    start: Counterfactual  # nothing undone
    versions: WeightVersions | None = None  # of the policy's weights

    @classmethod
    def of(
        cls,
        capture: Capture,
        rollout: RolloutBatch,
        scored: ScoredBatch,
        engine: Engine | None,
        *,
        token_budget: int,
        replayed: bool,
        floor: float,
        began_healthy: bool | None = None,
        redacted: bool = False,
        versions: WeightVersions | None = None,
    ) -> DiagnosedBatch:
        """Evenly spaced rows of those that were scored, within the budget. ``replayed``: sampling was, in scoring."""
        some = _spread(len(scored.mask), len(rows_within(capture, rollout, token_budget)), scored.mask.device)
        rows = some if scored.rows is None else scored.rows[some]
        where = scored.mask[some].nonzero(as_tuple=True)  # rows and columns, on the device

        def tokens(x: torch.Tensor) -> torch.Tensor:
            return x[some][where].double().cpu()

        turn, offset = (x[where].cpu() for x in turns(rollout.engine_mask[rows]))
        row, column = (x.cpu() for x in where)
        meant = rollout.sampling if replayed else SamplingSettings()
        start = Counterfactual(
            forward=None,
            distribution=Distribution(sampling=replace(meant, temperature=rollout.trainer_temperature, unreplayed=())),
            reported=tokens(scored.rollout_logprobs),
            kept=torch.ones(len(row), dtype=torch.bool),
        )
        delta = tokens(scored.trainer_logprobs) - start.reported
        size = torch.where(torch.isfinite(delta), huber(delta), NONFINITE)
        few = _few(prompt_keys(rollout)[rows, None].cpu(), row, size)
        return cls(
            capture=capture,
            rollout=rollout,
            engine=engine,
            passes=ForwardPasses(capture, rollout, engine, rows=rows, row=row, column=column, few=few),
            floor=floor,
            began_healthy=began_healthy,
            redacted=redacted,
            rows=rows,
            few=few,
            row=row,
            column=column,
            turn=turn,
            offset=offset,
            targets=rollout.completion_ids[rows][where],
            as_scored=tokens(scored.trainer_logprobs),
            own_scored=tokens(scored.own_logprobs),
            entropy=None if scored.entropy is None else tokens(scored.entropy),
            start=start,
            versions=versions,
        )

    def __len__(self) -> int:
        return len(self.row)

    @property
    def sequences(self) -> int:
        """Sequences looked at."""
        return len(self.rows)

    @property
    def of_few(self) -> torch.Tensor:
        """(N,) bool: tokens of the few."""
        return torch.isin(self.row, self.few)

    @property
    def prompt_lengths(self) -> torch.Tensor:
        """(sequences,) without padding."""
        return self.rollout.prompt_mask[self.rows].sum(1).cpu()

    @property
    def padding(self) -> torch.Tensor:
        """(sequences,) of the prompt, in tokens."""
        return self.rollout.prompt_ids.shape[1] - self.prompt_lengths

    @property
    def model(self) -> Any:
        """The policy without wrappers of distribution."""
        return self.capture.policy

    @property
    def temperature(self) -> float:
        """What the trainer's loss divides logits by."""
        return self.rollout.trainer_temperature

    @property
    def plain(self) -> Distribution:
        """The trainer's, without anything an engine does to sample."""
        return Distribution(sampling=SamplingSettings(temperature=self.temperature))

    @property
    def has_answers(self) -> bool:
        """Whether what the engine returned is at hand: not of a server, not of a batch gone by."""
        requests = self.capture.requests
        return bool(requests) and all(request.outputs is not None for request in requests)

    @property
    def sharded(self) -> bool:
        """Whether the policy's weights are spread over ranks, so that they can't be swapped or rebuilt here."""
        return self.capture.sharded

    def prompt(self, at: int, engine_prompts: EnginePrompts | None) -> list[int]:
        """The prompt ids of a row of the rollout batch, as far as known those the engine was given."""
        if engine_prompts is not None and at in engine_prompts.by_row:
            return engine_prompts.by_row[at]
        return self.rollout.prompt_ids[at][self.rollout.prompt_mask[at].bool()].tolist()

    def words(self, distribution: Distribution, base: Distribution) -> str:
        """What of a distribution differs from another."""
        return describe(distribution, base, ids=not self.redacted)

    # ---- what disagrees ---------------------------------------------------------------------------------------

    def residual(self, current: Counterfactual) -> tuple[torch.Tensor, torch.Tensor]:
        """(sequences, 2) sums of mean-able residuals: Σ Huber(Δ) and tokens of each sequence; and Δ (N,)."""
        delta = self.log_probs(current) - current.reported
        size = torch.where(torch.isfinite(delta), huber(delta), NONFINITE) * current.kept
        zeros = torch.zeros(self.sequences, dtype=torch.float64)
        sums = zeros.scatter_add(0, self.row, size.double())
        counts = zeros.scatter_add(0, self.row, current.kept.double())
        return torch.stack([sums, counts], dim=1), delta

    def log_probs(self, current: Counterfactual) -> torch.Tensor:
        """(N,) fp64 on the CPU: the trainer's side of it."""
        if current.forward is None:
            if current.distribution != self.start.distribution:
                raise ValueError("the numbers as scored have the distribution they were scored with; give a pass")
            return self.as_scored
        temperature = current.distribution.sampling.temperature
        parts = []
        states = self.passes.states(current.forward)
        with self.passes.head(current.forward, temperature) as head:
            device = head.weight.device
            if current.distribution == Distribution(sampling=SamplingSettings(temperature=temperature)):
                return score_tokens(states.to(device), self.targets.to(device), head).logprobs.double().cpu()
            step = max(1, _LOGITS_BYTES // (head.vocab_used * 4 * 12))
            for i in range(0, len(self), step):
                part = slice(i, i + step)
                logits = logits_chunk(states[part].to(device), head)
                scores = log_probs(self._tokens(part, logits, current), current.distribution)
                parts.append(scores.logprobs.double().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def fit_tokens(self, current: Counterfactual) -> Tokens:
        """Evenly spaced tokens with their whole logits, for fits."""
        if current.forward is None:
            raise ValueError("a fit needs a forward pass; give one")
        usable = (current.kept & torch.isfinite(current.reported)).nonzero().squeeze(-1)
        with self.passes.head(current.forward, self.temperature) as head:
            count = max(16, min(_FIT_TOKENS, _FIT_BYTES // (4 * head.vocab_used), len(usable)))
            picked = usable[torch.linspace(0, len(usable) - 1, count).long().unique()] if len(usable) else usable
            logits = logits_chunk(self.passes.states(current.forward)[picked].to(head.weight.device), head)
            return self._tokens(picked, logits, current)

    def _tokens(self, part: Any, logits: torch.Tensor, current: Counterfactual) -> Tokens:
        row, column = self.row[part], self.column[part]
        at = self.rows.cpu()[row]
        ids = torch.cat([self.rollout.prompt_ids, self.rollout.completion_ids], dim=1).cpu()[at]
        real = torch.cat([self.rollout.prompt_mask, self.rollout.completion_mask], dim=1).cpu()[at].bool()
        width = self.rollout.prompt_ids.shape[1]
        position = torch.arange(ids.shape[1])
        real &= position < width + column.unsqueeze(-1)
        began = width + (column - self.offset[part])  # earlier turns are prompt to the request
        device = logits.device
        return Tokens(
            logits=logits,
            targets=self.targets[part].to(device),
            reported=current.reported[part].to(device),
            context=ids.to(device),
            real=real.to(device),
            output=(real & (position >= began.unsqueeze(-1))).to(device),
            sequence=row.to(device),
        )


def _few(prompts: torch.Tensor, row: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Rows, in order: of each prompt the one whose tokens disagree most, largest first; then further ones."""
    sums, counts = torch.zeros(2, len(prompts), dtype=torch.float64)
    sums.scatter_add_(0, row, size.double())
    counts.scatter_add_(0, row, torch.ones_like(size, dtype=torch.float64))
    largest = (sums / counts.clamp(min=1)).argsort(descending=True, stable=True).tolist()
    _, prompt = prompts.unique(dim=0, return_inverse=True)
    seen: set[int] = set()
    first = [i for i in largest if int(prompt[i]) not in seen and not seen.add(int(prompt[i]))]  # type: ignore[func-returns-value]
    rest = [i for i in largest if i not in set(first)]
    return torch.tensor(sorted([*first, *rest][:FEW]), dtype=torch.long)


def _spread(total: int, count: int, device: torch.device) -> torch.Tensor:
    """``count`` of ``total`` indices, evenly spaced; all of them where count is 0."""
    every = torch.arange(total, device=device)
    return every[torch.arange(count, device=device) * total // count] if count else every
