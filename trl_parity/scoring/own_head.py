"""How far the trainer's own head, in its own dtype, may be from the fp32 head and still be the same head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .head import score_tokens
from .head_spec import Head
from .model_head import causal_lm

__all__ = ["OwnHeadRounding"]

_TOKENS = 256  # of a pass that are scored a second time

_FIRST, _EVERY = 3, 50  # passes: each of the first ones, then one of so many


class OwnHeadRounding:
    """Mean |log-prob by a head of the forward's dtype - by the fp32 head|, nats, over some tokens of some passes.

    It changes slowly and costs a product with the head, so it is measured on the first passes and then seldom; what
    is older counts for half as much. Which passes is the same on every rank.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._wanted = 0  # tokens of the pass at hand
        self._moved: torch.Tensor | float = 0.0
        self._tokens = 0.0

    @classmethod
    def of(cls, model: Any) -> OwnHeadRounding:
        """That of a policy, for as long as it lives."""
        return _of.setdefault(causal_lm(model), cls())

    def begin_pass(self) -> None:
        """Another pass over the policy begins."""
        due = self._passes < _FIRST or self._passes % _EVERY == 0
        self._passes += 1
        self._wanted = _TOKENS if due else 0
        if due:
            self._moved, self._tokens = self._moved / 2, self._tokens / 2

    def add(
        self, states: torch.Tensor, targets: torch.Tensor, head: Head, logprobs: torch.Tensor, chunk_bytes: int
    ) -> None:
        """Take in tokens of a forward that runs now. ``logprobs`` (N,): by the fp32 head."""
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        some = min(self._wanted, len(targets))
        if dtype == torch.float32 or not some:
            return
        self._wanted -= some
        at = torch.arange(some, device=states.device) * len(targets) // some
        rounded = score_tokens(
            states[at], targets[at], replace(head, logits_dtype=dtype), chunk_bytes=chunk_bytes, backend="torch"
        )
        moved = (rounded.logprobs - logprobs[at]).abs()
        self._moved = self._moved + moved.nan_to_num(0.0, 0.0, 0.0).sum()
        self._tokens = self._tokens + some

    @property
    def nats(self) -> float:
        """The mean; 0 where the head computes in fp32, and before any token. Waits for the device."""
        return float(self._moved) / self._tokens if self._tokens else 0.0


_of: WeakKeyDictionary[Any, OwnHeadRounding] = WeakKeyDictionary()
