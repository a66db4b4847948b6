"""Files that are whole or not there, and the JSON in them: written strictly, read by version."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError, ParityError

__all__ = ["check_version", "jsonable", "read_versioned", "write_atomic"]


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write under a temporary name in the same folder (made if need be), then rename. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}. Expected a file name in a writable directory.") from e


def read_versioned(
    path: Path,
    readable: tuple[int, ...],
    kinds: Mapping[str, Any],
    *,
    expected: str,
    remedy: str,
    damaged: type[ParityError] = ConfigError,
    largest: int | None = None,
) -> dict[str, Any]:
    """The JSON object in a file, of a version that can be read, with everything in it that is needed.

    Args:
        path: The file.
        readable: Versions that can be read; none: the file has no ``schema_version``.
        kinds: Its needed keys and the types of their values.
        expected: What it should be, and ``remedy`` what to do, for the errors.
        remedy: See ``expected``.
        damaged: What is raised for a file that is none of these; for one that can't be read, or is of another
            version, it is ConfigError.
        largest: Bytes it may have.
    """
    try:
        if largest is not None and (size := path.stat().st_size) > largest:
            raise damaged(f"{path} has {size:,} bytes. Expected {expected}; {remedy}.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}. Expected {expected}; {remedy}.") from e
    except (ValueError, RecursionError) as e:  # broken JSON or UTF-8
        raise damaged(f"{path} is not valid JSON ({e}). Expected {expected}; {remedy}.") from e
    if not isinstance(content, dict):
        raise damaged(f"{path} holds a {type(content).__name__}. Expected a mapping, {expected}; {remedy}.")
    if readable:
        check_version(path, content.get("schema_version"), readable)
    for name, kind in kinds.items():
        value = content.get(name)
        if name not in content or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            seen = f"{name} as {type(value).__name__}" if name in content else f"no {name}"
            raise damaged(f"{path} has {seen}. Expected {expected}; {remedy}.")
    return content


def check_version(
    path: Path, version: Any, readable: tuple[int, ...], error: type[ParityError] = ConfigError, remedy: str = ""
) -> None:
    """Raise ``error`` for a schema version that can't be read."""
    whole = isinstance(version, int) and not isinstance(version, bool)
    if whole and version in readable:
        return
    wanted = str(readable[0]) if len(readable) == 1 else f"one of {readable}"
    if not remedy:
        newer = whole and version > max(readable)
        remedy = "read it with the trl-parity that wrote it" + (", or update this one" if newer else "")
    raise error(f"{path} has schema_version {version!r}. Expected {wanted}: {remedy}.")


def jsonable(value: Any) -> Any:
    """As strict JSON takes it: non-finite numbers and what JSON has no form for become strings."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):  # of numpy and torch
        return jsonable(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return int(value) if isinstance(value, int) else str(value)
