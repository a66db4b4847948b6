"""Judge a finished run again, with other rules and the very same breaker. Needs no torch, no model and no GPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .breaker import Breaker
from .config import ParityConfig
from .errors import ConfigError, DataError
from .records import MismatchStats, Status, Verdict
from .scalars import SCALARS

__all__ = ["CONFIG_NAME", "Judgement", "changed_config", "read_windows", "recorded_config", "replay"]

CONFIG_NAME = "config.json"
_READABLE = (1, 2)  # schema versions of metrics.jsonl


class Judgement(NamedTuple):
    """One window, as it was judged and as it is judged now."""

    row: Mapping[str, Any]
    verdict: Verdict


def read_windows(path: str | Path) -> list[dict[str, Any]]:
    """The windows of a ``metrics.jsonl`` (or of the run folder that holds it), oldest first.

    A line torn by a kill is passed over. Raises DataError for a missing or empty file and an unknown schema version.
    """
    path = metrics_path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}. Expected a run's metrics.jsonl or its folder.") from e
    rows = []
    for line in lines:
        if (row := window_of(line)) is None:
            continue
        if row.get("schema_version") not in _READABLE:
            raise DataError(
                f"{path} has schema_version {row.get('schema_version')!r}. Expected one of {_READABLE}: read it with "
                "the trl-parity that wrote it."
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no window. Expected one JSON object a line, as ParityCallback writes them.")
    return rows


def window_of(line: bytes) -> dict[str, Any] | None:
    """The window in a line of ``metrics.jsonl``; None for a torn or foreign one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row and "status" in row else None


def metrics_path(path: str | Path) -> Path:
    """``metrics.jsonl`` itself, or in the folder, or in the run's ``parity`` folder."""
    path = Path(path)
    if path.is_dir():
        return next((p for p in (path / "metrics.jsonl", path / "parity" / "metrics.jsonl") if p.exists()), path)
    return path


def recorded_config(path: str | Path) -> ParityConfig | None:
    """The settings the run was made with, kept beside its windows; None where they are not."""
    file = metrics_path(path).with_name(CONFIG_NAME)
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"{file} is not valid JSON: {e}. Give the settings with --config.") from e
    return ParityConfig.from_mapping(values, where=str(file))


def changed_config(config: ParityConfig, assignments: Sequence[str]) -> ParityConfig:
    """``config`` with ``name=value`` laid over it, e.g. ``consecutive=2`` or ``rules.kl_k3.k=8``; values are YAML."""
    import yaml

    values = config.to_dict()
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {assignment!r}. Expected name=value, e.g. consecutive=2 or rules.kl_k3.k=8.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"--set {assignment!r}: the value is not valid YAML ({e}).") from e
        # "1e-3" is a number to people, and text to YAML
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        target = values
        for key in keys[:-1]:
            inner = target.get(key)
            if inner is not None and not isinstance(inner, dict):
                inner = {"limit": inner}  # a rule given as a bare limit
            target[key] = dict(inner or {})
            target = target[key]
        target[keys[-1]] = value
    return ParityConfig.from_mapping(values, where="--set")


def replay(rows: Sequence[Mapping[str, Any]], config: ParityConfig) -> Iterator[Judgement]:
    """Judge every window in order."""
    breaker = Breaker.from_config(config)
    # a run that never had a noise floor was judged by absolute limits, and is again
    breaker.expects_floor &= any(row.get("floor/kl_k3") is not None for row in rows)
    for row in rows:
        verdict = breaker.judge(int(row["step"]), _stats(row), error="as recorded")
        yield Judgement(row, verdict)


def _stats(row: Mapping[str, Any]) -> MismatchStats:
    values = {name: None if row.get(name) is None else float(row[name]) for name in SCALARS}
    errors = int(row.get("num_errors", row["status"] == Status.ERROR))
    return MismatchStats(
        int(row.get("num_tokens", 0)),
        int(row.get("num_sequences", 0)),
        int(row.get("num_batches", 0)),
        errors,
        values,
    )
