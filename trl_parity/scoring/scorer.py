"""The trainer's side of the comparison: hidden states of a forward that runs anyway → fp32-head scores.

TRL runs a no-grad forward over each rollout batch, mini-batch by mini-batch. ``CompletionScorer`` hooks the
backbone during that pass and recomputes only the head, only on completion tokens, so no backbone forward is added
and no hidden states outlive their mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..records import SamplingSettings
from .device_seconds import DeviceSeconds
from .head import logits_chunk, score_tokens
from .head_spec import Head, HeadScores
from .model_head import backbone_of, materialized_head
from .own_head import OwnHeadRounding
from .sampling import ReplayScores, candidates, replay, replay_top, turns
from .token_sample import TokenSample

__all__ = ["CompletionScorer", "CompletionScores", "Located"]


class CompletionScores(NamedTuple):
    """Scores of completion tokens, all (B, C); zero where the attention mask is zero."""

    logprobs: torch.Tensor  # fp32 head, engine's processing replayed when asked
    plain: torch.Tensor  # the same before any replay
    entropy: torch.Tensor  # of the plain fp32-head law, nats
    law_entropy: torch.Tensor  # of the law that logprobs belongs to: after replayed processing, else the same
    log_kept: torch.Tensor | None
    out_of_support: torch.Tensor | None
    weights: torch.Tensor | None = None  # how many tokens each stands for, 0: not scored; None: all were


class Located(NamedTuple):
    """Where a forward has the tokens to score: N in B rows of P prompt and C completion columns."""

    states: torch.Tensor  # (N, H): those that predict them
    ids: torch.Tensor  # (B, P + C)
    attention_mask: torch.Tensor  # (B, P + C)
    rows: torch.Tensor  # (N,) int64, in [0, B), ascending
    columns: torch.Tensor  # (N,) int64, in [0, C)
    keep: int  # C
    # (B, C) bool: what the engine sampled, each run of it by one request; None: the whole completion, by one
    engine_mask: torch.Tensor | None = None


def _joined(parts: list[ReplayScores]) -> ReplayScores:
    return parts[0] if len(parts) == 1 else ReplayScores(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _drawn(sample: TokenSample, located: Located) -> tuple[Located, torch.Tensor]:
    """The tokens to score of those the engine sampled, and their weights."""
    rows, columns, mask = located.rows, located.columns, located.engine_mask
    real = torch.arange(len(rows), device=rows.device) if mask is None else mask[rows, columns].nonzero()[:, 0]
    drawn, weights = sample.draw(rows[real])
    kept = real[drawn]
    states = located.states[kept.to(located.states.device)]
    return located._replace(states=states, rows=rows[kept], columns=columns[kept]), weights


class CompletionScorer:
    """Context manager: while open, every forward of the model's backbone is scored through the fp32 head.

    ``logits_to_keep`` (C): completion columns at the right of each row. With ``replay_sampling``, the engine's
    truncation and penalties are applied to the trainer's logits; ``logits_dtype`` rounds them as a head of that dtype
    would. A failure inside never reaches the forward: it is kept in ``error``, and ``scores()`` re-raises it.

    ``locate`` finds the tokens in a forward, from its hidden states and the backbone's arguments. ``engine_mask``
    (rows of all forwards, C): what the engine sampled, where it is not the whole completion by one request.
    ``rounding``: asked for, how far a head of the forward's own dtype moves log-probs. ``sample``: what draws the
    tokens that are enough; the scores of all others are zero.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        logits_to_keep: int,
        *,
        temperature: float,
        sampling: SamplingSettings,
        replay_sampling: bool,
        chunk_bytes: int,
        backend: str = "auto",
        logits_dtype: torch.dtype | None = None,
        rounding: OwnHeadRounding | None = None,
        sample: TokenSample | None = None,
    ):
        self._model = model
        self._keep = logits_to_keep
        self._temperature = temperature
        self._sampling = sampling
        self._replay = replay_sampling and (sampling.truncates or sampling.penalizes)
        self._chunk_bytes = chunk_bytes
        self._backend = backend
        self._logits_dtype = logits_dtype
        self._parts: list[CompletionScores] = []
        self._rows = 0  # of the forwards so far
        self.rounding = rounding
        self.sample = sample
        self.engine_mask: torch.Tensor | None = None
        self.locate: Callable[[torch.Tensor, Mapping[str, Any]], Located] = self._right_columns
        self.error: Exception | None = None
        self._spent = DeviceSeconds()

    def __enter__(self) -> CompletionScorer:
        if self.rounding is not None:
            self.rounding.begin_pass()
        self._handle = backbone_of(self._model).register_forward_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()

    def _hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            # Gathering a sharded head is a collective: first, and even after a failure on this rank, or others hang.
            with (
                self._spent.counted(),
                torch.no_grad(),
                materialized_head(self._model, self._temperature, self._logits_dtype) as head,
            ):
                if self.error is None:
                    given = kwargs if "input_ids" in kwargs else {**kwargs, "input_ids": args[0]}
                    hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
                    self._parts.append(self._score(head, self.locate(hidden.detach(), given)))
        except Exception as e:
            self.error = e

    @property
    def seconds(self) -> float:
        """What scoring took inside the passes so far. Waits for a GPU."""
        return self._spent.total

    @property
    def seconds_for_all(self) -> float:
        """``seconds`` as if all tokens had been scored."""
        sample, seconds = self.sample, self.seconds
        return seconds if sample is None or not sample.drawn else seconds * sample.seen / sample.drawn

    @property
    def ran(self) -> bool:
        """Whether a forward of the backbone was seen."""
        return bool(self._parts) or self.error is not None

    def _right_columns(self, hidden: torch.Tensor, given: Mapping[str, Any]) -> Located:
        attention_mask, keep = given.get("attention_mask"), self._keep
        if attention_mask is None or attention_mask.ndim != 2:  # another's forward: everything is scored
            attention_mask = torch.ones_like(given["input_ids"])
        part = slice(self._rows, self._rows + len(hidden))
        self._rows = part.stop
        engine_mask = None if self.engine_mask is None else self.engine_mask[part]
        rows, columns = attention_mask[:, -keep:].bool().nonzero(as_tuple=True)  # on an accelerator: one sync a pass
        before = rows * hidden.shape[1] + columns + (hidden.shape[1] - keep - 1)  # t - 1 predicts token t
        states = hidden.flatten(0, 1).index_select(0, before)  # copies rows; hidden[rows, columns] copies numbers
        return Located(states, given["input_ids"], attention_mask, rows, columns, keep, engine_mask)

    def _score(self, head: Head, located: Located) -> CompletionScores:
        ids, keep, device = located.ids, located.keep, head.weight.device
        weights: list[torch.Tensor] = []
        if self.sample is not None:
            located, drawn = _drawn(self.sample, located)
            weights = [drawn.to(device)]
        states = located.states.to(device)
        targets = ids[:, ids.shape[1] - keep :][located.rows, located.columns].to(device)
        if self._replay:
            located = located._replace(states=states, rows=located.rows.to(device), columns=located.columns.to(device))
            plain, replayed = self._replay_tokens(targets, head, located, candidates(self._sampling, head.vocab_used))
            plain = plain or self._plain(states, targets, head)
            found = [*plain, replayed.logprobs, replayed.entropy, replayed.log_kept, replayed.out_of_support.float()]
        else:
            plain = self._plain(states, targets, head)
            found = list(plain)
        if self.rounding is not None:
            self.rounding.add(states, targets, head, plain.logprobs, self._chunk_bytes)
        found += weights
        placed = torch.zeros(len(found), len(ids), keep, dtype=torch.float32, device=device)
        placed[:, located.rows.to(device), located.columns.to(device)] = torch.stack(found)
        weight = placed[-1] if weights else None
        if not self._replay:
            return CompletionScores(placed[0], placed[0], placed[1], placed[1], None, None, weight)
        return CompletionScores(placed[2], placed[0], placed[1], placed[3], placed[4], placed[5].bool(), weight)

    def _plain(
        self, states: torch.Tensor, targets: torch.Tensor, head: Head, top: torch.Tensor | None = None
    ) -> HeadScores:
        return score_tokens(states, targets, head, chunk_bytes=self._chunk_bytes, backend=self._backend, top=top)

    def _replay_tokens(
        self, targets: torch.Tensor, head: Head, located: Located, wide: tuple[int, ...]
    ) -> tuple[HeadScores | None, ReplayScores]:
        """From the ``wide[0]`` most likely tokens where they suffice, which also gives the scores before any replay;
        else from the next more of them, at last from whole rows of logits."""
        if not wide:
            return None, self._replay_rows(targets, head, located)
        top = torch.empty(len(targets), wide[0], dtype=torch.float32, device=targets.device)
        plain = self._plain(located.states, targets, head, top)
        parts = [
            replay_top(top[part], plain.logprobs[part], self._sampling, head.vocab_used)
            for part in self._parts_of(len(targets), wide[0])
        ]
        scores = _joined([scores for scores, _ in parts])
        rest = torch.cat([~known for _, known in parts]).nonzero()[:, 0]  # on an accelerator: one more sync
        for part in self._parts_of(len(rest), *wide[1:2]) if len(rest) else ():
            at = rest[part]
            some = located._replace(states=located.states[at], rows=located.rows[at], columns=located.columns[at])
            for of_all, of_some in zip(scores, self._replay_tokens(targets[at], head, some, wide[1:])[1], strict=True):
                of_all[at] = of_some
        return plain, scores

    def _parts_of(self, tokens: int, wide: int = 1) -> list[slice]:
        """As many tokens at once as about ten fp64 rows of ``wide`` numbers each may take."""
        step = max(1, self._chunk_bytes // (wide * 8 * 10))
        return [slice(i, i + step) for i in range(0, max(1, tokens), step)]

    def _replay_rows(self, targets: torch.Tensor, head: Head, located: Located) -> ReplayScores:
        # a row of logits, its sort with int64 indices, and masks and copies: about 12 fp32 rows a token. As much again
        # for the logits of 12 times as many: each time the whole weight is read
        step = max(1, self._chunk_bytes // (head.vocab_used * 4 * 24))
        parts = []
        for i in range(0, max(1, len(targets)), 12 * step):
            logits = logits_chunk(located.states[i : i + 12 * step], head)
            for j in range(0, max(1, len(logits)), step):
                part = slice(i + j, i + j + step)
                context = self._context(located, part, head.vocab_used) if self._sampling.penalizes else (None, None)
                few = logits[j : j + step]
                parts.append(replay(few, targets[part], self._sampling, self._temperature, *context))
        return _joined(parts)

    @staticmethod
    def _context(located: Located, part: slice, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What penalties look at, (n, V): the tokens in prompt or completion before each target, and how often each
        was sampled by the request that sampled the target: to it, what came before is prompt."""
        rows, columns, width = located.rows[part], located.columns[part], located.ids.shape[1]
        mask, sampled = located.engine_mask, columns
        if mask is not None:
            sampled = turns(mask.to(rows.device))[1][rows, columns]
        ids, real = located.ids[rows], located.attention_mask[rows].bool()
        position = torch.arange(width, device=ids.device)
        target = width - located.keep + columns.unsqueeze(-1)
        before = real & (position < target)
        output = before & (position >= target - sampled.unsqueeze(-1))
        # padding goes to an extra column that is cut off
        zeros = torch.zeros(len(ids), vocab + 1, dtype=torch.float32, device=ids.device)
        seen = zeros.scatter(1, ids.masked_fill(~before, vocab), 1.0)[:, :vocab] > 0
        ones = torch.ones_like(zeros[:, :1]).expand_as(ids)
        return seen, zeros.scatter_add_(1, ids.masked_fill(~output, vocab), ones)[:, :vocab]

    def scores(self) -> CompletionScores:
        """Scores of all rows seen, in order. Raises what went wrong inside, or ``RuntimeError`` if nothing ran."""
        if self.error is not None:
            raise self.error
        if not self._parts:
            raise RuntimeError(
                "the backbone's forward hook never ran. Expected one call per mini-batch of the trainer's no-grad "
                "pass. Check that the model's forward calls its backbone as a module."
            )
        if len(self._parts) == 1:
            return self._parts[0]
        return CompletionScores(
            *(None if t[0] is None else torch.cat(t) for t in zip(*self._parts, strict=True))  # type: ignore[arg-type]
        )
