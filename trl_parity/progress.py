"""A bar on stderr for what takes long, where somebody may look at it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    what: str, *, shown: bool = True, counted: bool = True, kept: bool = False
) -> Iterator[Callable[..., None]]:
    """Yields ``update(done, total, what, more)``, the last two optional; it draws nothing where stderr is no terminal.

    ``counted``: as ``3/10``, else in per cent. ``kept``: the bar stays when it is over.
    """
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
