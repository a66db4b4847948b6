"""Where the drift is, when it is somewhere: in few sequences, or in those of few prompts."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["concentrated"]

_DISPERSION = 3.0  # heavy tails alone stay below 2.3 (python benchmarks/local_faults.py)

_FEW = 0.25  # of the sequences

_FEW_PROMPTS = 0.5


def concentrated(stats: Mapping[str, float | None]) -> str:
    """A sentence of where 90 % of the k3 is; "" of a drift that is spread as its tokens' heavy tails spread it."""
    sequences, prompts, dispersion = (
        stats.get(f"concentration/{name}") for name in ("sequences", "prompts", "dispersion")
    )
    if sequences is None or dispersion is None or sequences > _FEW or dispersion < _DISPERSION:
        return ""
    of = "" if prompts is None or prompts > _FEW_PROMPTS else f", in those of {prompts:.0%} of the prompts"
    return f"The drift is not everywhere: {sequences:.0%} of the sequences carry 90 % of the k3{of}."
