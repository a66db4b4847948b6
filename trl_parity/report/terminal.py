"""``trl-parity watch``: a run's windows in the terminal, while it runs. Needs no torch."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.parity import ParityConfig
from ..errors import ParityError
from ..judging.breaker import read
from ..results.paths import metrics_path
from ..results.reader import MAX_LINE, as_number, recorded_config, window_of
from .escape import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from .summary import Case

__all__ = ["Tail", "line_of", "print_case", "render", "watch"]

_KEEP = 400  # windows held in memory

_BLOCK, _BEGINNING = 1 << 20, 256  # bytes

_SPARK = 40

_BLOCKS = "▁▂▃▄▅▆▇█"

_STYLES = {"OK": "green", "WARN": "yellow", "BREACH": "red", "HALT": "bold white on red", "ERROR": "magenta"}

# shown with the rule on it, then without
_JUDGED = ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99", "ratio/out_of_band", "ess", "honesty_gap")

_PLAIN = ("entropy/trainer", "entropy/drift", "reward/mean", "policy_drift/kl_k3", "cost/share", "cost/floor_share")


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
            with open(self.path, "rb") as file:
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
            for row in tail.poll():
                if tail.restarts > restarts:
                    restarts = tail.restarts
                    rows.clear()
                    config = None
                seen = time.time()
                rows.append(row)
                if live is None and not once:
                    console.print(line_of(row), highlight=False, soft_wrap=True, markup=False)
            if rows and config is None:
                config = _config_of(tail.path)
            if live is not None:
                live.update(
                    render(tail.path, rows, config or ParityConfig(), time.time() - seen, console.width), refresh=True
                )
            elif once:
                console.print(render(tail.path, rows, config or ParityConfig(), None, console.width))
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
    parts = [f"step {row['step']}", f"{row['status']}" + (f" {row['streak']}" if row.get("streak") else "")]
    parts += [f"{name} {_figure(row[name])}" for name in ("kl_k3", "floor/kl_k3", "entropy/trainer", "reward/mean")
              if row.get(name) is not None]  # fmt: skip
    return visible("  ".join([*parts, row.get("reason") or ""]).rstrip())


def render(
    path: Path,
    rows: Sequence[dict[str, Any]],
    config: ParityConfig,
    age: float | None,
    width: int = 100,
    *,
    headed: bool = True,
) -> RenderableType:
    """The whole picture: status line (``headed``), statistics with their limits, the last windows that were not OK."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return Text(f"waiting for the first window in {path}")
    last = rows[-1]
    status = last["status"]
    head = Text.assemble(
        (f" {visible(status)} ", _STYLES.get(status, "cyan")),
        f"  step {last['step']}  streak {last.get('streak', 0)}",
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
        values = [as_number(row.get(stat)) for row in rows]
        known = [value for value in values if value is not None]
        if not known:
            continue
        reading = read(rules[stat], {k: as_number(v) for k, v in last.items()}) if stat in rules else None
        share = None if reading is None or not reading.limit else max(0.0, reading.value / reading.limit)
        table.add_row(
            stat, _figure(values[-1]), _figure(as_number(last.get(f"floor/{stat}"))),
            Text("-") if share is None else Text(f"{share:.0%}", style=_share_style(share)),
            _figure(min(known) if stat == "ess" else max(known)), sparkline(values[-spark:]),
        )  # fmt: skip
    events = [row for row in rows if row["status"] not in ("OK", "CALIBRATING")][-5:]
    lines = [
        Text.assemble(
            (f"{visible(row['status']):<7}", _STYLES.get(row["status"], "cyan")),
            f" step {row['step']}: {visible(row.get('reason') or '')}", overflow="ellipsis", no_wrap=True,
        )
        for row in events
    ]  # fmt: skip
    return Group(
        *([head] if headed else []),
        Text(visible(path), style="dim"),
        Text(),
        table,
        *([Text(), *lines] if lines else []),
    )


def sparkline(values: Sequence[float | None], among: Sequence[float | None] | None = None) -> str:
    """Blocks between the smallest and the largest value, on a log scale where they span a decade; gaps stay blank.

    ``among``: the values that set the scale, where several lines share one.
    """
    known = [v for v in (values if among is None else among) if v is not None and math.isfinite(v)]
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


def _figure(value: Any) -> str:
    known = as_number(value)
    return "-" if known is None else f"{known:.3g}"


# ---- a report


def print_case(case: Case, console: Console) -> None:
    """A report in words: headline, statistics, what the halt said, evidence, the worst sequences, settings."""
    from rich.text import Text

    from .summary import headline

    status, sentence = headline(case)
    console.print(Text.assemble((f" {visible(status)} ", _STYLES.get(status, "cyan")), " ", visible(sentence)))
    if case.rows:
        config = case.config or ParityConfig()
        console.print(render(metrics_path(case.path), case.rows, config, None, console.width, headed=False))
        if case.columns.count > len(case.rows):
            console.print(f"(the last {len(case.rows)} of {case.columns.count:,} windows)", style="dim")
    incident = case.incident
    if incident is not None:
        for line in incident.text.splitlines():
            console.print(Text(visible(line)), soft_wrap=True)
        _print_evidence(incident.diagnosis, console)
        _print_sequences(case.tokens, incident.redacted, console)
    facts = case.facts if incident is None else {"versions": incident.versions}
    known = (f"{visible(k)} {visible(v)}" for k, v in (facts.get("versions") or {}).items())
    if versions := ", ".join(known):
        console.print(Text(f"Versions: {versions}", style="dim"))
    for note in case.notes:
        console.print(Text(f"({visible(note)})", style="yellow"))
    if len(case.incidents) > 1:
        console.print(f"{len(case.incidents)} incidents; told here: {visible(case.incidents[-1].parent.name)}")
    console.print("With pictures and settings: --html FILE, or --markdown FILE", style="dim")


def _print_evidence(diagnosis: Mapping[str, Any] | None, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    evidence = [] if diagnosis is None else [e for e in diagnosis["evidence"] if not e["error"]]
    shares = [(as_number(e["explained"]), e) for e in evidence]
    ranked = sorted(((s, e) for s, e in shares if s is not None), key=lambda pair: -pair[0])[:8]
    if not ranked:
        return
    table = Table(box=None, pad_edge=False, title="What each probe explains of the excess", title_justify="left",
                  header_style="dim")  # fmt: skip
    for name in ("probe", "", "explained", "seen"):
        table.add_column(name, no_wrap=name != "seen")
    for share, e in ranked:
        filled = round(20 * min(1.0, max(0.0, share))) if math.isfinite(share) else 0
        bar = "█" * filled + "░" * (20 - filled)
        table.add_row(Text(visible(e["name"])), bar, f"{share:.0%}", Text(visible(e["finding"] or e["hypothesis"])))
    console.print()
    console.print(table)
    console.print()


def _print_sequences(rows: Sequence[Mapping[str, Any]], redacted: bool, console: Console) -> None:
    """The three worst sequences as text, tokens coloured by Δ; underlined ones are those of the fullest colour."""
    from rich.text import Text

    from .html import color_scale

    by_sequence: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_sequence.setdefault(row["sequence"], []).append(row)
    scale = color_scale(rows)
    if by_sequence:
        said = (
            f"Worst sequences: orange, the trainer gives less than the engine; blue, more; full from |Δ| {scale:.3g}"
        )
        console.print(Text(said + (". Text is redacted: a dot a token." if redacted else ".")))
    for sequence, tokens in list(by_sequence.items())[:3]:
        line = Text.assemble((f"  {sequence}: ", "bold"))
        for t in tokens[:300]:
            delta = t["log_ratio"] if t["compared"] else None
            style = ""
            if delta is not None:
                share = min(1.0, abs(delta) / scale) if math.isfinite(delta) else 1.0
                full = (213, 94, 0) if delta < 0 else (0, 114, 178)
                red, green, blue = (round(255 + share * 0.6 * (c - 255)) for c in full)
                style = f"black on rgb({red},{green},{blue})" + (" underline" if share >= 0.5 else "")
            line.append("·" if redacted else visible(t.get("token") or ""), style=style)
        if len(tokens) > 300:
            line.append(f" … {len(tokens) - 300} more")
        console.print(line)
    if by_sequence:
        console.print()
