"""A colocated engine's layers called one by one, as written.

vLLM's private ground: classes that it compiles ask their ``do_not_compile`` at each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["uncompiled"]


@contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Inside: no part of the served module is run as compiled, so that hooks on its layers are called."""
    compiled = [module for module in model.modules() if vars(module).get("do_not_compile") is False]
    for module in compiled:
        module.do_not_compile = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in compiled:
            module.do_not_compile = False  # type: ignore[assignment]
