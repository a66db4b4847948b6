"""Hidden states to fp32 logits, tile by tile and within a memory budget."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from .head_spec import Head

__all__ = ["Projection", "part_of", "plain_fp32", "spans"]

# Hidden units in one product; the partial products are then added up. A sum of many terms in fp32 loses digits at
# every step: in pieces, logits near 30 are off by 5e-6 at most instead of 1e-5 and more, for a tenth of the speed.
_FP32_INNER, _HALF_INNER = 128, 512

# torch 2.9 has one knob a backend for how fp32 products are made; before it there is only the global one.
_HAS_FP32_PRECISION = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


class Projection:
    """Makes the logits tile by tile, within a memory budget: plans the tile sizes and holds the buffers."""

    def __init__(self, hidden: torch.Tensor, head: Head, chunk_bytes: int) -> None:
        self.hidden, self.head = hidden, head
        device, width = hidden.device, hidden.shape[1]
        # A product of two bf16 numbers is exact in fp32, so the fast 16-bit units, which add up in fp32, lose
        # nothing. CUDA takes the 16-bit tensors (fp16 too); oneDNN takes fp32 copies of them in its bf16 mode.
        dtype = hidden.dtype if hidden.dtype == head.weight.dtype else torch.float32
        self.direct = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not head.low_rank
        self.precision = "bf16" if device.type == "cpu" and dtype == torch.bfloat16 else "ieee"
        self.inner = _HALF_INNER if self.direct or self.precision == "bf16" else _FP32_INNER
        copy_hidden = not self.direct and (hidden.dtype != torch.float32 or hidden.stride(1) != 1)
        copy_weight = not self.direct and head.weight.dtype != torch.float32
        if head.module is not None:  # whole rows; what it holds besides its output is its own
            copy_hidden = copy_weight = False
            few = max(1, min(len(hidden), chunk_bytes // (16 * head.weight.shape[0])))
            self.block_tokens, self.rows, self.cols = few, few, head.vocab_used
        else:
            self.block_tokens, self.rows, self.cols = _tile_sizes(hidden, head, chunk_bytes, copy_hidden, copy_weight)
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}  # whatever torch.set_default_dtype says
        self.buffers = [torch.empty(self.rows, self.cols, **fp32) for _ in range(2)]
        self.hidden32 = torch.empty(self.block_tokens, width, **fp32) if copy_hidden else None
        self.weight32 = torch.empty(self.cols, width, **fp32) if copy_weight else None

    def tiles(self) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
        """(tokens, vocabulary rows, their fp32 logits before the temperature, a spare buffer of that shape).

        Both buffers are the caller's until the next step. The vocabulary is the outer loop inside a block of
        tokens, so that each weight slice is converted once a block.
        """
        down = [a.float() for a, _, _ in self.head.low_rank]
        for block in spans(0, len(self.hidden), self.block_tokens):
            h = part_of(self.hidden, block)
            if self.hidden32 is not None:
                h = self.hidden32[: len(h)].copy_(h)
            with _fp32_products(h.device, "ieee") if down else contextlib.nullcontext():
                low = [h @ a.t() for a in down]
            for cols in spans(0, self.head.vocab_used, self.cols):
                w = part_of(self.head.weight, cols)
                if self.weight32 is not None:
                    w = self.weight32[: len(w)].copy_(w)
                for part in spans(0, len(h), self.rows):
                    shape = (part.stop - part.start, len(w))
                    z, spare = (x if x.shape == shape else _shaped(x, shape) for x in self.buffers)
                    self._logits(part_of(h, part), w, [x[part] for x in low], cols, z)
                    yield slice(block.start + part.start, block.start + part.stop), cols, z, spare

    def _logits(self, h: torch.Tensor, w: torch.Tensor, low: list[torch.Tensor], cols: slice, z: torch.Tensor) -> None:
        """z = softcap(logit_scale * (W h + b))."""
        head = self.head
        if head.module is not None:
            with _fp32_products(z.device, "ieee"):
                z.copy_(head.module(h)[:, cols])
        else:
            self._product(h, w, low, cols, z)
        if head.logits_dtype is not None:
            z.copy_(z.to(head.logits_dtype))
        if head.logit_scale != 1.0:
            z.mul_(head.logit_scale)
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
            if head.bias is not None:  # what it takes out stays out
                z.masked_fill_(head.bias[cols] == -torch.inf, -torch.inf)

    def _product(
        self, h: torch.Tensor, w: torch.Tensor, low: list[torch.Tensor], cols: slice, z: torch.Tensor
    ) -> None:
        """z = W h + b."""
        head = self.head
        as_fp32: dict[str, Any] = {"out_dtype": torch.float32} if self.direct else {}
        with _fp32_products(z.device, self.precision):
            if w.shape[1] <= self.inner:
                torch.mm(h, w.t(), **as_fp32, out=z)
            else:
                for at in range(0, w.shape[1], self.inner):
                    left, right = h[:, at : at + self.inner], w[:, at : at + self.inner].t()
                    torch.addmm(z, left, right, **as_fp32, out=z) if at else torch.mm(left, right, **as_fp32, out=z)
        for x, (_, b, scaling) in zip(low, head.low_rank, strict=True):
            with _fp32_products(z.device, "ieee"):
                z.addmm_(x, b[cols].float().t(), alpha=scaling)
        if head.bias is not None:
            z.add_(head.bias[cols])


def _tile_sizes(
    hidden: torch.Tensor, head: Head, chunk_bytes: int, copy_hidden: bool, copy_weight: bool
) -> tuple[int, int, int]:
    """Tokens in a block, tokens in a tile, vocabulary rows in a tile.

    In floats: a quarter for each of two tiles, the hidden copy and the weight copy; halves without copies.
    """
    count, width = hidden.shape
    rank = sum(a.shape[0] for a, _, _ in head.low_rank)
    floats = max(0, chunk_bytes // 4 - rank * width)
    share = floats // (4 if copy_hidden or copy_weight or rank else 2)
    block_tokens = count if not (copy_hidden or rank) else share // (copy_hidden * width + rank)
    block_tokens = max(1, min(count, block_tokens))
    rows = max(1, min(block_tokens, math.isqrt(share)))
    cols = min(head.vocab_used, share // rows)
    if copy_weight or rank:
        cols = min(cols, share // (copy_weight * width + rank))
    return block_tokens, rows, max(1, cols)


def spans(start: int, stop: int, step: int) -> Iterator[slice]:
    """``start`` to ``stop`` in pieces of ``step``."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def part_of(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """These rows; all of them without a view, which costs as much as a small kernel."""
    return x if rows.stop - rows.start == len(x) else x[rows]


def _shaped(buffer: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The first numbers of a buffer in a smaller shape, contiguous."""
    return buffer.view(-1)[: math.prod(shape)].view(shape)


@contextlib.contextmanager
def plain_fp32(device: torch.device) -> Iterator[None]:
    """No gradient and no autocast: a user's speed settings must not reach the reference head."""
    # the bare switch: entering torch.autocast costs as much as the head of a small batch
    before = torch.is_autocast_enabled(device.type)
    torch.set_autocast_enabled(device.type, False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_enabled(device.type, before)


@contextlib.contextmanager
def _fp32_products(device: torch.device, precision: str) -> Iterator[None]:
    """What fp32 matrix products may round their inputs to: "ieee" (nothing) or "bf16" (CPU only).

    The switch belongs to the whole process: until it is set back, another thread's products follow it too.
    """
    if not _HAS_FP32_PRECISION:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if precision == "bf16" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    knob = backend.matmul
    before = knob.fp32_precision
    knob.fp32_precision = precision  # TF32, too, is a speed setting
    try:
        yield
    finally:
        knob.fp32_precision = before
