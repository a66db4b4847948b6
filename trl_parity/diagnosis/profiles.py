"""Where in a batch the drift is: by position, padding, turn and entropy."""

from __future__ import annotations

import torch

from .counterfactual import Counterfactual, DiagnosedBatch
from .distribution import huber

__all__ = ["drift_profiles", "onset", "onset_in_words"]


def drift_profiles(batch: DiagnosedBatch, current: Counterfactual) -> dict[str, list[dict[str, float]]]:
    """The drift of this rank by eighths of the completion, padding of the prompt, turn, quarters of the entropy."""
    delta = batch.log_probs(current) - current.reported
    good = torch.isfinite(delta) & current.kept
    if not good.any():
        return {}
    column = batch.column[good].double()
    eighths = torch.linspace(0, float(column.max()) + 1, 9, dtype=torch.float64)
    out = {"by_position": _profile(delta[good], column, eighths)}
    padding = batch.padding[batch.row][good].double()
    if float(padding.max()) > 0.0:
        edges = torch.cat([torch.tensor([0.0]), torch.linspace(1.0, float(padding.max()) + 1.0, 4)]).double()
        out["by_padding"] = _profile(delta[good], padding, edges)
    if turns := int(batch.turn.max()):
        out["by_turn"] = _profile(delta[good], batch.turn[good].double(), torch.arange(turns + 2.0))
    if batch.entropy is not None:
        entropy = batch.entropy[good]
        quarters = entropy.quantile(torch.linspace(0, 1, 5, dtype=torch.float64))
        quarters[-1] += 1.0
        out["by_entropy"] = _profile(delta[good], entropy, quarters)
    return out


def _profile(delta: torch.Tensor, by: torch.Tensor, edges: torch.Tensor) -> list[dict[str, float]]:
    """Tokens, mean Huber(Δ) and mean Δ between one edge and the next."""
    out = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        d = delta[(by >= low) & (by < high)]
        if len(d):
            out.append({"from": low, "tokens": len(d), "residual": float(huber(d).mean()),
                        "log_ratio": float(d.mean())})  # fmt: skip
    return out


_ONSET = 10.0  # so many times more drift from there on

_SIDE = 0.1  # and at least this share of the tokens on either side


def onset(size: torch.Tensor, position: torch.Tensor, floor: float) -> int | None:
    """The position (N,) from which on there is drift ``size`` (N,), when before it there is hardly any.

    Where Σ (x - mean)² of the two sides is the least, if the mean after it is ten times that before and over 3
    floors. None: no such place.
    """
    if not len(position):
        return None
    order = position.argsort()
    at, x = position[order], size[order].double()
    edges = (at.diff() > 0).nonzero().squeeze(-1) + 1  # the first token of each further position
    if not len(edges):
        return None
    sums, n = x.cumsum(0), float(len(x))
    before, after = sums[edges - 1] / edges, (sums[-1] - sums[edges - 1]) / (n - edges)
    best = int((edges * (n - edges) * (before - after).square()).argmax())
    low, high, share = float(before[best]), float(after[best]), float(edges[best]) / n
    clear = high > max(_ONSET * low, 3.0 * floor) and _SIDE <= share <= 1.0 - _SIDE
    return int(at[edges[best]]) if clear else None


def onset_in_words(batch: DiagnosedBatch, current: Counterfactual) -> str:
    """Where in the context the drift begins, if it does at one place: " from position 64 on". Else nothing."""
    delta = batch.log_probs(current) - current.reported
    good = torch.isfinite(delta) & current.kept
    at = onset(huber(delta[good]), (batch.prompt_lengths[batch.row] + batch.column)[good], batch.floor)
    return "" if at is None else f", from position {at} on"
