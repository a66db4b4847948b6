"""Where a run keeps its files, and their names."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CONFIG_NAME", "RUN_NAME", "TOKENS_NAME", "is_run", "metrics_path"]

CONFIG_NAME, RUN_NAME, TOKENS_NAME = "config.json", "run.json", "tokens"


def metrics_path(path: str | Path) -> Path:
    """``metrics.jsonl`` itself, or in the folder, or in the run's ``parity`` folder."""
    path = Path(path)
    if path.is_dir():
        return next((p for p in (path / "metrics.jsonl", path / "parity" / "metrics.jsonl") if p.exists()), path)
    return path


def is_run(path: str | Path) -> bool:
    """Whether there is a ``metrics.jsonl`` in it."""
    return metrics_path(path).is_file()
