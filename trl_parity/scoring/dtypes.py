"""Names of dtypes, as settings spell them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["dtype_name"]


def dtype_name(dtype: torch.dtype | str) -> str:
    """``bfloat16``: without "torch.", and vLLM's ``half`` and ``float`` by their other names."""
    name = str(dtype).removeprefix("torch.")
    return {"half": "float16", "float": "float32"}.get(name, name)
