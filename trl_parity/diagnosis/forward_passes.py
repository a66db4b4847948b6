"""Forward passes of the policy over a batch, each with something changed: layout, prompts, model, weights, cache.

Nothing of the run is changed: weights are swapped by pointer and put back, and passes draw none of its random numbers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..engine.base import Engine, in_process
from ..records import RolloutBatch
from ..scoring.cache_grids import CacheGrid, rounded_cache
from ..scoring.experts import ExpertLayer, Forced, forced
from ..scoring.head_spec import Head
from ..scoring.model_head import backbone_of, causal_lm, materialized_head
from ..scoring.perturb import eval_mode, own_random_numbers, rebuilt, swapped, without_adapters
from ..trainers.capture import Capture
from ..trainers.plain_pass import pictures_of, run_backbone
from .findings import EnginePrompts, EngineWeights
from .one_update_ago import one_update_ago

__all__ = ["FEW", "ForcedRouting", "ForwardPass", "ForwardPasses"]

FEW = 4  # sequences of a pass one by one, which is slow

_REMEMBERED = 4


@dataclass(frozen=True, slots=True, eq=False)
class ForcedRouting:
    """The experts that tokens take instead of their own, in layers of experts."""

    by_row: Mapping[int, Sequence[Forced]]  # of the rollout batch; by layer
    layers: tuple[ExpertLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """What is changed in a forward pass of the policy. Every layer is in eval mode, always."""

    layout: str = "padded"  # padded as in training; single: one sequence at a time; unpadded: and without its padding
    prompts: EnginePrompts | None = None  # those the engine was really given
    model: str = "live"  # engine_config: built anew from the engine's config, on the trainer's weights
    weights: EngineWeights | str = "own"  # those the engine holds; or own ones: rounded to its dtype; one update ago
    cache_grid: CacheGrid | None = None  # attention reads keys and values on it
    routing: ForcedRouting | None = None  # in an unpadded pass
    few: bool = False  # only the FEW that passes one by one are made of


class ForwardPasses:
    """Hidden states of N tokens, which lie in ``rows`` of the rollout batch, (N,) ``row`` of them and ``column``."""

    def __init__(
        self,
        capture: Capture,
        rollout: RolloutBatch,
        engine: Engine | None,
        *,
        rows: torch.Tensor,
        row: torch.Tensor,
        column: torch.Tensor,
        few: torch.Tensor,
    ):
        self._capture, self._rollout, self._engine = capture, rollout, engine
        self._model = capture.policy
        self._rows, self._row, self._column, self._few = rows, row, column, few
        self._states: dict[ForwardPass, torch.Tensor] = {}
        self._whole_head: Head | None = None

    def prepare(self, temperature: float) -> None:
        """Of a sharded policy: the one pass and the head all readings are made from. A collective there."""
        if self._capture.sharded:
            self.states(ForwardPass())
            with materialized_head(self._model, temperature) as head:
                bias = None if head.bias is None else head.bias.clone()
                low = tuple((a.clone(), b.clone(), x) for a, b, x in head.low_rank)
                self._whole_head = replace(head, weight=head.weight.clone(), bias=bias, low_rank=low)

    def states(self, forward: ForwardPass) -> torch.Tensor:
        """(N, H) hidden states that predict the tokens, where they were computed.

        The last few are remembered, and those of the plain pass.
        """
        if forward not in self._states:
            if self._whole_head is not None:
                raise ValueError("the policy is sharded over ranks: one pass over it is made, and no other")
            if len(self._states) >= _REMEMBERED:
                self._states.pop(next(known for known in self._states if known != ForwardPass()))
            with self._applied(forward) as model, torch.no_grad():
                self._states[forward] = self._pass(model, forward)
        return self._states[forward]

    @contextmanager
    def head(self, forward: ForwardPass, temperature: float) -> Iterator[Head]:
        """How a pass makes logits of its hidden states."""
        if self._whole_head is not None:
            yield replace(self._whole_head, temperature=temperature)
            return
        with self._applied(forward) as model, materialized_head(model, temperature) as head:
            yield head

    @torch.no_grad()
    def own_logits(
        self, ids: torch.Tensor, places: torch.Tensor, at: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens of a sequence (T,) are predicted from: last hidden states (n, H), and the model's logits (n, V).

        ``places``: of the tokens, from 1 on. ``at``: its row of the batch; ``start``: where its completion begins.
        Raises ValueError for a model whose forward pass has no hidden states to be seen.
        """
        lm, seen = causal_lm(self._model), []
        takes = "logits_to_keep" in inspect.signature(type(lm).forward).parameters
        device = self._rollout.completion_ids.device
        images = pictures_of(self._capture, torch.tensor([at], device=device), len(ids), len(ids) - start)
        ids, places = ids[None].to(device), places.to(device) - 1

        def hook(module: Any, args: Any, output: Any) -> None:
            seen.append((output[0] if isinstance(output, tuple) else output.last_hidden_state)[0, places])

        handle = backbone_of(lm).register_forward_hook(hook)
        try:
            with self._applied(ForwardPass()), self._capture.trainer.accelerator.autocast():
                output = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **images,
                            **({"logits_to_keep": places} if takes else {}))  # fmt: skip
        finally:
            handle.remove()
        if not seen:
            raise ValueError(
                f"{type(lm).__name__} does not call its base model as a module: no hidden states are seen"
            )
        return seen[0], output.logits[0] if takes else output.logits[0, places]

    def _pass(self, model: torch.nn.Module, forward: ForwardPass) -> torch.Tensor:
        rollout, keep = self._rollout, self._rollout.completion_ids.shape[1]
        some = self._few if forward.few else torch.arange(len(self._rows))
        rows, known = self._rows[some], torch.isin(self._row, some)
        if forward.layout != "unpadded" and forward.prompts is None:
            ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)[rows]
            attention = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[rows]
            hidden = self._hidden(model, ids, attention, keep, 1 if forward.layout == "single" else None, rows)
            hidden = hidden[torch.searchsorted(some, self._row[known]), self._column[known]]
        else:
            hidden = torch.cat([self._unpadded(model, i, forward) for i in some.tolist()])
        out = hidden.new_zeros(len(self._row), hidden.shape[1])
        out[known.to(out.device)] = hidden
        return out

    def _unpadded(self, model: torch.nn.Module, i: int, forward: ForwardPass) -> torch.Tensor:
        at, columns = int(self._rows[i]), self._column[self._row == i]
        prompts, routing = forward.prompts, forward.routing
        prompt = self._rollout.prompt_ids[at][self._rollout.prompt_mask[at].bool()]
        if prompts is not None and at in prompts.by_row:
            prompt = torch.tensor(prompts.by_row[at], dtype=prompt.dtype, device=prompt.device)
        length = int(columns.max()) + 1 if len(columns) else 1  # up to the last token looked at
        ids = torch.cat([prompt, self._rollout.completion_ids[at][:length]])[None]
        with ExitStack() as stack:
            if routing is not None and at in routing.by_row:
                stack.enter_context(forced(routing.layers, routing.by_row[at]))
            return self._hidden(model, ids, torch.ones_like(ids), length, 1, self._rows[i : i + 1])[0, columns]

    def _hidden(
        self,
        model: torch.nn.Module,
        ids: torch.Tensor,
        attention: torch.Tensor,
        keep: int,
        batch_size: int | None,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """(B, keep, H): the states that predict the last ``keep`` tokens. ``rows``: theirs, of the rollout batch."""
        seen: list[torch.Tensor] = []

        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            seen.append(hidden[:, -(keep + 1) : -1].detach())

        backbone = backbone_of(model)
        handle = backbone.register_forward_hook(hook)
        try:
            if model is self._model:
                images = self._capture.image_inputs(rows, ids.shape[1], keep)
                self._capture.run_policy(ids, attention, keep, batch_size, **images)
            if not seen:  # another model, or what the trainer scores with is none of the policy
                run_backbone(self._capture, backbone, ids, attention, keep, rows, batch_size)
        finally:
            handle.remove()
        return torch.cat(seen)

    @contextmanager
    def _applied(self, forward: ForwardPass) -> Iterator[torch.nn.Module]:
        """The model of a pass, for the duration of the block; everything as it was after it."""
        model = self.engine_config_model if forward.model == "engine_config" else self._model
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self._model))
            stack.enter_context(own_random_numbers())
            if forward.weights != "own":
                stack.enter_context(swapped(self._weights(forward.weights)))
                if not isinstance(forward.weights, str) and forward.weights.adapted:
                    stack.enter_context(without_adapters(self._model))
            if forward.cache_grid is not None:
                stack.enter_context(rounded_cache(backbone_of(model), forward.cache_grid))
            yield model

    def _weights(self, weights: EngineWeights | str) -> Mapping[torch.nn.Parameter, torch.Tensor]:
        if not isinstance(weights, str):
            return weights.values
        return self._rounded if weights == "rounded" else self.one_update_ago

    @functools.cached_property
    def _rounded(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        dtype = self._capture.compute_dtype if self._engine is None else self._engine.dtype
        return {p: p.detach().to(dtype).to(p.dtype) for p in self._model.parameters() if p.is_floating_point()}

    @functools.cached_property
    def one_update_ago(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Of the parameters that were updated, what they were: empty where that is not known."""
        return {} if self._capture.sharded else one_update_ago(getattr(self._capture.trainer, "optimizer", None))

    @functools.cached_property
    def engine_config_model(self) -> torch.nn.Module:
        """The trainer's class on the engine's config, sharing the trainer's parameters; buffers are new."""
        engine = self._engine
        if not in_process(engine) or self._capture.sharded or hasattr(self._model, "peft_config"):
            raise ValueError("the model can be rebuilt only beside a colocated engine, unsharded and without adapters")
        return rebuilt(causal_lm(self._model), engine.hf_config)
