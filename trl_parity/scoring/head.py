"""Exact log-probs and entropy of given tokens from hidden states, through an LM head in fp32.

The naive equivalent of `score_tokens`, without its (tokens x vocabulary) tensors:

    z = hidden.float() @ weight.float().T + bias
    z = softcap * tanh(logit_scale * z / softcap) / temperature
    logp = log_softmax(z); logprobs = logp[range(N), targets]; entropy = -(exp(logp) * logp).sum(-1)

Logits are made tile by tile, over tokens and over the vocabulary, and folded into an online log-sum-exp.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..config.parity import HEAD_BACKENDS
from .head_checks import check, check_targets, check_top, misfit
from .head_spec import Head, HeadScores

__all__ = ["DEFAULT_CHUNK_BYTES", "logits_chunk", "score_tokens"]

# Tiles are as large as the budget allows, on a CPU too: at 16 MiB they are as fast as cache-sized ones on an idle
# machine, and several times faster on a busy one, where each kernel's thread barrier may wait for a time slice.
DEFAULT_CHUNK_BYTES = 64 << 20

# Hidden units in one product; the partial products are then added up. A sum of many terms in fp32 loses digits at
# every step: in pieces, logits near 30 are off by 5e-6 at most instead of 1e-5 and more, for a tenth of the speed.
_FP32_INNER, _HALF_INNER = 128, 512

logger = logging.getLogger(__name__)

# torch 2.9 has one knob a backend for how fp32 products are made; before it there is only the global one.
_HAS_FP32_PRECISION = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def score_tokens(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str = "auto",
    top: torch.Tensor | None = None,
) -> HeadScores:
    """Log-prob of each target and entropy of its distribution, in fp32, without gradients.

    With d = z - m, e = exp(d), m the running maximum: log p(t) = z_t - m - log sum(e) and
    H = log sum(e) - sum(e d) / sum(e). Nothing as large as |z| cancels, so the error stays that of the logits.

    Args:
        hidden: (N, H), any float dtype, any strides; N may be 0.
        targets: (N,), int64, in [0, V_used).
        head: how hidden states become logits.
        chunk_bytes: bound on all temporaries together, besides a few vectors of N (of N x M with ``top``); one row of
            everything is always allowed.
        backend: "triton" (GPUs), "torch" (every device), or "auto": Triton on CUDA devices of compute capability 8
            and up, where it is installed and the dtypes fit (no low-rank head), else torch.
        top: (N, M) fp32 to fill with the log-probs of the M most likely tokens, descending; M up to V_used. A target
            among them has the same number there. In Triton that takes the product twice and waits for the device
            once; tokens it can't do it for (many equals), and all where M is near V_used / 256, are left to torch.

    Returns:
        `HeadScores`, both (N,) fp32. A token whose hidden state is not finite gets non-finite numbers.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; on the CPU also a target outside the vocabulary. On an
            accelerator that check would wait for the device; there such a target gets log-prob -inf.
    """
    check(hidden, head)
    check_targets(hidden, targets, head)
    if top is not None:
        check_top(top, hidden, head)
    if _use_triton(hidden, head, backend):
        try:
            scores = _score_on_chip(hidden, targets, head, chunk_bytes, top)
        except Exception as e:  # a compiler that does not know this GPU, say
            if backend == "triton":
                raise
            _without_triton.add(hidden.device)
            logger.warning(
                "the head's Triton kernel can't run here (%s: %s); torch does its work.", type(e).__name__, e
            )
        else:
            if scores is not None:
                return scores
    device, count = hidden.device, hidden.shape[0]
    if not count:
        return HeadScores(*torch.empty(2, 0, dtype=torch.float32, device=device))
    projection = _Projection(hidden, head, chunk_bytes)
    if projection.cols == head.vocab_used:
        return _score_whole_rows(projection, targets, head, top)
    peak = torch.full((count,), torch.finfo(torch.float32).min, dtype=torch.float32, device=device)
    target_logit = torch.full_like(peak, -torch.inf)
    # fp64 costs nothing on vectors and keeps hundreds of rescalings from adding up.
    total = torch.zeros(count, device=device, dtype=torch.float64)
    weighted = torch.zeros_like(total)
    if top is not None:
        top.fill_(-torch.inf)
    with _plain_fp32(device):
        for rows, cols, z, spare in projection.tiles():
            if head.temperature != 1.0:
                z.mul_(1.0 / head.temperature)
            if top is not None:
                _keep_largest(top[rows], z)
            local = targets[rows] - cols.start
            inside = (local >= 0) & (local < z.shape[1])
            picked = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
            target_logit[rows] = torch.where(inside, picked, target_logit[rows])
            _fold(z, spare, peak[rows], total[rows], weighted[rows])
        log_total = total.log()
        offset = peak.double() + log_total
        logprobs = (target_logit.double() - offset).float()
        if top is not None:
            for span in _spans(0, count, max(1, chunk_bytes // (16 * top.shape[1]))):
                top[span] = top[span].double() - offset[span, None]
        return HeadScores(logprobs, (log_total - weighted / total).float())


def _use_triton(hidden: torch.Tensor, head: Head, backend: str) -> bool:
    if backend not in HEAD_BACKENDS:
        raise misfit(f"backend is {backend!r}", f"one of {', '.join(HEAD_BACKENDS)}", "Use 'auto'.")
    wanted = backend == "triton"
    if backend == "torch" or not len(hidden):
        return False
    if not wanted and (hidden.device in _without_triton or not _has_tensor_cores(hidden.device)):
        return False
    try:
        from .head_triton import takes
    except ImportError:
        fits = False
    else:
        fits = takes(hidden, head)
    if wanted and not fits:
        raise misfit(
            f"backend is 'triton' for hidden {hidden.dtype} and head.weight {head.weight.dtype}",
            "Triton installed, 16 or 32 bit dtypes, contiguous rows and no low-rank head",
            "Use backend='auto', which falls back to torch.",
        )
    return fits


_without_triton: set[torch.device] = set()  # where it failed


@functools.lru_cache
def _has_tensor_cores(device: torch.device) -> bool:
    """Whether bf16 products are made in hardware and added in fp32."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _score_on_chip(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_bytes: int, top: torch.Tensor | None
) -> HeadScores | None:
    """By the Triton kernels; None where so many of the most likely tokens are not theirs to find."""
    from .head_triton import most_likely, score_tokens_triton

    if top is not None and top.shape[1] > most_likely(hidden, head):
        return None
    logprobs, entropy, missed = score_tokens_triton(hidden, targets, head, chunk_bytes, top)
    if top is not None and missed is not None:
        rest = missed.nonzero()[:, 0]  # waits for the device
        if len(rest):
            found = torch.empty(len(rest), top.shape[1], dtype=torch.float32, device=top.device)
            logprobs[rest], entropy[rest] = score_tokens(
                hidden[rest], targets[rest], head, chunk_bytes=chunk_bytes, backend="torch", top=found
            )
            top[rest] = found
    return HeadScores(logprobs, entropy)


def _score_whole_rows(
    projection: _Projection, targets: torch.Tensor, head: Head, top: torch.Tensor | None
) -> HeadScores:
    """The same where a tile holds all logits of its tokens: nothing is carried from tile to tile."""
    parts = []
    masked = head.bias is not None or head.logits_dtype is not None  # logits may be -inf
    with _plain_fp32(targets.device):
        for rows, _, z, exps in projection.tiles():
            if head.temperature != 1.0:
                z.mul_(1.0 / head.temperature)
            d = z.sub_(z.amax(-1, keepdim=True))
            target = _part(targets, rows)[:, None]
            if target.device.type == "cpu":  # where it was checked
                picked = d.gather(1, target)
            else:
                inside = (target >= 0) & (target < d.shape[1])
                picked = d.gather(1, target.clamp(0, d.shape[1] - 1)).where(inside, -torch.inf)
            torch.exp(d, out=exps)
            total = exps.sum(-1, keepdim=True)
            log_total = total.log()
            if top is not None:
                torch.sub(d.topk(top.shape[1]).values, log_total, out=top[rows])
            if masked:  # 0 * -inf would be NaN
                d.clamp_(min=torch.finfo(torch.float32).min)
            mean = exps.mul_(d).sum(-1, keepdim=True).div_(total)
            parts.append(torch.cat([picked.sub_(log_total), log_total.sub_(mean)], 1))
    scores = parts[0] if len(parts) == 1 else torch.cat(parts)
    return HeadScores(*scores.unbind(1))


def logits_chunk(hidden: torch.Tensor, head: Head, out: torch.Tensor | None = None) -> torch.Tensor:
    """Full fp32 logits of a few tokens: after scale and softcap, BEFORE the temperature.

    Args:
        hidden: (n, H), any float dtype. The result is (n, V_used): the caller keeps n small.
        head: how hidden states become logits; `temperature` is not applied.
        out: an fp32 (n, V_used) tensor to fill instead of a new one.

    Returns:
        (n, V_used), fp32, without gradient. Besides it at most `DEFAULT_CHUNK_BYTES` are allocated.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check(hidden, head)
    shape = (hidden.shape[0], head.vocab_used)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    if out.shape != shape or out.dtype != torch.float32 or out.device != hidden.device:
        raise misfit(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}",
            f"torch.float32 {shape} on {hidden.device}",
            "Pass such a tensor, or none.",
        )
    with _plain_fp32(hidden.device):
        for rows, cols, z, _ in _Projection(hidden, head, DEFAULT_CHUNK_BYTES).tiles():
            out[rows, cols] = z
    return out


def _fold(
    z: torch.Tensor, exps: torch.Tensor, peak: torch.Tensor, total: torch.Tensor, weighted: torch.Tensor
) -> None:
    """Add one tile of logits to the running sums, in place: total = sum(e), weighted = sum(e d). Destroys z."""
    new_peak = torch.maximum(peak, z.amax(-1))
    # The old sums were taken about the old maximum: e shrinks by `scale` and every d moves by `shift`.
    shift = peak.double() - new_peak.double()
    scale = shift.exp()
    weighted.add_(total * shift).mul_(scale)
    total.mul_(scale)
    d = z.sub_(new_peak[:, None])
    torch.exp(d, out=exps)
    total.add_(exps.sum(-1))
    # A logit of -inf has e = 0 and adds nothing, but 0 * -inf is NaN: skip it here. A real NaN is in `total`.
    weighted.add_(exps.mul_(d).nansum(-1))
    peak.copy_(new_peak)


def _keep_largest(top: torch.Tensor, z: torch.Tensor) -> None:
    """The largest of both, descending, in ``top`` (n, M)."""
    most = top.shape[1]
    tile = z.topk(min(most, z.shape[1]), sorted=False).values
    top.copy_(torch.cat([top, tile], 1).topk(most).values)


class _Projection:
    """Makes the logits tile by tile, within a memory budget: plans the tile sizes and holds the buffers."""

    def __init__(self, hidden: torch.Tensor, head: Head, chunk_bytes: int) -> None:
        self.hidden, self.head = hidden, head
        device, (count, width) = hidden.device, hidden.shape
        # A product of two bf16 numbers is exact in fp32, so the fast 16-bit units, which add up in fp32, lose
        # nothing. CUDA takes the 16-bit tensors (fp16 too); oneDNN takes fp32 copies of them in its bf16 mode.
        dtype = hidden.dtype if hidden.dtype == head.weight.dtype else torch.float32
        self.direct = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not head.low_rank
        self.precision = "bf16" if device.type == "cpu" and dtype == torch.bfloat16 else "ieee"
        self.inner = _HALF_INNER if self.direct or self.precision == "bf16" else _FP32_INNER
        copy_hidden = not self.direct and (hidden.dtype != torch.float32 or hidden.stride(1) != 1)
        copy_weight = not self.direct and head.weight.dtype != torch.float32

        # In floats: a quarter for each of two tiles, the hidden copy and the weight copy; halves without copies.
        rank = sum(a.shape[0] for a, _, _ in head.low_rank)
        floats = max(0, chunk_bytes // 4 - rank * width)
        share = floats // (4 if copy_hidden or copy_weight or rank else 2)
        self.block_tokens = count if not (copy_hidden or rank) else share // (copy_hidden * width + rank)
        self.block_tokens = max(1, min(count, self.block_tokens))
        self.rows = max(1, min(self.block_tokens, math.isqrt(share)))
        self.cols = min(head.vocab_used, share // self.rows)
        if copy_weight or rank:
            self.cols = min(self.cols, share // (copy_weight * width + rank))
        self.cols = max(1, self.cols)
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
        for block in _spans(0, len(self.hidden), self.block_tokens):
            h = _part(self.hidden, block)
            if self.hidden32 is not None:
                h = self.hidden32[: len(h)].copy_(h)
            with _fp32_products(h.device, "ieee") if down else contextlib.nullcontext():
                low = [h @ a.t() for a in down]
            for cols in _spans(0, self.head.vocab_used, self.cols):
                w = _part(self.head.weight, cols)
                if self.weight32 is not None:
                    w = self.weight32[: len(w)].copy_(w)
                for part in _spans(0, len(h), self.rows):
                    shape = (part.stop - part.start, len(w))
                    z, spare = (x if x.shape == shape else _shaped(x, shape) for x in self.buffers)
                    self._logits(_part(h, part), w, [x[part] for x in low], cols, z)
                    yield slice(block.start + part.start, block.start + part.stop), cols, z, spare

    def _logits(self, h: torch.Tensor, w: torch.Tensor, low: list[torch.Tensor], cols: slice, z: torch.Tensor) -> None:
        """z = softcap(logit_scale * (W h + b))."""
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
        if head.logits_dtype is not None:
            z.copy_(z.to(head.logits_dtype))
        if head.logit_scale != 1.0:
            z.mul_(head.logit_scale)
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def _part(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """These rows; all of them without a view, which costs as much as a small kernel."""
    return x if rows.stop - rows.start == len(x) else x[rows]


def _shaped(buffer: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The first numbers of a buffer in a smaller shape, contiguous."""
    return buffer.view(-1)[: math.prod(shape)].view(shape)


@contextlib.contextmanager
def _plain_fp32(device: torch.device) -> Iterator[None]:
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
