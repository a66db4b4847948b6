"""Files that may hold anything, read within bounds: regular ones, of so many bytes, so deep, of so many values.

What is out of bounds is a ValueError, what can't be opened an OSError; neither waits, and neither takes memory first.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "DEEPEST",
    "MOST_BYTES",
    "NUMBER",
    "open_regular",
    "parse_json",
    "read_bytes",
    "require_bounded",
    "require_kinds",
]

MOST_BYTES = 1 << 26  # of a file that is read whole

MOST_VALUES, DEEPEST = 1_000_000, 64  # in it, and lists and mappings within each other

NUMBER = object()  # a kind: a number, a non-finite one as a string, or null

_NONFINITE = ("nan", "inf", "-inf")


def open_regular(path: Path, *, within: bool = False) -> BinaryIO:
    """Open a regular file to read. ``within``: and no link to what lies outside its folder. Raises OSError."""
    if within and path.is_symlink():
        home = os.path.realpath(path.parent)
        if os.path.commonpath([home, os.path.realpath(path)]) != home:
            raise OSError(errno.ELOOP, "it is a link out of its folder")

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe nobody writes to is not waited for
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file")
        return descriptor

    file: Any = open(path, "rb", opener=opener)  # noqa: SIM115 - for who asked
    return file


def read_bytes(path: Path, largest: int = MOST_BYTES, *, within: bool = False) -> bytes:
    """All of a regular file of at most ``largest`` bytes."""
    with open_regular(path, within=within) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= largest:
            content = file.read(largest + 1)
            size = len(content)  # it may have grown
    if size > largest:
        raise ValueError(f"{size} bytes")
    return content


def parse_json(content: bytes) -> Any:
    """What a JSON text says, within bounds. Raises ValueError."""
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:  # before any of it is made
        raise ValueError(f"more than {MOST_VALUES:,} values")
    try:
        value = json.loads(content)
    except RecursionError as e:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from e
    require_bounded(value)
    return value


def require_bounded(value: Any, most: int = MOST_VALUES, deepest: int = DEEPEST) -> None:
    """Raise ValueError for too many values, each alias counted where it stands, too deep, or a number out of range."""
    seen, waiting = 1, [(value, "", 0)]
    while waiting:
        value, where, depth = waiting.pop()
        named = isinstance(value, dict)
        if not named and not isinstance(value, list):
            _require_range(value, where or "it")
            continue
        if depth >= deepest:
            raise ValueError(f"{where[:80]} is nested more than {deepest} deep")
        seen += len(value)
        if seen > most:
            raise ValueError(f"more than {most:,} values")
        for key, inner in value.items() if named else enumerate(value):
            if isinstance(inner, dict | list | int):
                at = f"{where}.{str(key)[:40]}".lstrip(".") if named else f"{where}[{key}]"
                if isinstance(inner, int):
                    _require_range(inner, at)
                else:
                    waiting.append((inner, at, depth + 1))


def _require_range(value: Any, where: str) -> None:
    if isinstance(value, int) and value.bit_length() > 63:
        digits = int(value.bit_length() * 0.30103)
        raise ValueError(f"{where[:80]} is a number of about {digits:,} digits")


def require_kinds(value: Any, kind: Any, where: str = "") -> None:
    """Raise ValueError, naming the field, where ``value`` is not of ``kind``.

    ``kind``: a type or a union of types; NUMBER; ``[kind]``: a list of it; a mapping of name to kind, ``name?`` for
    what may be missing. Further names are nobody's business.
    """
    fits: Any = kind
    if isinstance(kind, Mapping):
        fits = dict
    elif isinstance(kind, list):
        fits = list
    elif kind is NUMBER:
        fits = int | float | None
    wrong = not isinstance(value, fits) or (isinstance(value, bool) and fits in (int, int | float | None))
    if wrong and not (kind is NUMBER and value in _NONFINITE):
        raise ValueError(f"{where or 'it'} as {type(value).__name__}")
    if isinstance(kind, list):
        for i, one in enumerate(value):
            require_kinds(one, kind[0], f"{where}[{i}]")
    for name, inner in kind.items() if isinstance(kind, Mapping) else ():
        key = name.removesuffix("?")
        at = f"{where}.{key}" if where else key
        if key in value:
            require_kinds(value[key], inner, at)
        elif key == name:
            raise ValueError(f"no {at}")
