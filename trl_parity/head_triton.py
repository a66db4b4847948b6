# a kernel is typed by its compiler
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""The fp32 head on a GPU's tensor cores: tiles of logits are made, folded and forgotten on the chip.

Imported only where it is used (`trl_parity.head.score_tokens`), since it needs Triton. What it computes is described
there. How: the product of two bf16 (or two fp16) numbers is exact in fp32, and tensor cores add in fp32, so a 16-bit
product whose result is never rounded *is* the fp32 head. Wider numbers are split into 16-bit terms, w = w0 + w1 + w2
with |w1| < 2^-8 |w0|, |w2| < 2^-16 |w0|, and products of terms are added up as far as they reach the 24th bit.

One program makes one (tokens x vocabulary) tile and leaves three numbers a token: the tile's largest logit m,
sum(e) and sum(e d) with d = z - m, e = exp(d). A second kernel merges them over the vocabulary, in fp64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .head import Head

__all__ = ["score_tokens_triton", "takes"]

_MERGE_TOKENS = 128


@triton.jit
def _terms(x, COUNT: tl.constexpr):
    """x as a sum of up to three bf16 terms, largest first."""
    first = x.to(tl.bfloat16)
    second = first
    third = first
    if COUNT > 1:
        rest = x.to(tl.float32) - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        if COUNT > 2:
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return first, second, third


@triton.jit
def _rounded(z, DTYPE: tl.constexpr):
    """fp32 numbers rounded to nearest, ties to even, in a 16-bit dtype. By hand for bf16: the interpreter cuts off."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = z.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(z == z, nearest.to(tl.float32, bitcast=True), z)
    return z.to(DTYPE).to(tl.float32)


@triton.jit
def _add_product(a, b, z, INTERPRETED: tl.constexpr):
    """z + a b. Triton's interpreter multiplies the bits of bf16 numbers as integers: there they go in as fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, z)


@triton.jit
def _tile(
    hidden, weight, bias, targets, peaks, totals, weighteds, picked,
    tokens, vocab, width, hidden_stride, weight_stride, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROUND: tl.constexpr, ROUND_DTYPE: tl.constexpr,
    HIDDEN_TERMS: tl.constexpr, WEIGHT_TERMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_TOKENS x BLOCK_VOCAB, folded into m, sum(e), sum(e d) a token; the target's logit if it is here.

    TERMS = 0: both sides are multiplied as they are (two bf16 or two fp16).
    """
    # neighbours share slices of the weight while they are in the L2 cache
    program = tl.program_id(0)
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    vocab_blocks = tl.cdiv(vocab, BLOCK_VOCAB)
    in_group = GROUP * vocab_blocks
    first_block = (program // in_group) * GROUP
    group = min(token_blocks - first_block, GROUP)
    token_block = first_block + (program % in_group) % group
    vocab_block = (program % in_group) // group

    token = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    entry = vocab_block * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    column = tl.arange(0, BLOCK_WIDTH)
    # rows past the end read the first ones again and are left out below: no mask in the inner loop
    hidden_rows = hidden + (token % tokens).to(tl.int64)[:, None] * hidden_stride + column[None, :]
    weight_rows = weight + (entry % vocab).to(tl.int64)[None, :] * weight_stride + column[:, None]
    z = tl.zeros((BLOCK_TOKENS, BLOCK_VOCAB), dtype=tl.float32)
    for at in range(0, width, BLOCK_WIDTH):
        if WHOLE_WIDTH:
            h = tl.load(hidden_rows)
            w = tl.load(weight_rows)
        else:
            h = tl.load(hidden_rows, mask=column[None, :] < width - at, other=0.0)
            w = tl.load(weight_rows, mask=column[:, None] < width - at, other=0.0)
        if HIDDEN_TERMS == 0:
            z = _add_product(h, w, z, INTERPRETED)
        else:
            h0, h1, h2 = _terms(h, HIDDEN_TERMS)
            w0, w1, w2 = _terms(w, WEIGHT_TERMS)
            # smallest first; a product of terms i and j with i + j > 2 is below the 24th bit
            if HIDDEN_TERMS > 2:
                z = _add_product(h2, w0, z, INTERPRETED)
            if WEIGHT_TERMS > 2:
                z = _add_product(h0, w2, z, INTERPRETED)
            if HIDDEN_TERMS > 1 and WEIGHT_TERMS > 1:
                z = _add_product(h1, w1, z, INTERPRETED)
            if HIDDEN_TERMS > 1:
                z = _add_product(h1, w0, z, INTERPRETED)
            if WEIGHT_TERMS > 1:
                z = _add_product(h0, w1, z, INTERPRETED)
            z = _add_product(h0, w0, z, INTERPRETED)
        hidden_rows += BLOCK_WIDTH
        weight_rows += BLOCK_WIDTH
    if HAS_BIAS:
        z += tl.load(bias + entry, mask=entry < vocab, other=0.0).to(tl.float32)[None, :]
    if ROUND:
        z = _rounded(z, ROUND_DTYPE)
    z *= scale
    if HAS_SOFTCAP:
        # tanh by an exponential that cannot overflow
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        z = tl.where(z < 0, -softcap, softcap) * ((1.0 - e) / (1.0 + e))
    z *= inverse_temperature
    z = tl.where(entry[None, :] < vocab, z, float("-inf"))

    peak = tl.max(z, axis=1)
    d = z - tl.where(peak == float("-inf"), 0.0, peak)[:, None]
    e = tl.exp(d)
    real = token < tokens
    out = vocab_block.to(tl.int64) * tokens + token
    tl.store(peaks + out, peak, mask=real)
    tl.store(totals + out, tl.sum(e, axis=1), mask=real)
    tl.store(weighteds + out, tl.sum(tl.where(e > 0, e * d, 0.0), axis=1), mask=real)  # a logit of -inf adds nothing
    target = tl.load(targets + token, mask=real, other=-1)
    here = (target >= vocab_block * BLOCK_VOCAB) & (target < min((vocab_block + 1) * BLOCK_VOCAB, vocab))
    mine = tl.sum(tl.where(entry[None, :] == target[:, None], z, 0.0), axis=1)
    tl.store(picked + token, mine, mask=real & here)


@triton.jit
def _merge(peaks, totals, weighteds, picked, logprobs, entropies, tokens, tiles, BLOCK: tl.constexpr):
    """Log-prob of the target and entropy from what the tiles left, (tiles, tokens) each."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = token < tokens
    peak = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    weighted = tl.zeros((BLOCK,), dtype=tl.float64)
    for _ in range(tiles):
        new = tl.load(peaks + token, mask=real, other=float("-inf"))
        more = tl.load(totals + token, mask=real, other=0.0).to(tl.float64)
        more_weighted = tl.load(weighteds + token, mask=real, other=0.0).to(tl.float64)
        peaks += tokens
        totals += tokens
        weighteds += tokens
        top = tl.maximum(peak, new)
        # the sums were taken about their own maximum: every d moves by `shift`, e shrinks by exp(shift)
        shift = tl.where(peak == top, 0.0, (peak - top).to(tl.float64))
        more_shift = tl.where(new == top, 0.0, (new - top).to(tl.float64))
        weighted = (weighted + tl.where(total > 0, total * shift, 0.0)) * tl.exp(shift)
        weighted += (more_weighted + tl.where(more > 0, more * more_shift, 0.0)) * tl.exp(more_shift)
        total = total * tl.exp(shift) + more * tl.exp(more_shift)
        peak = top
    log_total = tl.log(total)
    z = tl.load(picked + token, mask=real, other=0.0).to(tl.float64)
    tl.store(logprobs + token, (z - peak.to(tl.float64) - log_total).to(tl.float32), mask=real)
    tl.store(entropies + token, (log_total - weighted / total).to(tl.float32), mask=real)


# 16-bit terms that hold every digit of a number
_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
_ROUNDED: dict[torch.dtype | None, Any] = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def takes(hidden: torch.Tensor, head: Head) -> bool:
    """Whether this is for us: on a GPU (or interpreted), 16 or 32 bits, rows in one piece, no low-rank term."""
    tensors = (hidden, head.weight)
    return (
        (hidden.is_cuda or triton.knobs.runtime.interpret)
        and all(t.dtype in _TERMS and t.stride(1) == 1 for t in tensors)
        and head.logits_dtype in (None, torch.float32, *_ROUNDED)
        and not head.low_rank
    )


# Tile sizes: as large as accumulator registers and shared memory allow, for the fewest loads a product.
TILES: dict[str, dict[str, int]] = {
    "plain": {"BLOCK_TOKENS": 128, "BLOCK_VOCAB": 256, "BLOCK_WIDTH": 64, "num_warps": 8, "num_stages": 3},
    "small": {"BLOCK_TOKENS": 128, "BLOCK_VOCAB": 128, "BLOCK_WIDTH": 32, "num_warps": 4, "num_stages": 3},
    # several terms of both sides live beside the accumulator
    "terms": {"BLOCK_TOKENS": 64, "BLOCK_VOCAB": 128, "BLOCK_WIDTH": 32, "num_warps": 8, "num_stages": 2},
    "interpreter": {"BLOCK_TOKENS": 16, "BLOCK_VOCAB": 32, "BLOCK_WIDTH": 16, "num_warps": 4, "num_stages": 1},
}
_PLAIN_BYTES = 3 * (128 + 256) * 64 * 2  # shared memory of the three stages of "plain"


def _tiles(hidden: torch.Tensor, plain: bool) -> dict[str, int]:
    if not hidden.is_cuda:
        return TILES["interpreter"]
    if not plain:
        return TILES["terms"]
    device: Any = torch.cuda.get_device_properties(hidden.device)
    return TILES["plain" if device.shared_memory_per_block_optin > _PLAIN_BYTES else "small"]


def score_tokens_triton(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies, (N,) fp32 each: `trl_parity.head.score_tokens` for arguments it has checked.

    Beside them at most ``chunk_bytes`` are allocated, for what the tiles leave of a slice of the tokens.
    """
    (count, width), vocab = hidden.shape, head.vocab_used
    logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
    entropies = torch.empty_like(logprobs)
    plain = hidden.dtype == head.weight.dtype and hidden.dtype != torch.float32
    blocks = _tiles(hidden, plain)
    tiles = triton.cdiv(vocab, blocks["BLOCK_VOCAB"])
    slice_tokens = max(blocks["BLOCK_TOKENS"], chunk_bytes // (4 * (3 * tiles + 1)))
    left = torch.empty(3, tiles, min(count, slice_tokens), dtype=torch.float32, device=hidden.device)
    bias = head.bias if head.bias is not None else head.weight  # never read
    constants: dict[str, Any] = {
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None,
        "ROUND": head.logits_dtype in _ROUNDED,
        "ROUND_DTYPE": _ROUNDED.get(head.logits_dtype, tl.float32),
        "HIDDEN_TERMS": 0 if plain else _TERMS[hidden.dtype],
        "WEIGHT_TERMS": 0 if plain else _TERMS[head.weight.dtype],
        "GROUP": 8,
        "INTERPRETED": not hidden.is_cuda,
        "WHOLE_WIDTH": width % blocks["BLOCK_WIDTH"] == 0,
    }
    for start in range(0, count, slice_tokens):
        part = slice(start, min(start + slice_tokens, count))
        some = part.stop - part.start
        h, target = hidden[part], targets[part]
        peaks, totals, weighteds = (x.view(-1)[: tiles * some] for x in left)
        picked = torch.full((some,), -torch.inf, dtype=torch.float32, device=hidden.device)
        programs = tiles * triton.cdiv(some, blocks["BLOCK_TOKENS"])
        _tile[(programs,)](
            h, head.weight, bias, target, peaks, totals, weighteds, picked,
            some, vocab, width, h.stride(0), head.weight.stride(0),
            float(head.logit_scale), float(head.softcap or 1.0), 1.0 / head.temperature, **constants, **blocks,
        )  # fmt: skip
        _merge[(triton.cdiv(some, _MERGE_TOKENS),)](
            peaks, totals, weighteds, picked, logprobs[part], entropies[part], some, tiles, BLOCK=_MERGE_TOKENS
        )
    return logprobs, entropies
