"""Figures for people, the same in every report, on every terminal and in every picture."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["cut", "number", "percent"]


def number(value: Any, form: str = ".4g") -> str:
    """A figure; '-' for not measured. Non-finite ones may come as strings, out of a file."""
    return "-" if value is None else format(float(value), form)


def percent(value: Any) -> str:
    """A share; '-' for none, and never 100% for less."""
    if value is None or not math.isfinite(share := float(value)):
        return number(value)
    return f"{share:.0%}" if share >= 1 or share <= 0.99 else f"{math.floor(share * 1000) / 10}%"


def cut(text: str, most: int) -> str:
    """The text, ended with an ellipsis where it is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"
