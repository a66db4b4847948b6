"""A batch to ask "what if" of: some of its tokens, and what the trainer would have said of them in another world.

A ``World`` is one way the trainer's log-probs could have come about: a forward pass (``Variant``), the law
made of its logits (``Law``), and the engine's numbers it is compared with. Probes undo one cause
by changing one thing in it, so that causes can be undone one after the other. Nothing of the run is changed: weights
are swapped by pointer and put back, and passes draw no random number of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..engine.base import Engine, in_process
from ..records import RolloutBatch, SamplingSettings, ScoredBatch
from ..scoring.head import logits_chunk, score_tokens
from ..scoring.head_spec import Head
from ..scoring.perturb import eval_mode, own_random_numbers, rebuilt, rounded_cache, swapped
from ..scoring.scorer import causal_lm, materialized_head
from ..trainers.capture import Capture
from .distribution import Law, Tokens, describe, huber, log_probs

__all__ = ["FEW", "Scene", "Variant", "World"]

_FIT_BYTES = 96 << 20  # of the whole logits of the tokens that laws are fitted to

_FIT_TOKENS = 256

FEW = 4

NONFINITE = 1.0  # nats that a token counts for when either side has no finite number for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A forward pass of the policy, always with every layer in eval mode."""

    batch: str = "padded"  # padded as in training; single: one sequence at a time; unpadded: and without its padding
    contexts: str = "trainer"  # engine: the prompts the engine was really given
    model: str = "live"  # engine_config: built anew from the engine's config, on the trainer's weights
    weights: str = "own"  # engine: those the engine holds; rounded: own ones, in the engine's dtype and back
    kv_dtype: torch.dtype | None = None  # round keys and values to this dtype
    kv_truncated: bool = False  # towards zero: the upper byte of fp16 is e5m2, and some kernels just take it
    few: bool = False  # only the first FEW sequences: passes one by one are slow


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """How the two sides' numbers came about. ``variant=None``: the trainer's numbers as the run scored them."""

    variant: Variant | None
    law: Law
    reported: torch.Tensor  # (N,) the engine's side
    kept: torch.Tensor  # (N,) bool: tokens that are looked at


class Scene:
    """Some rows of one rank's rollout batch. N tokens: those that were compared, row by row."""

    def __init__(
        self,
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
    ):
        self.capture, self.rollout, self.engine = capture, rollout, engine
        self.trainer = capture.trainer
        self.model = capture.policy
        count = len(capture.rows_within(rollout, token_budget))
        every = torch.arange(len(scored.mask), device=scored.mask.device)
        self._scored_rows = every[torch.arange(count, device=every.device) * len(every) // count] if count else every
        self.rows = self._scored_rows if scored.rows is None else scored.rows[self._scored_rows]
        mask = scored.mask[self._scored_rows]
        self.row, self.column = mask.nonzero(as_tuple=True)  # (N,) within rows, within the completion

        def tokens(x: torch.Tensor) -> torch.Tensor:
            return x[self._scored_rows][self.row, self.column].double().cpu()

        self.reported, self.as_scored = tokens(scored.rollout_logprobs), tokens(scored.trainer_logprobs)
        self.own_scored = tokens(scored.own_logprobs)
        self.entropy = None if scored.entropy is None else tokens(scored.entropy)
        self.targets = rollout.completion_ids[self.rows][self.row, self.column]
        turn, offset = turns(rollout.engine_mask[self.rows])
        self.turn, self.offset = turn[self.row, self.column].cpu(), offset[self.row, self.column].cpu()  # (N,) each
        self.row, self.column = self.row.cpu(), self.column.cpu()
        self.temperature = rollout.trainer_temperature
        meant = rollout.sampling if replayed else SamplingSettings()
        self.law = Law(sampling=replace(meant, temperature=self.temperature, unreplayed=()))
        self.plain = Law(sampling=SamplingSettings(temperature=self.temperature))
        self.base = World(
            variant=None, law=self.law, reported=self.reported, kept=torch.ones(len(self.row), dtype=torch.bool)
        )
        self.floor = floor  # the noise floor of the mean residual
        self.began_healthy = began_healthy  # whether the run's first window was OK; None: not known
        self.redacted = redacted  # name no token ids
        self.again: Any = None  # the engine's answers when asked again (ladder.py)
        self.prefilled: Any = None  # its scores by prefill (ladder.py)
        self._whole_head: Head | None = None
        self.notes: dict[str, Any] = {}  # for the diagnosis' details: JSON
        self.engine_values: Mapping[str, tuple[torch.nn.Parameter, torch.Tensor]] = {}  # read back, where they differ
        self.engine_prompts: dict[int, list[int]] = {}  # by row of the batch, where they are not the trainer's

    def __len__(self) -> int:
        return len(self.row)

    @property
    def sequences(self) -> int:
        """Sequences looked at."""
        return len(self.rows)

    def prompt(self, at: int) -> list[int]:
        """The prompt ids of a row of the batch, as far as known those the engine was given."""
        if at in self.engine_prompts:
            return self.engine_prompts[at]
        return self.rollout.prompt_ids[at][self.rollout.prompt_mask[at].bool()].tolist()

    def words(self, law: Law, base: Law) -> str:
        """What of a law differs from another."""
        return describe(law, base, ids=not self.redacted)

    @property
    def has_answers(self) -> bool:
        """Whether what the engine returned is at hand: not of a server, not of a batch gone by."""
        requests = self.capture.requests
        return bool(requests) and all(request.outputs is not None for request in requests)

    @property
    def sharded(self) -> bool:
        """Whether the policy's weights are spread over ranks, so that they can't be swapped or rebuilt here."""
        return self.capture.sharded

    def prepare(self) -> None:
        """Of a sharded policy: the one pass and the head all readings are made from. A collective there."""
        if self.sharded:
            self.states(Variant())
            with materialized_head(self.model, self.temperature) as head:
                bias = None if head.bias is None else head.bias.clone()
                low = tuple((a.clone(), b.clone(), x) for a, b, x in head.low_rank)
                self._whole_head = replace(head, weight=head.weight.clone(), bias=bias, low_rank=low)

    # ---- what disagrees ---------------------------------------------------------------------------------------

    def residual(self, world: World) -> tuple[torch.Tensor, torch.Tensor]:
        """(sequences, 2) sums of mean-able residuals: Σ Huber(Δ) and tokens of each sequence; and Δ (N,)."""
        delta = self.log_probs(world) - world.reported
        size = torch.where(torch.isfinite(delta), huber(delta), NONFINITE) * world.kept
        zeros = torch.zeros(self.sequences, dtype=torch.float64)
        sums = zeros.scatter_add(0, self.row, size.double())
        counts = zeros.scatter_add(0, self.row, world.kept.double())
        return torch.stack([sums, counts], dim=1), delta

    def log_probs(self, world: World) -> torch.Tensor:
        """(N,) fp64 on the CPU: the trainer's side of a world."""
        if world.variant is None:
            if world.law != self.law:
                raise ValueError("the numbers as scored have the law they were scored with; give a variant")
            return self.as_scored
        parts = []
        states = self.states(world.variant)
        with self._head(world.variant, world.law.sampling.temperature) as head:
            device = head.weight.device
            plain = world.law == Law(sampling=SamplingSettings(temperature=world.law.sampling.temperature))
            targets = self.targets.to(device)
            if plain:
                return score_tokens(states.to(device), targets, head).logprobs.double().cpu()
            step = max(1, (64 << 20) // (head.vocab_used * 4 * 12))
            for i in range(0, len(self), step):
                part = slice(i, i + step)
                logits = logits_chunk(states[part].to(device), head)
                parts.append(log_probs(self._tokens(part, logits, world), world.law).logprobs.double().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def fit_tokens(self, world: World) -> Tokens:
        """Evenly spaced tokens of a world with their whole logits, for fits."""
        if world.variant is None:
            raise ValueError("a fit needs a forward pass; give a variant")
        usable = (world.kept & torch.isfinite(world.reported)).nonzero().squeeze(-1)
        with self._head(world.variant, self.temperature) as head:
            count = max(16, min(_FIT_TOKENS, _FIT_BYTES // (4 * head.vocab_used), len(usable)))
            picked = usable[torch.linspace(0, len(usable) - 1, count).long().unique()] if len(usable) else usable
            logits = logits_chunk(self.states(world.variant)[picked].to(head.weight.device), head)
            return self._tokens(picked, logits, world)

    @contextmanager
    def _head(self, variant: Variant, temperature: float) -> Iterator[Head]:
        if self._whole_head is not None:
            yield replace(self._whole_head, temperature=temperature)
            return
        with self._applied(variant) as model, materialized_head(model, temperature) as head:
            yield head

    def _tokens(self, part: Any, logits: torch.Tensor, world: World) -> Tokens:
        row, column = self.row[part], self.column[part]
        at = self.rows.cpu()[row]
        ids = torch.cat([self.rollout.prompt_ids, self.rollout.completion_ids], dim=1).cpu()[at]
        real = torch.cat([self.rollout.prompt_mask, self.rollout.completion_mask], dim=1).cpu()[at].bool()
        width = self.rollout.prompt_ids.shape[1]
        position = torch.arange(ids.shape[1])
        real &= position < width + column.unsqueeze(-1)
        device = logits.device
        return Tokens(
            logits=logits,
            targets=self.targets[part].to(device),
            reported=world.reported[part].to(device),
            context=ids.to(device),
            real=real.to(device),
            output=(real & (position >= width)).to(device),
            sequence=row.to(device),
        )

    # ---- forward passes ---------------------------------------------------------------------------------------

    def states(self, variant: Variant) -> torch.Tensor:
        """(N, H) hidden states that predict the tokens, where they were computed. The last few are remembered."""
        if variant not in self._states:
            if self._whole_head is not None:
                raise ValueError("the policy is sharded over ranks: one pass over it is made, and no other")
            if len(self._states) > 3:
                self._states.pop(next(iter(self._states)))
            with self._applied(variant) as model, torch.no_grad():
                self._states[variant] = self._pass(model, variant)
        return self._states[variant]

    @functools.cached_property
    def _states(self) -> dict[Variant, torch.Tensor]:
        return {}

    def _pass(self, model: torch.nn.Module, variant: Variant) -> torch.Tensor:
        rollout, keep = self.rollout, self.rollout.completion_ids.shape[1]
        rows = self.rows[:FEW] if variant.few else self.rows
        known = self.row < len(rows)
        if variant.batch != "unpadded" and variant.contexts == "trainer":
            ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)[rows]
            attention = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[rows]
            hidden = self._hidden(model, ids, attention, keep, 1 if variant.batch == "single" else None)
            hidden = hidden[self.row[known], self.column[known]]
        else:
            hidden = torch.cat([self._unpadded(model, i, variant) for i in range(len(rows))])
        out = hidden.new_zeros(len(self), hidden.shape[1])
        out[known.to(out.device)] = hidden
        return out

    def _unpadded(self, model: torch.nn.Module, i: int, variant: Variant) -> torch.Tensor:
        at, columns = int(self.rows[i]), self.column[self.row == i]
        prompt = self.rollout.prompt_ids[at][self.rollout.prompt_mask[at].bool()]
        if variant.contexts == "engine":
            prompt = torch.tensor(self.prompt(at), dtype=prompt.dtype, device=prompt.device)
        length = int(columns.max()) + 1 if len(columns) else 1  # up to the last token looked at
        ids = torch.cat([prompt, self.rollout.completion_ids[at][:length]])[None]
        return self._hidden(model, ids, torch.ones_like(ids), length, 1)[0, columns]

    def _hidden(
        self, model: torch.nn.Module, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None
    ) -> torch.Tensor:
        """(B, keep, H): the states that predict the last ``keep`` tokens."""
        seen: list[torch.Tensor] = []

        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            seen.append(hidden[:, -(keep + 1) : -1].detach())

        handle = causal_lm(model).base_model.register_forward_hook(hook)
        try:
            if model is self.model:
                self.capture.run_policy(ids, attention, keep, batch_size)
            else:
                with self.trainer.accelerator.autocast():
                    for one, its_mask in zip(
                        ids.split(batch_size or 8), attention.split(batch_size or 8), strict=True
                    ):
                        causal_lm(model).base_model(input_ids=one, attention_mask=its_mask, use_cache=False)
        finally:
            handle.remove()
        return torch.cat(seen)

    @contextmanager
    def _applied(self, variant: Variant) -> Iterator[torch.nn.Module]:
        """The model of a variant, for the duration of the block; everything as it was after it."""
        model = self._rebuilt if variant.model == "engine_config" else self.model
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(own_random_numbers())
            if variant.weights == "engine":
                stack.enter_context(swapped(dict(self.engine_values.values())))
            elif variant.weights == "rounded":
                stack.enter_context(swapped(self._rounded_weights))
            if variant.kv_dtype is not None:
                stack.enter_context(rounded_cache(causal_lm(model).base_model, variant.kv_dtype, variant.kv_truncated))
            yield model

    @functools.cached_property
    def _rounded_weights(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        dtype = self.capture.compute_dtype if self.engine is None else self.engine.dtype
        return {p: p.detach().to(dtype).to(p.dtype) for p in self.model.parameters() if p.is_floating_point()}

    @functools.cached_property
    def _rebuilt(self) -> torch.nn.Module:
        """The trainer's class on the engine's config, sharing the trainer's parameters; buffers are new."""
        engine = self.engine
        if not in_process(engine) or self.sharded or hasattr(self.model, "peft_config"):
            raise ValueError("the model can be rebuilt only beside a colocated engine, unsharded and without adapters")
        return rebuilt(causal_lm(self.model), engine.hf_config)


def turns(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a (B, C) mask of engine tokens: which run of them a token is in, and where in that run; (B, C) from 0."""
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    start = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    began = torch.where(start, column, 0).cummax(-1).values
    return (start.long().cumsum(-1) - 1).clamp(min=0), column - began
