"""Whether the frozen weights of the policy, of which the reference of a PEFT run is made, are what they were.

Of each frozen parameter on this rank, the 256 elements in its middle (of 512 parameters at most, evenly spaced) are
kept on its device as they were at the first window, and compared at the end of each: 256 KiB in half precision, and a
few kernels a device. What moves a whole matrix (an adapter merged and taken out again in half precision, or left
merged) moves these; a single row elsewhere is not seen. Of weights that are sharded so that a rank holds nothing
between two passes (ZeRO-3) nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["FrozenWeights"]

_PARAMETERS, _ELEMENTS = 512, 256


class FrozenWeights:
    """A sample of them, as it was. Not part of a checkpoint, which has no frozen weights either."""

    def __init__(self) -> None:
        self._parameters: list[int] = []
        self._storages: list[int] = []
        self._views: dict[torch.device, list[torch.Tensor]] = {}
        self._first: dict[torch.device, torch.Tensor] = {}
        self._layers: list[Any] | None = None  # those of adapters

    def moved(self, model: torch.nn.Module) -> dict[str, float]:
        """By name of ``BUMPED``, of this rank: how far they are from the first call's, and layers left merged.

        Empty where nothing is frozen. Waits for the device.
        """
        picked = _picked(model)
        held: list[Any] = [p.to_local() if hasattr(p, "to_local") else p for p in picked]  # of a DTensor: this rank's
        storages = [x.data_ptr() for x in held]
        if storages != self._storages:
            self._storages, self._views = storages, _middles(held)
        now = {device: torch.cat(views) for device, views in self._views.items()}
        if not now:
            return {}
        parameters = [id(p) for p in picked]
        if parameters != self._parameters or _sizes(now) != _sizes(self._first):
            self._first, self._parameters = now, parameters  # the first call, or others are frozen
        if self._layers is None:
            self._layers = [module for module in model.modules() if "merged_adapters" in vars(module)]
        found = {"frozen_moved": 0.0, "frozen_size": 0.0}
        for device, x in now.items():
            first = self._first[device].float()
            sums = torch.stack([(x.float() - first).abs().sum(), first.abs().sum()]).tolist()
            found["frozen_moved"] += sums[0]
            found["frozen_size"] += sums[1]
        if self._layers:
            found["merged_layers"] = sum(bool(layer.merged_adapters) for layer in self._layers)
            found["adapter_layers"] = len(self._layers)
        return found


def _sizes(sampled: dict[torch.device, torch.Tensor]) -> dict[torch.device, int]:
    return {device: len(x) for device, x in sampled.items()}


def _picked(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """``_PARAMETERS`` of the frozen ones at most, evenly spaced."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.numel() and p.device.type != "meta"]
    count = min(len(frozen), _PARAMETERS)
    return [frozen[i * len(frozen) // count] for i in range(count)]


def _middles(tensors: Iterable[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    """Views of the elements, by device."""
    views: dict[torch.device, list[torch.Tensor]] = {}
    for x in tensors:
        if x.numel() and x.is_contiguous():
            first = max(0, x.numel() - _ELEMENTS) // 2
            views.setdefault(x.device, []).append(x.detach().view(-1)[first : first + _ELEMENTS])
    return views
