"""Files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes | str) -> None:
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
