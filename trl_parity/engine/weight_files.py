"""The files that weights go through: where they lie, what they are called, and which of them a server opens.

Needs neither torch nor vLLM.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PLACE", "Folder", "opened", "place"]

PLACE = "TRL_PARITY_WEIGHTS_DIR"

_PREFIX = "trl-parity-weights-"

_FOLDER, _FILE = re.compile(_PREFIX + "[0-9a-zA-Z_]{8}"), re.compile("[0-9a-f]{32}-[0-9]+")

_REFUSED = "no weights of a trainer of this user"  # whatever the reason: an answer tells nothing about files


def place() -> Path:
    """Where folders of weights lie, for both sides."""
    return Path(os.environ.get(PLACE) or tempfile.gettempdir())


def opened(folder: str, file: str) -> int:
    """A descriptor of the file that a request names. Raises PermissionError, in the same words whatever is wrong."""
    try:
        if not (_FOLDER.fullmatch(folder) and _FILE.fullmatch(file)):
            raise PermissionError
        home = os.open(place() / folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:  # without waiting for what is no file
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=home)
            try:
                _require_own(os.fstat(home), os.fstat(descriptor))
                return os.dup(descriptor)
            finally:
                os.close(descriptor)
        finally:
            os.close(home)
    except (OSError, TypeError):
        raise PermissionError(_REFUSED) from None


def _require_own(home: os.stat_result, file: os.stat_result) -> None:
    """A regular file under one name, in a folder that is private to this user."""
    user = os.geteuid()
    private = home.st_uid == user and not home.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if not (private and file.st_uid == user and stat.S_ISREG(file.st_mode) and file.st_nlink == 1):
        raise PermissionError


class Folder:
    """A trainer's folder, its user's alone. A lock holds it as long as its process lives.

    Folders that nobody holds were left by processes that were killed: they go when the next one is made. (Not on a
    file system without such locks, as NFS is for folders.)
    """

    def __init__(self, place: Path):
        for left in place.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):  # another user's, another trainer's, gone meanwhile
                os.close(_held(left, sweep=True))
        while True:
            self.name = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):  # swept before it was held
                lock = _held(Path(self.name))
                break
        self._secret = secrets.token_hex(16)
        self.remove = weakref.finalize(self, _remove, self.name, lock)  # also when Python ends

    @contextlib.contextmanager
    def file(self, number: int) -> Iterator[tuple[Path, dict[str, str]]]:
        """A name for a file, there inside the block at most, and what a request calls it."""
        path = Path(self.name) / f"{self._secret}-{number}"
        try:
            yield path, {"folder": Path(self.name).name, "file": path.name}
        finally:
            path.unlink(missing_ok=True)


def _remove(folder: str, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _held(folder: Path, *, sweep: bool = False) -> int:
    """Hold a folder of this user, or remove it. Raises OSError where somebody else does, or has."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(_REFUSED)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if sweep or isinstance(e, BlockingIOError):
                raise
        if not os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
            raise FileNotFoundError(folder)
        if sweep:
            shutil.rmtree(folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
