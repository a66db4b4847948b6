"""A few elements of the policy's weights as they were at each batch: what an engine that missed a sync would hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["WeightVersions"]

_TENSORS, _ELEMENTS = 32, 64  # looked at: 8 KiB a version

_VERSIONS = 1024

_MATCHES = 0.95  # of the elements that are equal in the engine's dtype


class WeightVersions:
    """Kept from the first batch on, one a step; nothing of adapted or sharded policies, whose weights are not read.

    ``whole``: every version since the run's first step is there.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._kept: list[torch.Tensor] = []  # (tensors, elements)
        self._step: int | None = None
        self.whole = False

    def keep(self, policy: Any, step: int) -> None:
        """Look at the weights that a batch of this step is sampled with."""
        if step == self._step or hasattr(policy, "peft_config"):
            return
        if self._step is None:
            self.whole = step == 0
        self._step = step
        if len(self._kept) == _VERSIONS:
            del self._kept[1]  # the first one stays
            self.whole = False
        some = list(_some(policy))
        self._names = [name for name, _ in some]
        self._kept.append(torch.stack([elements_of(p) for _, p in some]).float().cpu())

    def holds_older(self, held: dict[str, torch.Tensor], dtype: torch.dtype) -> float | None:
        """Of the engine's tensors, the share that are an older version of their own; None where none is known.

        ``held``: those that are not the trainer's, whole. One that differs from the trainer's nowhere that is looked
        at tells nothing.
        """
        known = older = 0
        for i, name in enumerate(self._names):
            if name not in held:
                continue
            mine = elements_of(held[name]).float().cpu()
            versions = torch.stack([kept[i] for kept in self._kept]).to(dtype).float()
            if bool((versions[-1] == mine).all()):
                continue
            known += 1
            older += bool(((versions[:-1] == mine).float().mean(1) >= _MATCHES).any())
        return older / known if known else None


def elements_of(tensor: torch.Tensor) -> torch.Tensor:
    """(elements,) evenly spaced: a view, of a contiguous tensor of as many elements or more."""
    flat = tensor.detach().reshape(-1)
    return flat[:: (len(flat) - 1) // (_ELEMENTS - 1)][:_ELEMENTS]


def _some(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Trained tensors, evenly spaced over the model, by the names a sync gives them."""
    named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad and p.numel() >= _ELEMENTS]
    count = min(_TENSORS, len(named))
    for i in range(count):
        yield named[i * len(named) // count]
