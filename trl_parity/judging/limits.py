"""What a rule with ``k`` lets a statistic be, as it was applied: the one number that charts and percentages share."""

from __future__ import annotations

from ..config.rules import Rule

__all__ = ["allowed"]


def allowed(rule: Rule, floor: float | None) -> float | None:
    """The excess over ``floor`` that breaches: max(limit, (k - 1) x floor), or what is left to ``ceiling`` if less.

    ``floor`` as it is recorded (of ``ess``, 1 - what the rule looks at). None without ``k`` or without a floor.
    """
    if rule.k is None or floor is None:
        return None
    floor = 1.0 - floor if rule.stat == "ess" else floor
    limit = max(rule.limit, (rule.k - 1.0) * floor)
    return limit if rule.ceiling is None else min(limit, rule.ceiling - floor)
