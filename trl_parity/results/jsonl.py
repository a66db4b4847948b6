"""``metrics.jsonl`` and ``tokens.jsonl``: one JSON object a window, written whole; goes on after a resume."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError
from ..files import open_log
from ..verdict import Verdict

__all__ = ["SCHEMA_VERSION", "JsonlSink"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2

TOKENS_SCHEMA_VERSION = 1

_BLOCK = 1 << 16  # bytes read or copied at once

_LONGEST_LINE = 1 << 26  # bytes; no window's: something foreign

_encode = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make an encoder for each line


_sync = getattr(os, "fdatasync", os.fsync)  # macOS has the latter alone


class JsonlSink:
    """``<name>.jsonl``: one JSON object per window, each written whole in one call: a kill tears one at most.

    ``resume_step=0`` starts a new file and keeps an old one as ``<name>-<n>.jsonl``. ``resume_step > 0`` goes on
    after the windows up to that step; later ones, which the resumed run measures again, and a torn last line move
    to ``<name>.superseded.jsonl``. The file is read from its end, and cut in place: time and memory don't grow with
    it. A link, or what is no regular file, is refused.

    What is written is brought to the disk behind the caller's back, so that a power loss takes the last window at
    most, or those since the last that reached the disk where that takes longer than a window.
    """

    def __init__(self, directory: str | Path, resume_step: int = 0, name: str = "metrics"):
        self.path = Path(directory) / f"{name}.jsonl"
        self._failed = False
        self._disk = ThreadPoolExecutor(1, "trl-parity-disk")
        self._syncing: Future[None] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size:
                self._take_over(resume_step)
            self._file = open_log(self.path, buffering=0)
        except OSError as e:
            raise ConfigError(
                f"cannot write {self.path}: {e.strerror}. Expected a writable directory; set parity_dir or output_dir."
            ) from e

    def _take_over(self, resume_step: int) -> None:
        if resume_step == 0:
            n = 1
            while (kept := self.path.with_name(f"{self.path.stem}-{n}.jsonl")).exists():
                n += 1
            os.replace(self.path, kept)
            logger.info("an earlier run's %s is kept as %s", self.path, kept.name)
            return
        with open_log(self.path, "r+b") as file:
            cut = _end_of_kept(file, resume_step)
            file.seek(cut)
            if not file.read(1):
                return
            # copied before it is cut: a kill in between leaves later windows twice, and loses none
            with open_log(self.path.with_name(f"{self.path.stem}.superseded.jsonl")) as superseded:
                file.seek(cut)
                shutil.copyfileobj(file, superseded, _BLOCK)
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    superseded.write(b"\n")
                superseded.flush()
                os.fsync(superseded.fileno())
            file.truncate(cut)

    def write(self, verdict: Verdict) -> None:
        """Append one window."""
        self.append({"schema_version": SCHEMA_VERSION, **verdict.to_dict()})

    def write_tokens(self, verdict: Verdict, sample: Sequence[Mapping[str, Any]]) -> None:
        """Append a window's sample of tokens, as columns of five significant digits."""
        columns = {
            name: [float(f"{x:.5g}") if (x := row[name]) is not None and math.isfinite(x) else None for row in sample]
            for name in ("position", "rollout_logprob", "trainer_logprob", "entropy")
        }
        self.append(
            {"schema_version": TOKENS_SCHEMA_VERSION, "step": verdict.step, "status": str(verdict.status), **columns}
        )

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one object. A failure (disk full, say) warns once; later ones are still tried."""
        line = _encode(record).encode() + b"\n"
        try:
            # after a failure a torn line may stand at the end: begin on a fresh one
            line = b"\n" + line if self._failed else line
            if self._file.write(line) != len(line):
                raise OSError("short write")
        except OSError as e:
            if not self._failed:
                logger.warning("cannot write %s: %s. Training goes on; windows may be missing there.", self.path, e)
            self._failed = True
        else:
            self._failed = False
            if self._syncing is None or self._syncing.done():  # one that runs on may miss this line, the next does not
                self._syncing = self._disk.submit(_sync, self._file.fileno())

    def close(self) -> None:
        """Close the file, all of it on the disk."""
        self._disk.shutdown()
        if not self._file.closed:
            with suppress(OSError):
                _sync(self._file.fileno())
        self._file.close()


def _end_of_kept(file: BinaryIO, resume_step: int) -> int:
    """Bytes up to the end of the last line of a step <= ``resume_step``, sought from the file's end.

    Steps ascend in a file: each resume takes away those it begins anew. So only what is moved is read.
    """
    end = file.seek(0, os.SEEK_END)
    while end and not _step_of(file, start := _start_of_line(file, end), end) <= resume_step:
        end = start
    return end


def _start_of_line(file: BinaryIO, end: int) -> int:
    """Where the line that ends at ``end`` (its newline included) begins."""
    before = end - 1
    while before > 0:
        size = min(_BLOCK, before)
        file.seek(before - size)
        found = file.read(size).rfind(b"\n")
        if found >= 0:
            return before - size + found + 1
        before -= size
    return 0


def _step_of(file: BinaryIO, start: int, end: int) -> float:
    """The step of a whole line; infinity for a torn or foreign one."""
    if end - start > _LONGEST_LINE:
        return math.inf
    file.seek(start)
    line = file.read(end - start)
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
