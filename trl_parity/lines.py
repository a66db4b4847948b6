"""Lines and bars for people on stderr: each line says who speaks, and none is glued to a progress bar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["LastResort", "about", "progress_bar", "say"]

_WHO = "trl-parity"


def say(text: str) -> None:
    """Write lines to stderr, above the bars that tqdm draws there. They begin with who speaks."""
    if not text.lstrip().startswith(_WHO):
        text = f"{_WHO}: {text}"
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # who draws a bar has imported it
    if tqdm is None:
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.write(text, file=sys.stderr)


class LastResort(logging.Handler):
    """Says this package's warnings where nobody has set up logging; its own last resort would not say who speaks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, unless somebody else takes it."""
        loggers = (logging.getLogger(), logging.getLogger(__package__))
        if not any(handler is not self for logger in loggers for handler in logger.handlers):
            with suppress(Exception):  # nobody is there to be told, as where stderr is gone
                say(self.format(record))


def about(seconds: float) -> str:
    """``about 40 s left``, ``about 3 min left``."""
    return f"about {10 * max(1, round(seconds / 10))} s left" if seconds < 95 else f"about {seconds / 60:.0f} min left"


_PATIENCE = 30.0  # seconds between two lines about the same


class _Lines:
    """Progress as lines."""

    def __init__(self, what: str):
        self._what, self._told = "", -_PATIENCE
        self(0, 0, what)

    def __call__(self, done: int, total: int, what: str = "", more: str = "") -> None:
        what, now = what or self._what, time.monotonic()
        if what == self._what and now - self._told < _PATIENCE:
            return
        self._what, self._told = what, now
        say(" ".join([what, *([f"{done}/{total}"] if total else []), *([more] if more else [])]))


@contextmanager
def progress_bar(
    what: str, *, shown: bool = True, counted: bool = True, kept: bool = False, logged: bool = False
) -> Iterator[Callable[..., None]]:
    """Yields ``update(done, total, what, more)``, the last two optional; it draws nothing where stderr is no terminal.

    ``counted``: as ``3/10``, else in per cent. ``kept``: the bar stays when it is over. ``logged``: where stderr is no
    terminal, a line when ``what`` changes, and every 30 s.
    """
    if shown and logged and not sys.stderr.isatty():
        yield _Lines(what)
        return
    if not shown or not sys.stderr.isatty():
        yield lambda *_, **__: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    amount = MofNCompleteColumn() if counted else TaskProgressColumn()
    words, more = TextColumn("{task.description}"), TextColumn("{task.fields[more]}")
    columns = (words, BarColumn(), amount, TimeElapsedColumn(), more)
    with Progress(*columns, console=Console(stderr=True), transient=not kept) as bar:
        task = bar.add_task(what, total=None, more="")

        def update(done: int, total: int, what: str = what, more: str = "") -> None:
            bar.update(task, completed=done, total=total or None, description=what, more=more)

        yield update
