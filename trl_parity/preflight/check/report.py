"""A check for people and machines: a table for terminals, JSON, Markdown with pictures. Needs no engine."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...files import jsonable, write_atomic
from ...report.drawing import BLUE, GREY, PURPLE, SKY, VERMILION, canvas, legend, png
from ...report.escape import visible
from ...report.format import number
from ...report.rendering import render_markdown
from .journal import SCHEMA_VERSION
from .rows import EXIT_CODES, CheckOutcome, Row, RowVerdict

if TYPE_CHECKING:
    from .settings import Result

__all__ = ["as_json", "markdown", "print_table", "with_commands", "write"]

_STYLES = {
    RowVerdict.PASS: "green",
    RowVerdict.FAIL: "bold red",
    RowVerdict.OUT_OF_REACH: "yellow",
    RowVerdict.UNCLEAR: "magenta",
    RowVerdict.NOT_RUN: "dim",
}

_OF_A_TRIAL = ("index", "mean_kl", "sequences", "tokens", "seconds")

_ORDER = ("limits", "mechanisms", "lengths", "invariances", "baseline")

_GROUPS = {
    "limits": "Limits: engine against reference",
    "mechanisms": "Mechanisms: what drift goes back to",
    "lengths": "Long contexts",
    "invariances": "Invariances: the engine against itself",
    "baseline": "Stored baseline",
}


def headline(result: Result) -> str:
    """One sentence: yes, no, or not known, and why."""
    failed = [r for r in result.rows if r.verdict is RowVerdict.FAIL]
    beyond = [r for r in result.rows if r.verdict is RowVerdict.OUT_OF_REACH]
    if result.outcome is CheckOutcome.UNFIT:
        cause = next((r for r in failed if r.group == "mechanisms"), failed[0])
        return f"unfit: {len(failed)} of {len(result.rows)} rows fail, first of all {cause.id} ({cause.title})"
    if result.outcome is CheckOutcome.UNKNOWN:
        rows = [r for r in result.rows if r.verdict in (RowVerdict.UNCLEAR, RowVerdict.NOT_RUN) and r.needed]
        return "could not tell: " + "; ".join(f"{r.id} {r.verdict}" for r in rows)
    words = "fit: no row fails"
    if beyond:
        words += f"; out of this dtype's reach: {', '.join(r.id for r in beyond)}"
    return words


def grouped(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) in the order of the report; failures first in their group."""
    for group in _ORDER:
        some = [r for r in rows if r.group == group]
        if some:
            yield _GROUPS[group], sorted(some, key=lambda r: r.verdict is not RowVerdict.FAIL)


def measured(row: Row) -> str:
    """The value, with its interval."""
    if row.value is None:
        return "-"
    text = number(row.value)
    return text if row.interval is None else f"{text} [{number(row.interval[0])}, {number(row.interval[1])}]"


def limit(row: Row) -> str:
    """What is asked of the value."""
    if row.limit is None:
        return "-"
    return ("≥ " if row.at_least else "≤ ") + number(row.limit)


def print_table(result: Result, console: Any) -> None:
    """The report on a terminal."""
    from rich.markup import escape
    from rich.table import Table

    wide = console.width >= 110
    for title, rows in grouped(result.rows):
        table = Table(box=None, pad_edge=False, title=f"[bold]{escape(title)}[/]", title_justify="left")
        for name, width in (("", 20), ("verdict", 12), ("measured", 12), ("limit", 10), ("noise", 10)):
            justify: Any = "left" if name in ("", "verdict") else "right"
            table.add_column(name, justify=justify, no_wrap=True, min_width=width)
        if wide:
            table.add_column("", style="dim")
        for row in rows:
            verdict = f"[{_STYLES[row.verdict]}]{row.verdict}[/]"
            cells = [row.id, verdict, number(row.value), limit(row), number(row.floor)]
            table.add_row(*cells, *([escape(row.title)] if wide else []))
        console.print(table)
    told = [r for r in result.rows if r.verdict not in (RowVerdict.PASS, RowVerdict.NOT_RUN)]
    told += [r for r in result.rows if r.verdict is RowVerdict.NOT_RUN]
    for row in told:
        console.print(f"\n[{_STYLES[row.verdict]}]{row.verdict}[/] [bold]{row.id}[/]: {escape(visible(row.evidence))}")
        if row.fix:
            console.print(f"  [bold]Fix:[/] {escape(row.fix)}")
        if row.reproduce:
            console.print(f"  [bold]Reproduce:[/] {escape(row.reproduce)}", soft_wrap=True)
    console.print(f"\n{escape(speed(result))}")
    style = {CheckOutcome.FIT: "bold green", CheckOutcome.UNFIT: "bold red", CheckOutcome.UNKNOWN: "bold magenta"}[
        result.outcome
    ]
    console.print(f"[{style}]{escape(headline(result))}[/]")


def speed(result: Result) -> str:
    """Scored tokens a second, and the engine's alone."""
    told = result.facts["speed"]
    return (
        f"{sum(t.tokens for t in result.trials):,} tokens in {len(result.trials)} trials; "
        f"{told['tokens_per_second']:,.0f} scored tokens a second, {told['share']:.0%} of the "
        f"{told['engine_alone']:,.0f} that the engine alone reaches on the same prompts"
    )


def as_json(result: Result) -> str:
    """For machines: ``schema_version``, ``outcome``, ``exit_code``, ``rows``, settings and facts."""
    value = {
        "schema_version": SCHEMA_VERSION,
        "trl_parity": __version__,
        "outcome": str(result.outcome),
        "exit_code": EXIT_CODES[result.outcome],
        "headline": headline(result),
        "rows": [row.to_json() for row in result.rows],
        "settings": result.settings.to_json(),
        "facts": result.facts,
        "trials": [jsonable({name: getattr(t, name) for name in _OF_A_TRIAL}) for t in result.trials],
    }
    return json.dumps(value, indent=1, allow_nan=False, default=str) + "\n"


def markdown(result: Result, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown."""
    return render_markdown(
        "check.md.j2",
        outcome=result.outcome,
        headline=headline(result),
        settings=result.settings,
        facts=result.facts,
        versions=", ".join(f"{k} {v}" for k, v in result.facts["versions"].items()),
        speed=speed(result),
        groups=list(grouped(result.rows)),
        pictures={name: _CAPTIONS[name] for name in pictures},
        measured=measured,
        limit=limit,
    )


_CAPTIONS = {
    "trials.png": "Mean KL of each trial, with the limits and the noise of the dtype",
    "positions.png": "Drift by tokens of context, with the noise of the dtype",
}


def write(result: Result, directory: Path) -> list[Path]:
    """check.json, report.md and pictures (with matplotlib) into a folder, each whole or not at all."""
    pictures: dict[str, bytes | None] = {}
    with contextlib.suppress(ImportError):  # without the extra `report` there are no pictures
        pictures = {"trials.png": _draw_trials(result), "positions.png": _draw_positions(result)}
    drawn = {name: content for name, content in pictures.items() if content is not None}
    files: dict[str, bytes | str] = {
        **drawn,
        "report.md": markdown(result, list(drawn)),
        "check.json": as_json(result),
    }
    for name, content in files.items():
        write_atomic(directory / name, content, private=True)  # prompts stand in them
    return [directory / name for name in files]


def _row(result: Result, id: str) -> Row | None:
    return next((r for r in result.rows if r.id == id), None)


def _draw_trials(result: Result) -> bytes | None:
    values = [t.mean_kl for t in result.trials]
    mean = _row(result, "kl_mean")
    if mean is None or not values:
        return None
    shown = [max(v, 1e-16) if math.isfinite(v) else math.nan for v in values]
    figure, axes = canvas(4)
    axes.set_yscale("log")
    axes.plot(range(len(shown)), shown, "o", color=BLUE, markersize=4, label="trial")
    limits = result.settings.limits
    axes.axhline(limits.mean_kl, color=VERMILION, linestyle="--", label=f"limit of the mean, {limits.mean_kl:g}")
    axes.axhline(limits.max_kl, color=PURPLE, linestyle="-.", label=f"limit of a trial, {limits.max_kl:g}")
    if mean.floor is not None and mean.floor > 0:
        axes.axhline(mean.floor, color=GREY, linestyle=":", label=f"noise of the dtype, {number(mean.floor)}")
    axes.set_xlabel("trial")
    axes.set_ylabel("mean KL(engine ‖ reference), nats")
    axes.grid(alpha=0.3)
    legend(figure, 4, size=8)
    return png(figure)


def _draw_positions(result: Result) -> bytes | None:
    row = _row(result, "positions")
    table: Mapping[str, Any] = row.details.get("by_context_length", {}) if row is not None else {}
    if not table:
        return None
    names = list(table)
    figure, axes = canvas(4)
    axes.set_yscale("log")
    for i, (label, colour, hatch) in enumerate((("engine", BLUE, ""), ("noise of the dtype", SKY, "//"))):
        heights = [max(float(table[n][i] or 0.0), 1e-16) for n in names]
        heights = [h if math.isfinite(h) else math.nan for h in heights]
        at = [x + 0.4 * i for x in range(len(names))]
        axes.bar(at, heights, 0.38, color=colour, hatch=hatch, label=label, edgecolor="white")
    axes.set_xticks([x + 0.2 for x in range(len(names))], names)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("mean Δ² / 2, nats")
    axes.grid(alpha=0.3, axis="y")
    legend(figure, 2, size=8)
    return png(figure)


def with_commands(result: Result, arguments: Sequence[str]) -> Result:
    """Each row that names a case, or a row to look at alone, as a command that can be pasted into a shell."""
    prefix = shlex.join(["trl-parity", "check", *arguments])
    rows = (replace(r, reproduce=f"{prefix} {r.reproduce}") if r.reproduce else r for r in result.rows)
    return replace(result, rows=tuple(rows))
