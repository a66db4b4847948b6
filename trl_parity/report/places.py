"""Where the drift is, when it is somewhere: on one rank, in few sequences, or in those of few prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .format import number

__all__ = ["concentrated", "places"]

_DISPERSION = 3.0  # heavy tails alone stay below 2.3 (python benchmarks/local_faults.py)

_FEW = 0.25  # of the sequences

_FEW_PROMPTS = 0.5


def places(stats: Mapping[str, float | None], named: Sequence[str]) -> Iterator[str]:
    """A sentence for each. ``named``: the statistics over their limit, some of them of the two sides' drift."""
    rank, own_mean = stats.get("replica/rank"), stats.get("replica/logp_abs_diff/mean")
    if any(name.startswith("replica/") for name in named) and rank is not None and own_mean is not None:
        often = stats.get("replica/windows")
        yield (
            f"Rank {rank:.0f} drifts in {'each' if often is None else f'{often:.0f}'} of the last windows, by a mean "
            f"|Δ| of {own_mean:.3g} at least (all ranks together: {number(stats.get('logp_abs_diff/mean'))})."
        )
    if any(not name.startswith("replica/") for name in named) and (where := concentrated(stats)):
        yield where


def concentrated(stats: Mapping[str, float | None]) -> str:
    """A sentence of where 90 % of the k3 is; "" of a drift that is spread as its tokens' heavy tails spread it."""
    sequences, prompts, dispersion = (
        stats.get(f"concentration/{name}") for name in ("sequences", "prompts", "dispersion")
    )
    if sequences is None or dispersion is None or sequences > _FEW or dispersion < _DISPERSION:
        return ""
    of = "" if prompts is None or prompts > _FEW_PROMPTS else f", in those of {prompts:.0%} of the prompts"
    return f"The drift is not everywhere: {sequences:.0%} of the sequences carry 90 % of the k3{of}."
