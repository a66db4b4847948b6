"""``trl-parity watch``: a run's windows in the terminal, while it runs. Needs no torch."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .breaker import read
from .config import ParityConfig
from .replay import metrics_path, recorded_config, window_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Tail", "line_of", "render", "watch"]

_KEEP = 400  # windows held in memory
_SPARK = 40
_BLOCKS = "▁▂▃▄▅▆▇█"
_STYLES = {"OK": "green", "WARN": "yellow", "BREACH": "red", "HALT": "bold white on red", "ERROR": "magenta"}
# shown with the rule on it, then without
_JUDGED = ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99", "ratio/out_of_band", "ess", "honesty_gap")
_PLAIN = ("entropy/trainer", "entropy/drift", "reward/mean", "policy_drift/kl_k3", "cost/share", "cost/floor_share")


class Tail:
    """New windows of a ``metrics.jsonl`` that is being written.

    Copes with a file that is not there yet, a line half written, and a file replaced or cut by a restart.
    """

    def __init__(self, path: Path):
        self.path = path
        self.restarts = 0
        self._inode: int | None = None
        self._offset = 0
        self._partial = b""

    def poll(self) -> list[dict[str, Any]]:
        """Windows written since the last call. After a restart, all of the new file (``restarts`` went up)."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if self._inode is not None and (status.st_ino != self._inode or status.st_size < self._offset):
                    self.restarts += 1
                    self._offset, self._partial = 0, b""
                self._inode = status.st_ino
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [row for line in lines if (row := window_of(line)) is not None]


def watch(target: str, console: Console, *, every: float = 1.0, once: bool = False) -> Iterator[None]:
    """Draw the run again and again; one step of the iterator is one look at the file.

    On a terminal the picture is redrawn in place; elsewhere each new window is one line.
    """
    from rich.live import Live

    tail = Tail(metrics_path(target))
    rows: deque[dict[str, Any]] = deque(maxlen=_KEEP)
    config: ParityConfig | None = None
    restarts, seen = 0, time.time()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not once else None
    try:
        if live is not None:
            live.start()
        while True:
            if not tail.path.is_file():  # the folder may have come meanwhile
                tail.path = metrics_path(target)
            new = tail.poll()
            if tail.restarts > restarts:
                restarts = tail.restarts
                rows.clear()
                config = None
            if new:
                seen = time.time()
                rows.extend(new)
                config = config or recorded_config(tail.path)
            if live is not None:
                live.update(
                    render(tail.path, rows, config or ParityConfig(), time.time() - seen, console.width), refresh=True
                )
            elif once:
                console.print(render(tail.path, rows, config or ParityConfig(), None, console.width))
                return
            else:
                for row in new:
                    console.print(line_of(row), highlight=False, soft_wrap=True, markup=False)
            yield
            time.sleep(every)
    finally:
        if live is not None:
            live.stop()


def line_of(row: dict[str, Any]) -> str:
    """One window as one line, for logs."""
    parts = [f"step {row['step']}", f"{row['status']}" + (f" {row['streak']}" if row.get("streak") else "")]
    parts += [f"{name} {_figure(row[name])}" for name in ("kl_k3", "floor/kl_k3", "entropy/trainer", "reward/mean")
              if row.get(name) is not None]  # fmt: skip
    return "  ".join([*parts, row.get("reason") or ""]).rstrip()


def render(
    path: Path, rows: Sequence[dict[str, Any]], config: ParityConfig, age: float | None, width: int = 100
) -> RenderableType:
    """The whole picture: status line, statistics with their limits, the last windows that were not OK."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return Text(f"waiting for the first window in {path}")
    last = rows[-1]
    status = last["status"]
    head = Text.assemble(
        (f" {status} ", _STYLES.get(status, "cyan")), f"  step {last['step']}  streak {last.get('streak', 0)}",
        f" of {config.consecutive}  {len(rows)} windows" + ("+" if len(rows) == _KEEP else ""),
        "" if age is None else f"  last one {age:.0f} s ago",
    )  # fmt: skip
    spark = max(8, min(_SPARK, width - 70, len(rows)))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("statistic", "left"), ("now", "right"), ("floor", "right"), ("of its limit", "right"),
                          ("worst", "right"), (f"last {spark} windows", "left")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    rules = {rule.stat: rule for rule in config.resolved_rules()}
    for stat in _JUDGED + _PLAIN:
        values = [_number(row.get(stat)) for row in rows]
        known = [value for value in values if value is not None]
        if not known:
            continue
        reading = read(rules[stat], {k: _number(v) for k, v in last.items()}) if stat in rules else None
        share = None if reading is None or not reading.limit else max(0.0, reading.value / reading.limit)
        table.add_row(
            stat, _figure(values[-1]), _figure(_number(last.get(f"floor/{stat}"))),
            Text("-") if share is None else Text(f"{share:.0%}", style=_share_style(share)),
            _figure(min(known) if stat == "ess" else max(known)), sparkline(values[-spark:]),
        )  # fmt: skip
    events = [row for row in rows if row["status"] not in ("OK", "CALIBRATING")][-5:]
    lines = [Text.assemble((f"{row['status']:<7}", _STYLES.get(row["status"], "cyan")), f" step {row['step']}: ",
                           row.get("reason") or "", overflow="ellipsis", no_wrap=True) for row in events]  # fmt: skip
    return Group(head, Text(str(path), style="dim"), Text(), table, *([Text(), *lines] if lines else []))


def sparkline(values: Sequence[float | None]) -> str:
    """Blocks between the smallest and the largest value, on a log scale where they span a decade; gaps stay blank."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return ""
    logarithmic = min(known) > 0 and max(known) > 10 * min(known)

    def scaled(v: float) -> float:
        return math.log(v) if logarithmic else v

    low, high = scaled(min(known)), scaled(max(known))
    span = (high - low) or 1.0
    return "".join(
        " " if v is None
        else _BLOCKS[-1] if not math.isfinite(v)
        else _BLOCKS[round((scaled(v) - low) / span * (len(_BLOCKS) - 1))]
        for v in values
    )  # fmt: skip


def _share_style(share: float) -> str:
    return "red" if share > 1 else "yellow" if share > 0.5 else "green"


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _figure(value: Any) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:.3g}"
