"""What a coarse key-value cache makes of keys and values: each number goes to the nearest point of a grid.

Scales as vLLM has them where none are calibrated: 1 for a cache of one dtype, the largest magnitude over that of the
grid for one with a scale by token and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

__all__ = ["CacheGrid", "coarser_grids", "declared_grids", "rounded_cache"]


@dataclass(frozen=True, slots=True)
class CacheGrid:
    """``spacing``: of neighbouring points, over a number's own size or its token's largest."""

    name: str
    spacing: float
    round: Callable[[torch.Tensor], torch.Tensor]  # (..., tokens, head size), same shape and dtype

    @property
    def scale(self) -> float:
        """How many times as large it makes normal numbers, by least squares: below 1 where it cuts digits off."""
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
        return float((self.round(x) * x).sum() / x.square().sum())

    def only_scaled(self) -> CacheGrid:
        """No grid, but ``scale``."""
        scale = self.scale
        return CacheGrid(f"scaled by {scale:.3g}", 0.0, lambda x: x * scale)


def _in_dtype(name: str, dtype: torch.dtype) -> CacheGrid:
    largest = torch.finfo(dtype).max
    return CacheGrid(name, torch.finfo(dtype).eps, lambda x: x.clamp(-largest, largest).to(dtype).to(x.dtype))


def _cut(x: torch.Tensor) -> torch.Tensor:
    return (x.half().view(torch.int16) & ~0xFF).view(torch.half).to(x.dtype)


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.round()


def _by_token(name: str, spacing: float, last: float, nearest: Callable[[torch.Tensor], torch.Tensor]) -> CacheGrid:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / last
        return (nearest(x.float() / scale) * scale).to(x.dtype)

    return CacheGrid(name, spacing, rounded)


def _sixteen_points(x: torch.Tensor) -> torch.Tensor:
    low, high = x.float().aminmax(dim=-1, keepdim=True)
    step = (high - low).clamp(min=1e-12) / 15.0
    return (((x.float() - low) / step).round() * step + low).to(x.dtype)


def _eight_bits(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).float()


_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

_GRIDS: tuple[CacheGrid, ...] = (
    _in_dtype("float16", torch.float16),
    _in_dtype("bfloat16", torch.bfloat16),
    _by_token("int8 with a scale by token and head", 1 / 127, 127.0, _whole),
    _by_token("float8_e4m3fn with a scale by token and head", torch.finfo(_E4M3).eps, 448.0, _eight_bits),
    _in_dtype("float8_e4m3fn", _E4M3),
    _in_dtype("float8_e5m2", _E5M2),
    # the upper byte of fp16 is e5m2, and some kernels just take it
    CacheGrid("float8_e5m2, towards zero", 2 * torch.finfo(_E5M2).eps, _cut),
    CacheGrid("uint4 with a scale and zero by token and head", 1 / 15, _sixteen_points),
    _by_token("int4 with a scale by token and head", 1 / 7, 7.0, _whole),
)

_NAMED: Mapping[str, CacheGrid] = MappingProxyType({grid.name: grid for grid in _GRIDS})

# vLLM's kv_cache_dtype
_DECLARED: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "float16": ("float16",),
    "bfloat16": ("bfloat16",),
    "fp8": ("float8_e4m3fn",),
    "fp8_e4m3": ("float8_e4m3fn",),
    "fp8_e5m2": ("float8_e5m2", "float8_e5m2, towards zero"),
    "int8_per_token_head": ("int8 with a scale by token and head",),
    "fp8_per_token_head": ("float8_e4m3fn with a scale by token and head",),
    "int4_per_token_head": ("uint4 with a scale and zero by token and head",),  # but for a rotation before it
})  # fmt: skip


def declared_grids(kv_cache_dtype: str) -> tuple[CacheGrid, ...]:
    """The grids that an engine with this setting may round to; none where it is its own dtype's, or not known here."""
    return tuple(_NAMED[name] for name in _DECLARED.get(kv_cache_dtype, ()))


def coarser_grids(dtype: torch.dtype) -> tuple[CacheGrid, ...]:
    """Those that round what is in ``dtype`` already."""
    return tuple(grid for grid in _GRIDS if grid.spacing > torch.finfo(dtype).eps)


@contextmanager
def rounded_cache(backbone: torch.nn.Module, grid: CacheGrid) -> Iterator[None]:
    """Attention reads keys and values on a grid, as from a cache of it, inside the block."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(grid.round(key_states), grid.round(value_states), *args, **kwargs)

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"past_key_values": Rounding(), "use_cache": True}

    handle = backbone.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
