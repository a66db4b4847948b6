"""The worst sequences of an incident, once for Markdown, HTML and the terminal: what is said of each, and colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LESS", "MORE", "Shade", "WorstSequence", "color_scale", "shade", "worst_sequences"]

LESS, MORE = (213, 94, 0), (0, 114, 178)  # the trainer gives less than the engine: vermilion; more: blue


@dataclass(frozen=True, slots=True)
class WorstSequence:
    """One sequence and its tokens, as rows of ``tokens.parquet``."""

    number: int  # row of the rollout batch
    tokens: list[Mapping[str, Any]]

    @property
    def compared(self) -> list[Mapping[str, Any]]:
        """Tokens with a Δ, finite or not."""
        return [t for t in self.tokens if t["compared"] and t["log_ratio"] is not None]

    @property
    def prompt(self) -> str:
        """As text; empty where it is not known."""
        return str(self.tokens[0].get("prompt") or "")

    @property
    def completion(self) -> str:
        """As text; empty where it is not known."""
        return "".join(t.get("token") or "" for t in self.tokens)

    @property
    def total(self) -> str:
        """How far off the whole sequence is, in words."""
        compared = self.compared
        finite = [abs(t["log_ratio"]) for t in compared if math.isfinite(t["log_ratio"])]
        odd = f", {len(compared) - len(finite):,} more are not finite" if len(finite) < len(compared) else ""
        return f"sum |Δ| {sum(finite):.4g} over {len(finite):,} compared tokens{odd}"


def worst_sequences(rows: Sequence[Mapping[str, Any]]) -> list[WorstSequence]:
    """The sequences of ``rows`` in their order: the worst first."""
    tokens: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        tokens.setdefault(row["sequence"], []).append(row)
    return [WorstSequence(int(number), of) for number, of in tokens.items()]


@dataclass(frozen=True, slots=True)
class Shade:
    """The colour of a token."""

    color: tuple[int, int, int]  # LESS or MORE
    share: float  # of the full colour
    finite: bool

    @property
    def marked(self) -> bool:
        """Whether the token is underlined as well: never colour alone."""
        return self.share >= 0.5


def shade(token: Mapping[str, Any], scale: float) -> Shade | None:
    """None for a token that was not compared. ``scale``: |Δ| of the full colour."""
    delta = token["log_ratio"] if token["compared"] else None
    if delta is None:
        return None
    finite = math.isfinite(delta)
    return Shade(LESS if delta < 0 else MORE, min(1.0, abs(delta) / scale) if finite else 1.0, finite)


def color_scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """|Δ| of the full colour: its 95th percentile over the tokens at hand."""
    known = (row["log_ratio"] for row in rows if row["compared"] and row["log_ratio"] is not None)
    sizes = sorted(abs(delta) for delta in known if math.isfinite(delta))
    return max(sizes[int(0.95 * (len(sizes) - 1))], 1e-6) if sizes else 1.0
