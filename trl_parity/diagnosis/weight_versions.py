"""A few elements of the policy's weights as they were at each batch: what an engine that missed a sync would hold."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch

from ..engine.weight_readback import LoraTensor, lora_tensors

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

    def elements(self, at: torch.Tensor) -> torch.Tensor:
        """At flat indices."""
        return self.parameter.detach().flatten()[at]


_Looked = _Tensor | LoraTensor


class WeightVersions:
    """Kept from the first batch on, one a step. Of a PEFT model: of what plain LoRA makes, and of nothing else.

    ``whole``: every version since the run's first step is there.
    """

    def __init__(self) -> None:
        self._some: list[tuple[_Looked, torch.Tensor]] = []  # and where in it
        self._policy: Any = None  # a weak reference
        self._kept: list[torch.Tensor] = []  # (tensors, elements)
        self._step: int | None = None
        self.whole = False

    def keep(self, policy: Any, step: int) -> None:
        """Look at the weights that a batch of this step is sampled with."""
        if step == self._step:
            return
        if self._step is None:
            self.whole = step == 0
        self._step = step
        if len(self._kept) == _VERSIONS:
            del self._kept[1]  # the first one stays
            self.whole = False
        known = self._policy is not None and self._policy() is policy
        if not known or not all(tensor.in_place for tensor, _ in self._some):  # the walk over modules costs the most
            self._some, self._policy = _some(policy), weakref.ref(policy)
        if not self._some or not all(tensor.in_place for tensor, _ in self._some):  # an adapter that is merged or off
            self.whole = False
            return
        self._kept.append(torch.stack([tensor.elements(at) for tensor, at in self._some]).float().cpu())

    def holds_older(self, held: dict[str, torch.Tensor], dtype: torch.dtype) -> float | None:
        """Of the engine's tensors, the share that are an older version of their own; None where none is known.

        ``held``: those that are not the trainer's, whole. One that differs from the trainer's nowhere that is looked
        at tells nothing.
        """
        of = self._versions_of(held, dtype)
        return sum(map(bool, of.values())) / len(of) if of else None

    def moved_since(self, held: dict[str, torch.Tensor], dtype: torch.dtype) -> frozenset[str] | None:
        """Tensors that have another value now than in the version that most of ``held`` are of; None: of none."""
        of = Counter(at for found in self._versions_of(held, dtype).values() for at in found)
        if not of:
            return None
        most = max(of.values())
        then = self._kept[max(at for at, n in of.items() if n == most)].to(dtype)
        moved = (then != self._kept[-1].to(dtype)).any(1)
        return frozenset(tensor.name for (tensor, _), so in zip(self._some, moved.tolist(), strict=True) if so)

    def _versions_of(self, held: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, list[int]]:
        """Which versions each tensor is of that differs from the newest where it is looked at."""
        found = {}
        for i, (tensor, at) in enumerate(self._some):
            if (values := held.get(tensor.name)) is None or not self._kept:
                continue
            mine = values.detach().flatten()[at.to(values.device)].float().cpu()
            versions = torch.stack([kept[i] for kept in self._kept]).to(dtype).float()
            if bool((versions[-1] == mine).all()):
                continue
            same = (versions[:-1] == mine).float().mean(1) >= _MATCHES
            found[tensor.name] = same.nonzero().flatten().tolist()
        return found


def _places(tensor: torch.Tensor) -> torch.Tensor:
    """(elements,) flat indices, evenly spaced."""
    count = tensor.numel()
    every = (count - 1) // (_ELEMENTS - 1)
    return torch.arange(_ELEMENTS, device=tensor.device) * every


def _some(policy: Any) -> list[tuple[_Looked, torch.Tensor]]:
    """Trained tensors, evenly spaced over the model, by the names a sync gives them."""
    found: list[_Looked] = []
    if hasattr(policy, "peft_config"):
        found += lora_tensors(policy)
    else:
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                owner, _, leaf = name.rpartition(".")
                found.append(_Tensor(name, policy.get_submodule(owner), leaf, parameter))
    found = [tensor for tensor in found if tensor.parameter.numel() >= _ELEMENTS]
    count = min(_TENSORS, len(found))
    some = [found[i * len(found) // count] for i in range(count)]
    return [(tensor, _places(tensor.parameter)) for tensor in some]
