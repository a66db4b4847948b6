"""Exact log-probs and entropy of given tokens from hidden states, through an LM head in fp32.

The naive equivalent of `score_tokens`, without its (tokens x vocabulary) tensors:

    z = hidden.float() @ weight.float().T + bias
    z = softcap * tanh(logit_scale * z / softcap) / temperature
    logp = log_softmax(z); logprobs = logp[range(N), targets]; entropy = -(exp(logp) * logp).sum(-1)

Logits are made tile by tile, over tokens and over the vocabulary, and folded into an online log-sum-exp.
"""

from __future__ import annotations

import functools
import logging

import torch

from ..config.parity import HEAD_BACKENDS
from .head_checks import check, check_targets, check_top, misfit
from .head_spec import Head, HeadScores
from .projection import Projection, part_of, plain_fp32, spans

__all__ = ["DEFAULT_CHUNK_BYTES", "logits_chunk", "score_tokens"]

# Tiles are as large as the budget allows, on a CPU too: at 16 MiB they are as fast as cache-sized ones on an idle
# machine, and several times faster on a busy one, where each kernel's thread barrier may wait for a time slice.
DEFAULT_CHUNK_BYTES = 64 << 20

logger = logging.getLogger(__name__)


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
            and up, where it is installed, the dtypes fit (no low-rank head) and its first numbers are torch's, else
            torch.
        top: (N, M) fp32 to fill with the log-probs of the M most likely tokens, descending; M up to V_used. A target
            among them has the same number there. In Triton that takes the product twice and waits for the device
            once; tokens it can't do it for (many equals), and all where M is near V_used / 256, are left to torch.

    Returns:
        `HeadScores`, both (N,) fp32. A token whose hidden state is not finite gets non-finite numbers.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit; on the CPU also a target outside the vocabulary. On an
            accelerator that check would wait for the device; there such a target gets log-prob -inf.
        RuntimeError: with backend="triton", its first numbers are not torch's.
    """
    check(hidden, head)
    check_targets(hidden, targets, head)
    if top is not None:
        check_top(top, hidden, head)
    if _use_triton(hidden, head, backend):
        scores = _tried_on_chip(hidden, targets, head, chunk_bytes, top, must=backend == "triton")
        if scores is not None:
            return scores
    if not len(hidden):
        return HeadScores(*torch.empty(2, 0, dtype=torch.float32, device=hidden.device))
    projection = Projection(hidden, head, chunk_bytes)
    if projection.cols == head.vocab_used:
        return _score_whole_rows(projection, targets, head, top)
    return _score_tiles(projection, targets, head, top, chunk_bytes)


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


def _tried_on_chip(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    chunk_bytes: int,
    top: torch.Tensor | None,
    *,
    must: bool,
) -> HeadScores | None:
    """By the Triton kernels; None where they can't, which is not tried again unless it ``must`` be they."""
    try:
        scores = _score_on_chip(hidden, targets, head, chunk_bytes, top)
        if scores is not None:
            _prove(scores, hidden, targets, head, chunk_bytes, top)
        return scores
    except Exception as e:  # a compiler that does not know this GPU, say
        if must:
            raise
        _without_triton.add(hidden.device)
        logger.warning("the head's Triton kernel fails here (%s: %s); torch does its work.", type(e).__name__, e)
        return None


_proven: set[tuple[object, ...]] = set()  # kinds of heads whose first numbers were torch's

_PROOF_TOKENS, _PROOF_NATS = 256, 1e-3  # both add up in fp32: logits near 30 are off by 1e-5, near 1000 by 1e-4


def _prove(
    scores: HeadScores,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    chunk_bytes: int,
    top: torch.Tensor | None,
) -> None:
    """Compare the kernels' first numbers of each kind with torch's on some tokens; RuntimeError where they differ."""
    kind = (
        hidden.device, hidden.dtype, head.weight.dtype, head.weight.shape, head.bias is None, head.softcap is None,
        head.logits_dtype, top is None,
    )  # fmt: skip
    if kind in _proven:
        return
    at = torch.linspace(0, len(hidden) - 1, min(_PROOF_TOKENS, len(hidden)), device=hidden.device).long()
    most = None if top is None else torch.empty_like(top[at])
    expected = score_tokens(hidden[at], targets[at], head, chunk_bytes=chunk_bytes, backend="torch", top=most)
    pairs = [*zip(scores, expected, strict=True), *([] if top is None or most is None else [(top, most)])]
    gap = max(_largest_gap(got[at], want) for got, want in pairs)
    # logits rounded to few digits may round to either side: a last digit of theirs
    allowed = _PROOF_NATS if head.logits_dtype in (None, torch.float32) else 1.0
    if gap > allowed:
        raise RuntimeError(f"its numbers are off by up to {gap:.3g} nats from torch's on {len(at)} tokens")
    _proven.add(kind)
    logger.info("the head's Triton kernel gives torch's numbers on %d tokens, to %.1g nats", len(at), gap)


def _largest_gap(got: torch.Tensor, want: torch.Tensor) -> float:
    """Nats; infinite where one of two numbers is finite and the other is not."""
    gaps = (got.double() - want.double()).abs().nan_to_num(torch.inf, torch.inf)
    return float(torch.where(got.isfinite() | want.isfinite(), gaps, 0.0).max())


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
    projection: Projection, targets: torch.Tensor, head: Head, top: torch.Tensor | None
) -> HeadScores:
    """The same where a tile holds all logits of its tokens: nothing is carried from tile to tile."""
    parts = []
    masked = head.bias is not None or head.logits_dtype is not None  # logits may be -inf
    with plain_fp32(targets.device):
        for rows, _, z, exps in projection.tiles():
            if head.temperature != 1.0:
                z.mul_(1.0 / head.temperature)
            d = z.sub_(z.amax(-1, keepdim=True))
            target = part_of(targets, rows)[:, None]
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


def _score_tiles(
    projection: Projection, targets: torch.Tensor, head: Head, top: torch.Tensor | None, chunk_bytes: int
) -> HeadScores:
    """The same where a tile holds a part of the vocabulary: sums are carried from tile to tile."""
    device, count = projection.hidden.device, len(projection.hidden)
    peak = torch.full((count,), torch.finfo(torch.float32).min, dtype=torch.float32, device=device)
    target_logit = torch.full_like(peak, -torch.inf)
    # fp64 costs nothing on vectors and keeps hundreds of rescalings from adding up.
    total = torch.zeros(count, device=device, dtype=torch.float64)
    weighted = torch.zeros_like(total)
    if top is not None:
        top.fill_(-torch.inf)
    with plain_fp32(device):
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
            for span in spans(0, count, max(1, chunk_bytes // (16 * top.shape[1]))):
                top[span] = top[span].double() - offset[span, None]
        return HeadScores(logprobs, (log_total - weighted / total).float())


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
    with plain_fp32(hidden.device):
        for rows, cols, z, _ in Projection(hidden, head, DEFAULT_CHUNK_BYTES).tiles():
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
