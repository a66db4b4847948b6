"""A few elements of the policy's weights as they were at each batch: what an engine that missed a sync would hold."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

__all__ = ["WeightVersions"]

_TENSORS, _ELEMENTS = 32, 64  # looked at: 8 KiB a version

_VERSIONS = 1024

_MATCHES = 0.95  # of the elements that are equal in the engine's dtype


class _Tensor(NamedTuple):
    """A parameter, and where it is found again."""

    name: str
    owner: torch.nn.Module
    leaf: str
    parameter: torch.nn.Parameter

    @property
    def in_place(self) -> bool:
        return self.owner._parameters.get(self.leaf) is self.parameter and self.parameter.requires_grad


class WeightVersions:
    """Kept from the first batch on, one a step; nothing of adapted or sharded policies, whose weights are not read.

    ``whole``: every version since the run's first step is there.
    """

    def __init__(self) -> None:
        self._some: list[_Tensor] = []
        self._policy: Any = None  # a weak reference
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
        known = self._policy is not None and self._policy() is policy
        if not known or not all(tensor.in_place for tensor in self._some):  # the walk over modules costs the most
            self._some, self._policy = _some(policy), weakref.ref(policy)
        self._kept.append(torch.stack([elements_of(tensor.parameter) for tensor in self._some]).float().cpu())

    def holds_older(self, held: dict[str, torch.Tensor], dtype: torch.dtype) -> float | None:
        """Of the engine's tensors, the share that are an older version of their own; None where none is known.

        ``held``: those that are not the trainer's, whole. One that differs from the trainer's nowhere that is looked
        at tells nothing.
        """
        known = older = 0
        for i, name in enumerate(tensor.name for tensor in self._some):
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
    every = (len(flat) - 1) // (_ELEMENTS - 1)
    return flat[: every * (_ELEMENTS - 1) + 1 : every]


def _some(policy: Any) -> list[_Tensor]:
    """Trained tensors, evenly spaced over the model, by the names a sync gives them."""
    named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad and p.numel() >= _ELEMENTS]
    count = min(_TENSORS, len(named))
    some = []
    for name, parameter in (named[i * len(named) // count] for i in range(count)):
        owner, _, leaf = name.rpartition(".")
        some.append(_Tensor(name, policy.get_submodule(owner), leaf, parameter))
    return some
