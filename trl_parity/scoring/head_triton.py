"""The fp32 head on a GPU's tensor cores: tiles of logits are made, folded and forgotten on the chip.

Imported only where it is used (``scoring.head.score_tokens``), since it needs Triton. What it computes is described
there. How: the product of two bf16 (or two fp16) numbers is exact in fp32, and tensor cores add in fp32, so a 16-bit
product whose result is never rounded *is* the fp32 head. Wider numbers are split into 16-bit terms, w = w0 + w1 + w2
with |w1| < 2^-8 |w0|, |w2| < 2^-16 |w0|, and products of terms are added up as far as they reach the 24th bit.

One program makes one (tokens x vocabulary) tile and leaves three numbers a token: the tile's largest logit m,
sum(e) and sum(e d) with d = z - m, e = exp(d). A second kernel merges them over the vocabulary, in fp64.

The M most likely tokens, when they are wanted, take the product a second time: M tiles reach the M-th largest of a
token's tile maxima, so M logits at least do, and seldom many more. The second pass leaves those logits alone.
"""

# a kernel is typed by its compiler
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .head_spec import Head

__all__ = ["most_likely", "score_tokens_triton", "takes"]

_MERGE_TOKENS = 128

_ROOM = 4  # times as many logits as are wanted may reach the floor


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
def _logits(
    hidden, weight, bias, tokens, vocab, width, hidden_stride, weight_stride, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROUND: tl.constexpr, ROUND_DTYPE: tl.constexpr,
    HIDDEN_TERMS: tl.constexpr, WEIGHT_TERMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """This program's tile: (BLOCK_TOKENS, BLOCK_VOCAB) logits, -inf past the vocabulary; its tokens, its entries.

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
        capped = tl.where(z < 0, -softcap, softcap) * ((1.0 - e) / (1.0 + e))
        z = tl.where(z == float("-inf"), z, capped)  # what the bias takes out stays out
    z *= inverse_temperature
    z = tl.where(entry[None, :] < vocab, z, float("-inf"))
    return z, token, entry, vocab_block


@triton.jit
def _tile(
    hidden, weight, bias, tokens, vocab, width, hidden_stride, weight_stride, scale, softcap, inverse_temperature,
    targets, peaks, totals, weighteds, picked,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROUND: tl.constexpr, ROUND_DTYPE: tl.constexpr,
    HIDDEN_TERMS: tl.constexpr, WEIGHT_TERMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Logits folded into m, sum(e), sum(e d) a token; the target's logit if it is here."""
    z, token, entry, vocab_block = _logits(
        hidden, weight, bias, tokens, vocab, width, hidden_stride, weight_stride, scale, softcap, inverse_temperature,
        HAS_BIAS, HAS_SOFTCAP, ROUND, ROUND_DTYPE, HIDDEN_TERMS, WEIGHT_TERMS,
        BLOCK_TOKENS, BLOCK_VOCAB, BLOCK_WIDTH, GROUP, WHOLE_WIDTH, INTERPRETED,
    )  # fmt: skip
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
def _collect(
    hidden, weight, bias, tokens, vocab, width, hidden_stride, weight_stride, scale, softcap, inverse_temperature,
    floors, found, counts, ROOM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROUND: tl.constexpr, ROUND_DTYPE: tl.constexpr,
    HIDDEN_TERMS: tl.constexpr, WEIGHT_TERMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Logits that reach their token's floor, in any order, the first ROOM of them; and how many do."""
    z, token, entry, _ = _logits(
        hidden, weight, bias, tokens, vocab, width, hidden_stride, weight_stride, scale, softcap, inverse_temperature,
        HAS_BIAS, HAS_SOFTCAP, ROUND, ROUND_DTYPE, HIDDEN_TERMS, WEIGHT_TERMS,
        BLOCK_TOKENS, BLOCK_VOCAB, BLOCK_WIDTH, GROUP, WHOLE_WIDTH, INTERPRETED,
    )  # fmt: skip
    real = token < tokens
    floor = tl.load(floors + token, mask=real, other=float("inf"))
    reach = ((z >= floor[:, None]) & real[:, None] & (entry < vocab)[None, :]).to(tl.int32)
    number = tl.sum(reach, axis=1)
    start = tl.atomic_add(counts + token, number, mask=number > 0)
    place = start[:, None] + tl.cumsum(reach, axis=1) - 1
    tl.store(found + token.to(tl.int64)[:, None] * ROOM + place, z, mask=(reach > 0) & (place < ROOM))


@triton.jit
def _merge(peaks, totals, weighteds, picked, logprobs, entropies, offsets, tokens, tiles, BLOCK: tl.constexpr):
    """Log-prob of the target, entropy and log-sum-exp from what the tiles left, (tiles, tokens) each."""
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
    offset = peak.to(tl.float64) + log_total
    tl.store(offsets + token, offset, mask=real)
    tl.store(logprobs + token, (z - offset).to(tl.float32), mask=real)
    tl.store(entropies + token, (log_total - weighted / total).to(tl.float32), mask=real)


# 16-bit terms that hold every digit of a number
_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}

_ROUNDED: dict[torch.dtype | None, Any] = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def takes(hidden: torch.Tensor, head: Head) -> bool:
    """Whether this is for us: on a GPU (or interpreted), 16 or 32 bits, rows in one piece, a matrix alone."""
    tensors = (hidden, head.weight)
    return (
        (hidden.is_cuda or triton.knobs.runtime.interpret)
        and all(t.dtype in _TERMS and t.stride(1) == 1 for t in tensors)
        and head.logits_dtype in (None, torch.float32, *_ROUNDED)
        and not head.low_rank
        and head.module is None
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


def most_likely(hidden: torch.Tensor, head: Head) -> int:
    """How many of the most likely tokens the kernels find: with more, too many logits reach the floor."""
    return 4 * triton.cdiv(head.vocab_used, _tiles(hidden, _is_plain(hidden, head))["BLOCK_VOCAB"]) // 5


def _is_plain(hidden: torch.Tensor, head: Head) -> bool:
    return hidden.dtype == head.weight.dtype and hidden.dtype != torch.float32


def score_tokens_triton(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_bytes: int, top: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probs and entropies, (N,) fp32 each: `trl_parity.scoring.head.score_tokens` for arguments it has checked.

    With ``top`` (N, M), M up to `most_likely`, also which of its rows hold something else, (N,) bool: where far more
    than M logits reach the floor, many equals for one, or fewer, as with a NaN. Beside all of these at most
    ``chunk_bytes`` are allocated, for what the tiles leave of a slice of the tokens.
    """
    (count, width), vocab, device = hidden.shape, head.vocab_used, hidden.device
    logprobs = torch.empty(count, dtype=torch.float32, device=device)
    entropies = torch.empty_like(logprobs)
    plain = _is_plain(hidden, head)
    blocks = _tiles(hidden, plain)
    tiles, most = triton.cdiv(vocab, blocks["BLOCK_VOCAB"]), 0 if top is None else top.shape[1]
    room = _ROOM * most
    missed = None if top is None else torch.empty(count, dtype=torch.bool, device=device)
    # floats a token: what the tiles leave, picked, offset; its M largest maxima; logits found, the M largest as fp64
    floats = 3 * tiles + 3 + (tiles + 2 * room + 7 * most + 2 if most else 0)
    slice_tokens = max(blocks["BLOCK_TOKENS"], chunk_bytes // (4 * floats))
    left = torch.empty(3, tiles, min(count, slice_tokens), dtype=torch.float32, device=device)
    targets = targets.contiguous()
    bias = head.bias.contiguous() if head.bias is not None else head.weight  # never read
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
        h = hidden[part]
        peaks, totals, weighteds = (x.view(-1)[: tiles * some] for x in left)
        picked = torch.full((some,), -torch.inf, dtype=torch.float32, device=device)
        offset = torch.empty(some, dtype=torch.float64, device=device)
        programs = (tiles * triton.cdiv(some, blocks["BLOCK_TOKENS"]),)
        product = (
            h, head.weight, bias, some, vocab, width, h.stride(0), head.weight.stride(0),
            float(head.logit_scale), float(head.softcap or 1.0), 1.0 / head.temperature,
        )  # fmt: skip
        _tile[programs](*product, targets[part], peaks, totals, weighteds, picked, **constants, **blocks)
        _merge[(triton.cdiv(some, _MERGE_TOKENS),)](
            peaks, totals, weighteds, picked, logprobs[part], entropies[part], offset, some, tiles, BLOCK=_MERGE_TOKENS
        )
        if top is not None and missed is not None:
            floors = peaks.view(tiles, some).topk(most, dim=0).values[-1]
            found = torch.full((some, room), -torch.inf, dtype=torch.float32, device=device)
            counts = torch.zeros(some, dtype=torch.int32, device=device)
            _collect[programs](*product, floors, found, counts, ROOM=room, **constants, **blocks)
            top[part] = found.topk(most).values.double() - offset[:, None]
            missed[part] = (counts < most) | (counts > room)
    return logprobs, entropies, missed
