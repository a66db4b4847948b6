"""Files that are whole or not there, the folder one process writes at a time, and what is read within bounds.

A folder that came from somebody else may hold anything. Nothing here writes through a symbolic link, and what is read
is regular, of so many bytes, so deep, of so many values: what is out of bounds is a ValueError, what can't be opened
an OSError; neither waits, and neither takes memory first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ConfigError, ParityError

__all__ = [
    "DEEPEST",
    "MOST_BYTES",
    "NUMBER",
    "FolderLock",
    "bounded_lines",
    "check_version",
    "jsonable",
    "open_log",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_versioned",
    "require_bounded",
    "require_kinds",
    "require_no_link",
    "sweep",
    "write_atomic",
]

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 26  # of a file that is read whole

MOST_VALUES, DEEPEST = 1_000_000, 64  # in it, and lists and mappings within each other

NUMBER = object()  # a kind: a number, a non-finite one as a string, or null

_NONFINITE = ("nan", "inf", "-inf")

_TEMPORARY = re.compile(r"\..+\.(?:[0-9a-f]{12,16}|[0-9]+)\.tmp")  # those of ours, in this version and before


def write_atomic(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Write under a temporary name in the same folder (made if need be), then rename. Raises ConfigError.

    ``private``: for this user's eyes alone, else as the umask says. A link of that name is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb", opener=_private if private else None) as file:  # x: never what is there
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())  # else a power loss may leave the new name with nothing in it
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}. Expected a file name in a writable directory.") from e


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def open_log(path: Path, mode: str = "ab", *, buffering: int = -1, private: bool = False) -> BinaryIO:
    """A file that is gone on with: a regular one, and no link. ``private``: when made, for this user alone.

    Raises OSError for anything else, without waiting for it.
    """

    def opener(name: str, flags: int) -> int:
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(name, flags, 0o600 if private else 0o666)
        except OSError as e:
            if e.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file")
        return descriptor

    file: Any = open(path, mode, buffering=buffering, opener=opener)  # noqa: SIM115 - for who asked
    return file


def require_no_link(folder: Path) -> None:
    """Raise ConfigError for a folder of ours that is a link to another place."""
    if folder.is_symlink():
        raise ConfigError(
            f"{folder} is a symbolic link, and what it points to is not written. Expected a folder; remove the link, "
            "or set parity_dir to where files should go."
        )


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left. Call it with the folder's lock."""
    with contextlib.suppress(OSError):
        for left in os.scandir(folder):
            if _TEMPORARY.fullmatch(left.name):
                if left.is_dir(follow_symlinks=False):
                    shutil.rmtree(left.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(left.path)


class FolderLock:
    """A folder (made if need be) that this process alone writes, until ``release`` or its end.

    The lock is ``flock``'s, on the file ``.lock``, which says who holds it: a killed process's is gone with it. The
    same process gets it again, as after a run that ended in an exception. Over NFS, Linux has the server keep it;
    where a file system has no such locks, that is a warning, and nothing is locked.

    Raises:
        ConfigError: another process holds it, or the folder can't be written.
    """

    def __init__(self, folder: Path):
        self._descriptor: int | None = None
        path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open_log(path, "a+b", buffering=0) as file:
                self._key = (os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino)
                if (own := _held.get(self._key)) is not None:
                    self._descriptor, own._descriptor = own._descriptor, None
                elif (refused := _flock(file.fileno(), path)) is None:
                    self._descriptor = os.dup(file.fileno())
                    os.ftruncate(self._descriptor, 0)
                    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode() + b"\n")
                elif refused:
                    file.seek(0)
                    raise ConfigError(
                        f"{folder} is in use by {_holder(file.read(4096))}, and two would mix their windows. Expected "
                        "one process a folder: wait for that one, end it, or set another output_dir or parity_dir."
                    )
        except OSError as e:
            raise ConfigError(
                f"cannot write {path}: {e.strerror}. Expected a writable directory; set parity_dir or output_dir."
            ) from e
        if self._descriptor is not None:
            _held[self._key] = self

    def release(self) -> None:
        """Let others write. Idempotent."""
        if self._descriptor is not None:
            del _held[self._key]
            os.close(self._descriptor)
            self._descriptor = None


_held: dict[tuple[int, int], FolderLock] = {}  # by device and inode


def _forget() -> None:
    """In a child that was forked: the lock is its parent's, and must not outlive it."""
    for lock in _held.values():
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _flock(descriptor: int, path: Path) -> bool | None:
    """None: locked. True: somebody else has. False: there are no locks here."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError) as e:
        logger.warning("%s can't be locked (%s): see to it that one process writes there.", path.parent, e)
        return False
    return None


def _holder(content: bytes) -> str:
    try:
        told = json.loads(content)
        return f"process {int(told['pid'])} on {str(told['host'])[:100]}"
    except (ValueError, TypeError, KeyError):
        return "another process"


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


def bounded_lines(file: BinaryIO, longest: int) -> Iterator[bytes]:
    """Lines with their ends, one at a time. Raises ValueError for one of more than ``longest`` bytes."""
    while line := file.readline(longest + 1):
        if len(line) > longest:
            raise ValueError(f"more than {longest:,} bytes")
        yield line


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


def read_versioned(
    path: Path,
    readable: tuple[int, ...],
    kinds: Mapping[str, Any],
    *,
    expected: str,
    remedy: str,
    damaged: type[ParityError] = ConfigError,
    largest: int = MOST_BYTES,
    within: bool = False,
) -> dict[str, Any]:
    """The JSON object in a file, of a version that can be read, with everything in it that is needed.

    A regular file, and what is in it is bounded (``checked``).

    Args:
        path: The file.
        readable: Versions that can be read; none: the file has no ``schema_version``.
        kinds: Its needed keys and the types of their values, as ``checked.require_kinds`` takes them.
        expected: What it should be, and ``remedy`` what to do, for the errors.
        remedy: See ``expected``.
        damaged: What is raised for a file that is none of these; for one that can't be read, or is of another
            version, it is ConfigError.
        largest: Bytes it may have.
        within: Whether a link to what lies outside its folder is refused.
    """
    try:
        raw = read_bytes(path, largest, within=within)
    except ValueError as e:
        raise damaged(f"{path} has {e}. Expected {expected}; {remedy}.") from e
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}. Expected {expected}; {remedy}.") from e
    try:
        content = parse_json(raw)
    except ValueError as e:  # broken JSON or UTF-8, or out of bounds
        raise damaged(f"{path} is not valid JSON ({e}). Expected {expected}; {remedy}.") from e
    if not isinstance(content, dict):
        raise damaged(f"{path} holds a {type(content).__name__}. Expected a mapping, {expected}; {remedy}.")
    if readable:
        check_version(path, content.get("schema_version"), readable)
    try:
        require_kinds(content, kinds)
    except ValueError as e:
        raise damaged(f"{path} has {e}. Expected {expected}; {remedy}.") from e
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
