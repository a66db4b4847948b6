"""Padded rows through the attention of TRL's asynchronous GRPO, which takes packed rows. Written against TRL 1.16.

Private names used: ``trl.experimental.async_grpo.packing.tree_attention`` and its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["padded_attention", "segments"]

_PADDED = "trl_parity_rows"  # attention over padded rows, by the trainer's own kernel


@contextmanager
def padded_attention(policy: torch.nn.Module) -> Iterator[None]:
    """Inside, the policy takes several padded rows, where TRL's tree attention takes one packed row."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_PADDED, _attend_rows)
    AttentionMaskInterface.register(_PADDED, lambda **kwargs: None)
    config: Any = policy.config
    config = config.get_text_config()
    packed = config._attn_implementation
    config._attn_implementation = _PADDED
    try:
        yield
    finally:
        config._attn_implementation = packed


def _attend_rows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """TRL's kernel over rows laid end to end."""
    from trl.experimental.async_grpo.packing import tree_attention

    rows, _, width, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (query, key, value))
    out, weights = tree_attention(module, query, key, value, None, **kwargs)
    return out[0].unflatten(0, (rows, width)), weights


def segments(attention: torch.Tensor) -> dict[str, Any]:
    """The arguments of TRL's kernel by which tokens see their own row's, and padding padding."""
    flat = attention.bool().flatten()
    starts = torch.ones_like(flat)
    starts[1:] = flat[1:] != flat[:-1]
    starts[:: attention.shape[1]] = True
    ends = torch.cat([starts.nonzero().flatten(), torch.tensor([len(flat)], device=flat.device)]).int()
    longest = int(ends.diff().max())
    return {
        "tree_kv_index": torch.arange(len(flat), device=flat.device),
        "tree_cu_seqlens_q": ends,
        "tree_cu_seqlens_k": ends,
        "tree_max_seqlen_q": longest,
        "tree_max_seqlen_k": longest,
    }
