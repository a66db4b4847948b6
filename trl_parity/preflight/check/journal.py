"""What a check has found so far, one JSON line a finding, so that a killed one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files import FolderLock, check_version, open_log, sweep, write_atomic

__all__ = ["SCHEMA_VERSION", "Journal"]

SCHEMA_VERSION = 1


class Journal:
    """``trials.jsonl`` of a folder, or nothing but memory without one.

    Its first line holds the settings; a folder of a check with other settings is refused. A line that was cut off
    when the check was killed is dropped.
    """

    def __init__(self, directory: Path | None, settings: Mapping[str, Any]):
        self.path = None if directory is None else directory / "trials.jsonl"
        self._found: dict[str, dict[str, Any]] = {}
        self.resumed = 0
        head = {"schema_version": SCHEMA_VERSION, "settings": json.loads(json.dumps(settings, default=str))}
        if self.path is None:
            return
        try:
            self._lock = FolderLock(self.path.parent)
            sweep(self.path.parent)
            with open_log(self.path, "a+b", private=True) as file:
                file.seek(0)
                lines = file.read().splitlines(keepends=True)
        except OSError as e:
            raise ConfigError(f"cannot use {self.path}: {e.strerror}. Expected a folder that can be written.") from e
        whole = [line for line in lines if line.endswith(b"\n")]
        found = [self._parsed(line, number) for number, line in enumerate(whole, 1)]
        if found:
            self._same(found[0], head)
            if not any(line.get("kind") == "end" for line in found):
                self._found = {line["kind"]: line for line in found[1:]}
                self.resumed = len(self._found)
        if self.resumed:
            if len(whole) < len(lines):
                write_atomic(self.path, b"".join(whole), private=True)
        else:
            write_atomic(self.path, json.dumps(head) + "\n", private=True)

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
            if not isinstance(value, dict) or ("kind" not in value and number > 1):
                raise ValueError("no finding of a check")
            return value
        except ValueError as e:
            raise ConfigError(f"{self.path}, line {number}: {e}. Remove the file to start over.") from e

    def _same(self, seen: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        assert self.path is not None
        remedy = "give another --output, or remove the file"
        check_version(self.path, seen.get("schema_version"), (SCHEMA_VERSION,), remedy=remedy)
        if not isinstance(seen.get("settings"), dict):
            raise ConfigError(f"{self.path} has no settings in its first line. Expected those of a check; {remedy}.")
        before, now = seen["settings"], head["settings"]
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if changed:
            listed = "; ".join(f"{k}: {_short(before.get(k))} there, {_short(now.get(k))} now" for k in changed)
            raise ConfigError(
                f"{self.path} belongs to a check with other settings ({listed}). Give another --output, the same "
                "settings, or remove the file."
            )

    def get(self, kind: str) -> dict[str, Any] | None:
        """An earlier finding of this kind."""
        return self._found.get(kind)

    def put(self, kind: str, **finding: Any) -> dict[str, Any]:
        """Keep a finding; on the disk when this returns."""
        line = {"kind": kind, **finding}
        self._found[kind] = line
        if self.path is not None:
            with open_log(self.path, private=True) as file:
                file.write(json.dumps(line).encode() + b"\n")
        return line


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
