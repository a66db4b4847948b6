"""Following a run's windows while it writes them. Needs no torch."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.parity import ParityConfig
from ..errors import ParityError
from ..files import open_regular
from ..judging.course import Course
from ..results.paths import metrics_path
from ..results.reader import MAX_LINE, recorded_config, window_of
from .escape import visible
from .format import number
from .terminal import KEPT, dashboard

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Tail", "follow", "line_of"]

_BLOCK, _BEGINNING = 1 << 20, 256  # bytes


class Tail:
    """New windows of a ``metrics.jsonl`` that is being written.

    Copes with a file that is not there yet, a line half written, and a file replaced, cut or written anew by a
    rotation or a restart. Reads in blocks: memory does not grow with the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.restarts = 0
        self._inode: int | None = None
        self._offset = 0
        self._partial = b""
        self._beginning = b""  # of the file: one written anew may have grown past the offset meanwhile

    def poll(self) -> Iterator[dict[str, Any]]:
        """Windows written since the last call. After a restart, all of the new file (``restarts`` went up)."""
        try:
            with open_regular(self.path, within=True) as file:
                status = os.fstat(file.fileno())
                beginning = file.read(_BEGINNING)
                known = min(len(self._beginning), len(beginning))
                if self._inode is not None and (
                    status.st_ino != self._inode
                    or status.st_size < self._offset
                    or beginning[:known] != self._beginning[:known]
                ):
                    self.restarts += 1
                    self._offset, self._partial = 0, b""
                self._inode, self._beginning = status.st_ino, beginning
                file.seek(self._offset)
                while block := file.read(_BLOCK):
                    self._offset += len(block)
                    *lines, self._partial = (self._partial + block).split(b"\n")
                    yield from (row for line in lines if (row := window_of(line)) is not None)
                    if len(self._partial) > MAX_LINE:  # no window: what follows up to its end is none either
                        self._partial = b"x"
        except OSError:
            return


class _Followed:
    """The last windows of a run, and what is known of it."""

    def __init__(self, target: str):
        self._target = target
        self.tail = Tail(metrics_path(target))
        self.rows: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.course = Course()
        self.config: ParityConfig | None = None
        self.seen = time.time()  # when the last window came
        self._restarts = 0

    def look(self) -> Iterator[dict[str, Any]]:
        """Take in what is new. A run begun anew is another one."""
        if not self.tail.path.is_file():  # the folder may have come meanwhile
            self.tail.path = metrics_path(self._target)
        for row in self.tail.poll():
            if self.tail.restarts > self._restarts:
                self._restarts = self.tail.restarts
                self.rows.clear()
                self.course = Course()
                self.config = None
            self.seen = time.time()
            self.rows.append(row)
            self.course.add(row["step"], row["status"])
            yield row
        if self.rows and self.config is None:
            self.config = _config_of(self.tail.path)
            self.course.action = self.config.action


def follow(target: str, console: Console, *, every: float = 1.0, once: bool = False) -> Iterator[None]:
    """Draw the run again and again; one step of the iterator is one look at the file.

    On a terminal the picture is redrawn in place; elsewhere each new window is one line.
    """
    from rich.live import Live

    run = _Followed(target)
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not once else None

    def picture(age: float | None) -> Any:
        config = run.config or ParityConfig()
        return dashboard(run.tail.path, run.rows, config, age, console.width, course=run.course)

    try:
        if live is not None:
            live.start()
        while True:
            for row in run.look():
                if live is None and not once:
                    console.print(line_of(row), highlight=False, soft_wrap=True, markup=False)
            if live is not None:
                live.update(picture(time.time() - run.seen), refresh=True)
            elif once:
                console.print(picture(None))
                return
            yield
            time.sleep(every)
    finally:
        if live is not None:
            live.stop()


def _config_of(path: Path) -> ParityConfig:
    """The run's own settings; the defaults where they are missing, or can't be read."""
    try:
        return recorded_config(path) or ParityConfig()
    except ParityError:  # of another version, say: the windows are worth looking at all the same
        return ParityConfig()


def line_of(row: dict[str, Any]) -> str:
    """One window as one line, for logs."""
    shown = ("kl_k3", "floor/kl_k3", "entropy/trainer", "reward/mean")
    parts = [f"step {row['step']}", f"{row['status']}" + (f" {row['streak']}" if row.get("streak") else "")]
    parts += [f"{name} {number(row[name], '.3g')}" for name in shown if row.get(name) is not None]
    return visible("  ".join([*parts, row.get("reason") or ""]).rstrip())
