"""Judge a finished run again, with other rules and the very same breaker. Needs no torch, no model and no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.parity import ParityConfig
from ..config.reading import assignments
from ..errors import ConfigError
from ..judging.breaker import Breaker
from ..metrics.scalars import SCALARS
from ..verdict import MismatchStats, Status, Verdict
from .reader import as_number, iter_windows

__all__ = ["Judgement", "changed_config", "has_floor", "read_windows", "rejudge"]


class Judgement(NamedTuple):
    """One window, as it was judged and as it is judged now."""

    row: Mapping[str, Any]
    verdict: Verdict


def read_windows(path: str | Path) -> list[dict[str, Any]]:
    """All windows of a run in memory; see ``iter_windows``."""
    return list(iter_windows(path))


REJUDGED = ("rules", "consecutive", "halt_on_error", "warmup", "floor_tokens")  # what the breaker looks at


def changed_config(config: ParityConfig, given: Sequence[str]) -> ParityConfig:
    """``config`` with ``name=value`` laid over it, e.g. ``consecutive=2`` or ``rules.kl_k3.k=8``; values are YAML.

    Raises ConfigError for what is no setting, and for one that changes what is measured: that can't be judged again.
    """
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
    changed = ParityConfig.from_mapping(values, where="--set")
    for name, _ in assignments(given, ""):
        if (setting := name.split(".")[0]) not in REJUDGED:
            raise ConfigError(
                f"--set {setting}: what was recorded was measured with {setting}={getattr(config, setting)!r}, and "
                f"can't be judged again as if it had been another. Expected one of: {', '.join(REJUDGED)}."
            )
    return changed


def has_floor(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any window was judged over a noise floor; usually the first one tells."""
    return any(row.get("floor/kl_k3") is not None for row in rows)


def rejudge(
    rows: Iterable[Mapping[str, Any]], config: ParityConfig, *, floored: bool | None = None
) -> Iterator[Judgement]:
    """Judge every window in order. ``floored``: ``has_floor``, where ``rows`` can be read only once."""
    breaker = Breaker.from_config(config)
    if floored is None:
        rows = list(rows)
        floored = has_floor(rows)
    # a run that never had a noise floor was judged by absolute limits, and is again
    breaker.expects_floor &= floored
    for row in rows:
        verdict = breaker.judge(int(row["step"]), _stats(row), error="as recorded")
        yield Judgement(row, verdict)


def _stats(row: Mapping[str, Any]) -> MismatchStats:
    def count(name: str, usual: int = 0) -> int:
        return int(as_number(row.get(name)) or 0) if name in row else usual

    return MismatchStats(
        count("num_tokens"),
        count("num_sequences"),
        count("num_batches"),
        count("num_errors", int(row["status"] == Status.ERROR)),
        {name: as_number(row.get(name)) for name in SCALARS},
    )
