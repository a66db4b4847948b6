"""What a quantizer leaves of a matrix, found in its values: no name of a format is asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["quantized_as"]

_ELEMENTS = 4096  # of a matrix, looked at

_NEAR = 0.25  # of the mean |difference| to |the trainer's|: a matrix that is further off is another one

_FITS = 0.98  # of the elements that lie on the grid

_LEAST = 64  # elements that tell

_FEW = 0.6  # as many elements would lie there by chance, at most

_GROUPS = (0, 128, 64, 32)  # elements with a scale of their own; 0: a row


def quantized_as(held: torch.Tensor, ours: torch.Tensor, dtype: torch.dtype) -> str:
    """The grid that the engine's values lie on and the trainer's don't, in words; "" where there is none.

    A group's largest magnitude is the grid's last point: value / scale is a whole number (8 or 4 bits) or a number of
    fp8, but for the rounding to ``dtype`` that came after it. Looked for by tensor, by row and by groups of a row.
    """
    if held.ndim != 2 or held.shape != ours.shape:
        return ""
    apart = float((held.float() - ours.float()).abs().mean())
    if not 0.0 < apart <= _NEAR * float(ours.float().abs().mean()):
        return ""
    every = max(1, held.numel() // _ELEMENTS)  # rows are evenly spaced
    rounding = max(torch.finfo(dtype).eps, 1e-6)  # of the value and of the scale, and of our own division
    for name, on_grid in _GRIDS.items():
        for size in (None, *_GROUPS):
            theirs, mine = (_grouped(x, size, every) for x in (held, ours))
            if theirs is None or mine is None:
                continue
            if _share(theirs, on_grid, rounding) >= _FITS and _share(mine, on_grid, rounding) <= _FEW:
                return f"{name} with a scale by {'tensor' if size is None else f'{size} elements' if size else 'row'}"
    return ""


def _grouped(x: torch.Tensor, size: int | None, every: int) -> torch.Tensor | None:
    """(groups, elements) over their largest magnitude; None where a row has no such groups."""
    if size is None:
        return x.float()[::every] / x.float().abs().max().clamp(min=1e-30)
    if size and x.shape[1] % size:
        return None
    some = x.float()[::every].reshape(-1, size or x.shape[1])
    return some / some.abs().amax(1, keepdim=True).clamp(min=1e-30)


def _share(x: torch.Tensor, on_grid: _Grid, rounding: float) -> float:
    """Of the elements that rounding leaves nearer to a point than to the next one, those that are at one."""
    value, step, last = on_grid(x)
    slack = rounding * x.abs() * last
    telling = (x != 0) & (slack < 0.2 * step)
    near = (x * last - value).abs() <= slack + 1e-6 * step
    return float(near[telling].float().mean()) if int(telling.sum()) >= _LEAST else 0.0


_Grid = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, float]]  # nearest points, their distance, the last


def _whole(last: int) -> _Grid:
    return lambda x: ((x * last).round(), torch.ones_like(x), float(last))


def _eight(dtype: torch.dtype) -> _Grid:
    info = torch.finfo(dtype)

    def on_grid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        value = (x * info.max).clamp(-info.max, info.max).to(dtype).float()
        _, exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal))
        return value, info.eps * torch.exp2(exponent.float() - 1.0), info.max

    return on_grid


_GRIDS = {  # the coarser ones first
    "4-bit numbers": _whole(7),
    "fp8 e5m2": _eight(torch.float8_e5m2),
    "fp8 e4m3": _eight(torch.float8_e4m3fn),
    "8-bit numbers": _whole(127),
}
