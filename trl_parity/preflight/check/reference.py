"""The truth an engine is compared with: the transformers model in fp32, on the weights the trainer would have.

Only what is asked for goes through the head, and sequences of like length share a pass, so that little is computed
for padding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import ConfigError
from ...scoring.cache_grids import CacheGrid, rounded_cache
from ...scoring.head import logits_chunk, score_tokens
from ...scoring.head_spec import Head
from ...scoring.model_head import backbone_of, materialized_head
from ...scoring.perturb import own_random_numbers, rebuilt, rounding_noise, swapped

__all__ = ["Reference", "Scored"]

_PASS_TOKENS = 4096  # of a batch, padding included

_FREE = 512  # tokens a pass takes with any padding: one more pass costs more

_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Scored:
    """One sequence of L tokens."""

    logprobs: torch.Tensor  # (L - 1,) fp64, of each token but the first, T = 1
    tempered: torch.Tensor  # (L - 1,) the same at the temperature asked for; nan where the law is there instead
    laws: torch.Tensor | None  # (n, V) fp32 log-probs after each position that was asked for, T = 1


class Reference:
    """``AutoModelForCausalLM`` with its weights in ``dtype``, every product in fp32."""

    def __init__(self, model: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as noise

        bars = noise.is_progress_bar_enabled()
        noise.disable_progress_bar()
        try:
            with own_random_numbers():
                loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(
                f"transformers can't load {model!r} as a causal language model: {e}. Expected the folder or the name "
                "of one."
            ) from e
        finally:
            if bars:
                noise.enable_progress_bar()
        self.dtype = dtype
        self.model: Any = loaded.float().to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.config = self.model.config
        self.text_config = self.config.get_text_config()
        self._logits_dtype: torch.dtype | None = None
        self._own_head = self._needs_own_head()

    @property
    def vocab_size(self) -> int:
        """Entries of a law."""
        return int(self.text_config.vocab_size)

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The weights by their own names, as a sync hands them over."""
        return [(name, p.detach()) for name, p in self.model.named_parameters()]

    # ---- other worlds -------------------------------------------------------------------------------------------

    @contextmanager
    def rounded(self, dtype: torch.dtype, head_dtype: torch.dtype, seed: int) -> Iterator[None]:
        """Inside: activations in ``dtype`` with a random last digit, logits in ``head_dtype``; weights as they are."""
        before = self._logits_dtype
        self._logits_dtype = None if head_dtype == torch.float32 else head_dtype
        try:
            with rounding_noise(backbone_of(self.model), dtype, seed):
                yield
        finally:
            self._logits_dtype = before

    @contextmanager
    def cached_on(self, grid: CacheGrid) -> Iterator[None]:
        """Inside: attention reads keys and values on this grid."""
        with rounded_cache(backbone_of(self.model), grid):
            yield

    @contextmanager
    def holding(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside: these tensors in place of its own, by name."""
        parameters = dict(self.model.named_parameters())
        with swapped({parameters[name]: value.to(parameters[name]) for name, value in values.items()}):
            yield

    @contextmanager
    def built_from(self, hf_config: Any) -> Iterator[None]:
        """Inside: the same weights in a model of another config."""
        before, own_head = self.model, self._own_head
        self.model = rebuilt(before, hf_config)
        self._own_head = self._needs_own_head()
        try:
            yield
        finally:
            self.model, self._own_head = before, own_head

    # ---- scoring ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        sequences: Sequence[Sequence[int]],
        positions: Sequence[torch.Tensor | None] | None = None,
        *,
        temperature: float = 1.0,
        batch_tokens: int = _PASS_TOKENS,
    ) -> list[Scored]:
        """Log-probs of the tokens, and laws after ``positions`` (indices into the sequence, its last one allowed).

        ``temperature``: of ``Scored.tempered`` alone.
        """
        wanted: Sequence[torch.Tensor | None] = positions if positions is not None else [None] * len(sequences)
        out: list[Scored | None] = [None] * len(sequences)
        with ExitStack() as stack:  # nothing here draws a random number: the engine may, meanwhile
            head = None
            if not self._own_head:
                head = stack.enter_context(materialized_head(self.model, 1.0, self._logits_dtype))
            for batch in _alike(sequences, batch_tokens):
                ids, mask = _padded([sequences[i] for i in batch], self.device)
                states = self._states(ids, mask)
                scored = self._score(states, ids, mask, [wanted[i] for i in batch], head, temperature)
                for i, one in zip(batch, scored, strict=True):
                    out[i] = one
        return [scored for scored in out if scored is not None]

    def _states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T, H) hidden states, or (B, T, V) logits of a model whose head is not a plain one."""
        if self._own_head:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        seen: list[torch.Tensor] = []

        def hook(module: Any, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        backbone = backbone_of(self.model)
        handle = backbone.register_forward_hook(hook)
        try:
            backbone(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    def _score(
        self,
        states: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        wanted: Sequence[torch.Tensor | None],
        head: Head | None,
        temperature: float,
    ) -> list[Scored]:
        """One pass, each kind of number in one product with the head for all its sequences."""
        lengths = mask.sum(-1).tolist()
        asked = [torch.zeros(0, dtype=torch.long) if at is None else at for at in wanted]
        rows = torch.repeat_interleave(torch.arange(len(asked)), torch.tensor([len(at) for at in asked]))
        laws = self._laws(states[rows.to(self.device), torch.cat(asked).to(self.device)], head).cpu()
        each = laws.split([len(at) for at in asked])
        # where every law is asked for, the tokens' log-probs are among them
        there = [torch.equal(at, torch.arange(n - 1)) for at, n in zip(asked, lengths, strict=True)]
        rest = [i for i, known in enumerate(there) if not known]
        plain = self._taken(states, ids, lengths, rest, head, 1.0)
        cold = [i for i in rest if wanted[i] is None] if temperature != 1.0 else []
        tempered = self._taken(states, ids, lengths, cold, head, temperature)
        out = []
        for i, length in enumerate(lengths):
            if there[i]:
                taken = each[i].double().gather(-1, ids[i, 1:length, None].cpu())[:, 0]
            else:
                taken = plain[i]
            at_temperature = tempered[i] if i in tempered else taken if temperature == 1.0 else taken * torch.nan
            out.append(Scored(taken, at_temperature, None if wanted[i] is None else each[i]))
        return out

    @staticmethod
    def _taken(
        states: torch.Tensor,
        ids: torch.Tensor,
        lengths: Sequence[int],
        rows: Sequence[int],
        head: Head | None,
        temperature: float,
    ) -> dict[int, torch.Tensor]:
        """Log-probs of the tokens of these rows, by row."""
        if not rows:
            return {}
        sizes = [lengths[i] - 1 for i in rows]
        before = torch.cat([states[i, : lengths[i] - 1] for i in rows])
        targets = torch.cat([ids[i, 1 : lengths[i]] for i in rows])
        if head is not None:
            head = replace(head, temperature=temperature)
            taken = score_tokens(before, targets, head, chunk_bytes=_CHUNK_BYTES).logprobs
        else:
            parts = [
                (part.float() / temperature).log_softmax(-1).gather(-1, target[:, None])[:, 0]
                for part, target in zip(before.split(256), targets.split(256), strict=True)
            ]
            taken = torch.cat(parts)
        return dict(zip(rows, taken.double().cpu().split(sizes), strict=True))

    @staticmethod
    def _laws(states: torch.Tensor, head: Head | None) -> torch.Tensor:
        if head is None:
            return states.float().log_softmax(-1)
        return logits_chunk(states, replace(head, temperature=1.0)).log_softmax(-1)

    @torch.no_grad()
    def _needs_own_head(self) -> bool:
        """Whether the model makes its logits in a way the shared head does not know: then its own are used."""
        self._own_head = True
        ids = torch.arange(1, min(9, self.vocab_size))[None].to(self.device)
        own = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0]
        self._own_head = False
        with materialized_head(self.model, 1.0) as head:
            ours = self._laws(self._states(ids, torch.ones_like(ids))[0], head)
        fits = ours.shape == own.shape and bool(torch.allclose(ours, own, atol=1e-3))
        if not fits:
            logging.getLogger(__name__).info("%s makes its logits in its own way: used as it is", type(self.model))
        return not fits


def _alike(sequences: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Indices of sequences of like length, at most ``most`` tokens a batch with padding, a quarter of it padding."""
    batch: list[int] = []
    real = 0
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if batch:
            area = (len(batch) + 1) * len(sequences[batch[0]])
            if area > most or (area > _FREE and real + len(sequences[i]) < 0.75 * area):
                yield batch
                batch, real = [], 0
        batch.append(i)
        real += len(sequences[i])
    if batch:
        yield batch


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):  # padding comes last: a causal model never sees it
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids.to(device), mask.to(device)
