"""What one probe finds and another builds on: frozen, handed from probe to probe by whoever runs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch

__all__ = ["NOTHING", "AskedAgain", "EnginePrompts", "EngineWeights", "Findings", "Prefill", "Rescored"]


@dataclass(frozen=True, slots=True, eq=False)
class EnginePrompts:
    """The prompts the engine was given, where they are not the trainer's."""

    by_row: Mapping[int, list[int]]  # of the rollout batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineWeights:
    """The policy's tensors as the engine holds them. Shares and gaps are over what its loader would have written."""

    total: int  # tensors read
    differing: Mapping[str, Mapping[str, float]]  # by name: share of its elements that differ, mean |trainer - engine|
    ignored: tuple[str, ...]  # trained tensors its load_weights takes no notice of
    arrived: int  # trained tensors that would differ had they not arrived, and do not
    missing: tuple[str, ...]  # the ignored ones, and what else differs
    partial: bool  # some of the trained ones are the trainer's and others not
    coarse: bool  # the engine's are the trainer's after a quantizer
    rounded: Mapping[str, str]  # by name: the narrower dtype that the trainer's, rounded to it, are the engine's in
    exchanged: Mapping[str, str]  # by name: another tensor of the trainer's, which the engine holds in its place
    values: Mapping[torch.nn.Parameter, torch.Tensor]  # what parameters must be for the policy to hold what it does
    readable: bool = True  # all that differs could be read whole
    adapted: bool = False  # adapters are merged into these: switched off, they hold
    form: str = ""  # what the quantizer left, in words
    older: float | None = None  # share that are an older version of the trainer's; None: not known
    adapter_counts: float | None = None  # how many times, where not once

    @property
    def altered(self) -> bool:
        """Whether they were changed on their way, or in the engine, and are no older ones."""
        return self.older < 0.5 if self.older is not None else self.adapter_counts is not None

    @property
    def unheard(self) -> tuple[str, ...]:
        """The ignored ones, where nothing is known to differ."""
        return () if self.differing else self.ignored


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AskedAgain:
    """The engine's numbers for M of the tokens, asked for one by one with temperature as the only setting."""

    picked: torch.Tensor  # (M,) which of the batch's tokens
    anew: torch.Tensor  # (M,) every context computed anew
    cached: torch.Tensor | None  # (M,) reading the prefix cache and kept features of pictures; None: neither is kept
    tokens_read: int  # from the cache

    @property
    def as_sampled(self) -> torch.Tensor:
        """(M,) the way the run's own requests were answered: from the cache, where there is one."""
        return self.anew if self.cached is None else self.cached


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefill:
    """The engine's own scores of M of the tokens, by prefill at T = 1, before any processing."""

    picked: torch.Tensor  # (M,) which of the batch's tokens
    logprobs: torch.Tensor  # (M,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """Trainer, engine by prefill and engine as sampled, side by side."""

    drift: float  # mean Huber(Δ) of the trainer against the engine's prefill, both at T = 1
    reproduced: bool  # asked again, the engine says what it reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """None: not looked for, or not to be had; ``why_missing`` then tells the reason, by name."""

    engine_prompts: EnginePrompts | None = None
    engine_weights: EngineWeights | None = None
    cache_moved: float | None = None  # nats that the trainer moves when its cache is as coarse as the engine's
    asked_again: AskedAgain | None = None
    engine_parts: tuple[str, ...] | None = None  # what the engine holds and not as one built anew on these weights
    prefill: Prefill | None = None
    rescored: Rescored | None = None
    why_missing: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def found(self) -> frozenset[str]:
        """Names of what is there."""
        return frozenset(name for name in NAMES if getattr(self, name) is not None)

    def only(self, names: Iterable[str]) -> Findings:
        """These, and nothing else."""
        return Findings(**{name: getattr(self, name) for name in names}, why_missing=self.why_missing)

    def plus(self, newer: Findings) -> Findings:
        """These and newer ones, which count where both are there."""
        return replace(self, **{name: getattr(newer, name) for name in newer.found})

    def lacking(self, names: Iterable[str], why: str) -> Findings:
        """The same, and why some of these names are not there."""
        return replace(self, why_missing=MappingProxyType({**self.why_missing, **dict.fromkeys(names, why)}))

    def details(self) -> dict[str, Any]:
        """What of it stands in the diagnosis' details: JSON."""
        out: dict[str, Any] = {}
        if self.engine_weights is not None and self.engine_weights.unheard:
            out["ignored"] = list(self.engine_weights.unheard)
        if self.cache_moved is not None:
            out["cache_moved"] = self.cache_moved
        if self.rescored is not None:
            out["ladder"] = {"prefill_at_1": self.rescored.drift, "reproduced": self.rescored.reproduced}
        return out


NAMES = frozenset(f.name for f in fields(Findings)) - {"why_missing"}

NOTHING = Findings()
