"""Where in a batch the drift is: by position, by turn, by entropy."""

from __future__ import annotations

import torch

from .counterfactual import Counterfactual, DiagnosedBatch
from .distribution import huber

__all__ = ["drift_profiles"]


def drift_profiles(batch: DiagnosedBatch, current: Counterfactual) -> dict[str, list[dict[str, float]]]:
    """The drift of this rank by eighths of the completion, by turn, and by quarters of the entropy."""
    delta = batch.log_probs(current) - current.reported
    good = torch.isfinite(delta) & current.kept
    if not good.any():
        return {}
    column = batch.column[good].double()
    eighths = torch.linspace(0, float(column.max()) + 1, 9, dtype=torch.float64)
    out = {"by_position": _profile(delta[good], column, eighths)}
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
