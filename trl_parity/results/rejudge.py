"""Judge a finished run again, with other rules and the very same tests and breaker. Needs no torch and no model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.parity import ParityConfig
from ..config.reading import assignments
from ..errors import ConfigError
from ..judging.breaker import Breaker
from ..judging.evidence import Evidence
from ..metrics.scalars import SCALARS
from ..verdict import MismatchStats, Status, Verdict
from .reader import as_number, iter_windows

__all__ = ["Judgement", "changed_config", "has_floor", "read_windows", "rejudge", "require_rejudged"]


class Judgement(NamedTuple):
    """One window, as it was judged and as it is judged now."""

    row: Mapping[str, Any]
    verdict: Verdict


def read_windows(path: str | Path) -> list[dict[str, Any]]:
    """All windows of a run in memory; see ``iter_windows``."""
    return list(iter_windows(path))


REJUDGED = (  # what judges look at
    "rules", "consecutive", "breach_memory", "halt_on_error", "warmup", "floor_tokens", "evidence_alpha",
    "evidence_floor_factor", "evidence_change_factor", "evidence_effects",
)  # fmt: skip


def changed_config(config: ParityConfig, given: Sequence[str]) -> ParityConfig:
    """``config`` with ``name=value`` laid over it, e.g. ``consecutive=2`` or ``rules.kl_k3.k=8``; values are YAML."""
    values = config.to_dict()
    for name, value in assignments(given, "consecutive=2 or rules.kl_k3.k=8"):
        keys = name.split(".")
        target = values
        for key in keys[:-1]:
            inner = target.get(key)
            if inner is not None and not isinstance(inner, dict):
                inner = {"limit": inner}  # a rule given as a bare limit
            target[key] = dict(inner or {})
            target = target[key]
        target[keys[-1]] = value
    return ParityConfig.from_mapping(values, where="--set")


def require_rejudged(given: Sequence[str]) -> None:
    """Raise ConfigError for a setting that changes what is measured, not how it is judged."""
    for name, _ in assignments(given, ""):
        if (setting := name.split(".")[0]) not in REJUDGED:
            raise ConfigError(
                f"--set {setting}: the windows were recorded as they were measured, and {setting} can't be tried out "
                f"on them. Expected one of: {', '.join(REJUDGED)}. For another {setting}, another run."
            )


def has_floor(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any window was judged over a noise floor; usually the first one tells."""
    return any(row.get("floor/kl_k3") is not None for row in rows)


def rejudge(
    rows: Iterable[Mapping[str, Any]], config: ParityConfig, *, floored: bool | None = None
) -> Iterator[Judgement]:
    """Judge every window in order. ``floored``: ``has_floor``, where ``rows`` can be read only once."""
    breaker, evidence = Breaker.from_config(config), Evidence.from_config(config)
    if floored is None:
        rows = list(rows)
        floored = has_floor(rows)
    # a run that never had a noise floor was judged by absolute limits, and is again
    breaker.expects_floor &= floored
    for row in rows:
        step = int(row["step"])
        verdict = breaker.judge(step, evidence.add(step, _stats(row)), error="as recorded")
        yield Judgement(row, verdict)


def _stats(row: Mapping[str, Any]) -> MismatchStats:
    def count(name: str, usual: int = 0) -> int:
        value = as_number(row.get(name, usual)) or 0
        return int(value) if math.isfinite(value) else 0

    return MismatchStats(
        count("num_tokens"),
        count("num_sequences"),
        count("num_batches"),
        count("num_errors", int(row["status"] == Status.ERROR)),
        {name: as_number(row.get(name)) for name in SCALARS},
    )
