"""A run in the terminal: its windows at a glance, and a report in words. Needs no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.parity import ParityConfig
from ..judging.course import Course
from ..results.paths import metrics_path
from ..results.reader import as_number
from ..verdict import JUDGED, SEVERITY, judged
from .escape import visible
from .format import number
from .outcome import outcome
from .sequences import color_scale, shade, worst_sequences
from .summary import headline, statistics

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from .sequences import WorstSequence
    from .summary import Summary

__all__ = ["KEPT", "dashboard", "print_summary", "sparkline"]

KEPT = 400  # windows held in memory

_SPARK = 40

_BLOCKS = "▁▂▃▄▅▆▇█"

_STYLES = {"OK": "green", "WARN": "yellow", "BREACH": "red", "HALT": "bold white on red", "ERROR": "magenta"}

# those with rules first
_SHOWN = ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99", "ratio/out_of_band", "ess", "honesty_gap",
          "entropy/trainer", "entropy/drift", "reward/mean", "policy_drift/kl_k3", "cost/share",
          "cost/floor_share")  # fmt: skip

_SEQUENCES, _TOKENS, _PROBES = 3, 300, 8  # shown


def dashboard(
    path: Path,
    rows: Sequence[dict[str, Any]],
    config: ParityConfig,
    age: float | None,
    width: int = 100,
    *,
    headed: bool = True,
    course: Course | None = None,
) -> RenderableType:
    """The whole picture: status line (``headed``), statistics with their limits, the last windows that were not OK.

    ``course``: of all windows, where more were seen than ``rows``.
    """
    from rich.console import Group
    from rich.text import Text

    if not rows:
        return Text(f"waiting for the first window in {path}")
    events = [row for row in rows if row["status"] not in ("OK", "CALIBRATING")][-5:]
    return Group(
        *([_status_line(rows, config, age)] if headed else []),
        *([Text(_what_it_came_to(course))] if headed and course is not None and course.halts else []),
        Text(visible(path), style="dim"),
        Text(),
        _statistics_table(rows, config, width),
        *([Text(), *map(_event, events)] if events else []),
    )


def _status_line(rows: Sequence[dict[str, Any]], config: ParityConfig, age: float | None) -> Text:
    from rich.text import Text

    last = rows[-1]
    said = f"  step {last['step']}  streak {last.get('streak', 0)} of {config.consecutive}  {len(rows)} windows"
    said += "+" if len(rows) == KEPT else ""
    counts = Counter(row["status"] if row["status"] in SEVERITY else "ERROR" for row in rows)
    if missing := ", ".join(f"{n} {name}" for name, n in counts.items() if name not in JUDGED):
        said += f", {judged(counts)} judged ({missing})"
    said += "" if age is None else f"  last one {age:.0f} s ago"
    return Text.assemble(_badge(last["status"]), said)


def _what_it_came_to(course: Course) -> str:
    status, text = outcome(course)
    return f"{status}: {text}"


def _statistics_table(rows: Sequence[dict[str, Any]], config: ParityConfig, width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    spark = max(8, min(_SPARK, width - 70, len(rows)))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("statistic", "now", "floor", "of its limit", "worst", f"last {spark} windows"):
        left = name == "statistic" or name.startswith("last")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    series = {name: [as_number(row.get(name)) for row in rows] for name in _SHOWN}
    for s in statistics(_SHOWN, series, rows[-1], config):
        figures = [number(value, ".3g") for value in (s.last, s.floor, s.worst)]
        share = Text("-") if s.share is None else Text(f"{s.share:.0%}", style=_share_style(s.share))
        table.add_row(s.name, *figures[:2], share, figures[2], sparkline(s.values[-spark:]))
    return table


def _event(row: Mapping[str, Any]) -> Text:
    from rich.text import Text

    status = (f"{visible(row['status']):<7}", _STYLES.get(row["status"], "cyan"))
    said = f" step {row['step']}: {visible(row.get('reason') or '')}"
    return Text.assemble(status, said, overflow="ellipsis", no_wrap=True)


def _badge(status: str) -> tuple[str, str]:
    return f" {visible(status)} ", _STYLES.get(status, "cyan")


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

    def block(v: float | None) -> str:
        if v is None:
            return " "
        return _BLOCKS[round((scaled(v) - low) / span * (len(_BLOCKS) - 1))] if math.isfinite(v) else _BLOCKS[-1]

    return "".join(map(block, values))


def _share_style(share: float) -> str:
    return "red" if share > 1 else "yellow" if share > 0.5 else "green"


# ---- a report


def print_summary(summary: Summary, console: Console) -> None:
    """A report in words: headline, statistics, what the halt said, evidence, the worst sequences, settings."""
    from rich.text import Text

    status, sentence = headline(summary)
    console.print(Text.assemble(_badge(status), " ", visible(sentence)))
    if summary.rows:
        config = summary.config or ParityConfig()
        shown = dashboard(metrics_path(summary.path), summary.rows, config, None, console.width, headed=False)
        console.print(shown)
        if summary.columns.count > len(summary.rows):
            console.print(f"(the last {len(summary.rows)} of {summary.columns.count:,} windows)", style="dim")
    incident = summary.incident
    if incident is not None:
        for line in incident.text.splitlines():
            console.print(Text(visible(line)), soft_wrap=True)
        _print_evidence(incident.diagnosis, console)
        _print_sequences(summary.tokens, incident.redacted, console)
    facts = summary.facts if incident is None else {"versions": incident.versions}
    known = (f"{visible(k)} {visible(v)}" for k, v in (facts.get("versions") or {}).items())
    if versions := ", ".join(known):
        console.print(Text(f"Versions: {versions}", style="dim"))
    for note in summary.notes:
        console.print(Text(f"({visible(note)})", style="yellow"))
    if len(summary.incidents) > 1:
        console.print(f"{len(summary.incidents)} incidents; told here: {visible(summary.incidents[-1].parent.name)}")
    console.print("With pictures and settings: --html FILE, or --markdown FILE", style="dim")


def _print_evidence(diagnosis: Mapping[str, Any] | None, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    evidence = [] if diagnosis is None else [e for e in diagnosis["evidence"] if not e["error"]]
    shares = [(as_number(e["explained"]), e) for e in evidence]
    ranked = sorted(((s, e) for s, e in shares if s is not None), key=lambda pair: -pair[0])[:_PROBES]
    if not ranked:
        return
    title = "What each probe explains of the excess"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="dim")
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
    """The worst sequences as text, tokens coloured by Δ; underlined ones are those of the fullest colour."""
    from rich.text import Text

    worst, scale = worst_sequences(rows), color_scale(rows)
    if not worst:
        return
    said = f"Worst sequences: orange, the trainer gives less than the engine; blue, more; full from |Δ| {scale:.3g}"
    console.print(Text(said + (". Text is redacted: a dot a token." if redacted else ".")))
    for sequence in worst[:_SEQUENCES]:
        console.print(_coloured(sequence, scale, redacted))
    console.print()


def _coloured(sequence: WorstSequence, scale: float, redacted: bool) -> Text:
    from rich.text import Text

    line = Text.assemble((f"  {sequence.number}: ", "bold"))
    for token in sequence.tokens[:_TOKENS]:
        style = ""
        if (seen := shade(token, scale)) is not None:
            red, green, blue = (round(255 + seen.share * 0.6 * (c - 255)) for c in seen.color)
            style = f"black on rgb({red},{green},{blue})" + (" underline" if seen.marked else "")
        line.append("·" if redacted else visible(token.get("token") or ""), style=style)
    if len(sequence.tokens) > _TOKENS:
        line.append(f" … {len(sequence.tokens) - _TOKENS} more")
    return line
