"""Rules under which a window would not have breached, as they can be pasted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..config.parity import ParityConfig
from ..config.rules import DEFAULT_RULES
from ..judging.breaker import read

__all__ = ["looser_rules"]

_ROOM = 1.5  # times what was seen


def looser_rules(breaches: Iterable[str], stats: Mapping[str, Any], config: ParityConfig) -> dict[str, Any]:
    """For ``ParityConfig(rules=...)``: limits half as large again as what was seen. None drops a rule."""
    rules = {rule.stat: rule for rule in config.resolved_rules()}
    dropped = {rule.stat for rule in DEFAULT_RULES}
    found: dict[str, Any] = {}
    for stat in breaches:
        reading = read(rules[stat], stats) if stat in rules else None
        if reading is None:  # not known
            continue
        if not math.isfinite(reading.value):
            found |= {stat: None} if stat in dropped else {}  # no limit is above what is no number
        elif reading.rule.below:
            found[stat] = {"limit": _rounded(reading.value / _ROOM)}
        else:
            limit = _rounded(reading.value * _ROOM)
            names = ["absolute" if reading.missing else "limit"]
            if reading.rule.ceiling is not None and reading.rule.ceiling < reading.value + limit:
                names.append("ceiling")
            found[stat] = dict.fromkeys(names, limit)
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
