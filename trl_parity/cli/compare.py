"""Do runs differ beyond their noise floors? Before and after a migration, one engine against another.

The first run is the reference; each other run is compared with it, statistic by statistic, step by step where they
share steps. The null hypothesis: the mean difference is no larger than the larger of the two noise floors. Windows
that resemble their neighbours count for fewer; p-values are Holm's over all that is tested. 'differs': the null is
refused; 'same': the interval lies within the floor; 'open': neither is shown. A drift that comes late hardly moves a
mean: runs differ, too, where one was halted and the other was not by the same step."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

SHORT = "test whether runs differ beyond their noise floors"

EXAMPLES = """examples:
  trl-parity compare runs/before runs/after
  trl-parity compare runs/v0 runs/v1 runs/v1-fp32-head --html compare.html
  trl-parity compare runs/before runs/after --alpha 0.01 --picture compare.png

exit codes: 0 none is shown to differ, 1 at least one differs or was halted, 2 it can't be told (too few windows), or
the input can't be used"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or their metrics.jsonl; two or more")
    parser.add_argument("--alpha", type=float, default=0.05, help="level of the whole family of tests (default: 0.05)")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained HTML page")
    parser.add_argument("--markdown", metavar="FILE", help="write Markdown, and the picture beside it; '-': to stdout")
    parser.add_argument("--picture", metavar="FILE", help="write the curves as PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..errors import ConfigError
    from ..results.compare import COLUMNS, compare
    from ..results.reader import Columns, iter_windows

    if len(options.runs) < 2:
        raise ConfigError("one run is given. Expected two or more: the reference first.")
    if not 0 < options.alpha < 1:
        raise ConfigError(f"--alpha is {options.alpha:g}. Expected a number between 0 and 1.")
    runs = [Columns.of(iter_windows(path), COLUMNS) for path in options.runs]
    for path, columns in zip(options.runs, runs, strict=True):
        columns.course.action = action_of(path)
    found = compare(runs, options.alpha)
    names = names_of(options.runs)
    verdicts = {c.verdict(options.alpha) for c in found}
    code = (
        1
        if "differs" in verdicts or any(run.course.halted for run in runs)
        else 2
        if verdicts <= {"too few windows"}
        else 0
    )
    _write(options, names, runs, found, code)
    if options.json:
        _print_json(options, names, runs, found, code)
    elif options.markdown != "-":
        _print_table(options, names, runs, found, code)
    return code


def action_of(path: str) -> str:
    """What a halt did in a run; as by default where its settings can't be read."""
    from ..config.parity import ParityConfig
    from ..errors import ParityError
    from ..results.reader import recorded_config

    try:
        return (recorded_config(path) or ParityConfig()).action
    except ParityError:
        return ParityConfig().action


def names_of(paths: Sequence[str]) -> list[str]:
    """Short names of runs that tell them apart."""
    parts = [[p for p in Path(path).parts if p not in ("parity", "metrics.jsonl", "/")] or [path] for path in paths]
    for depth in range(1, 1 + max(map(len, parts))):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(paths, start=1)]


def sentence(code: int, found: Sequence[Any], names: Sequence[str], runs: Sequence[Any], alpha: float) -> str:
    """The answer in words."""
    from ..report.outcome import halts_in_words
    from ..results.compare import FEW, halts_apart, standing_halt

    if code == 2:
        return "It can't be told: the runs have too few windows in common, or measured nothing alike."
    apart = [i for i in range(1, len(runs)) if halts_apart(runs[0], runs[i])]
    told = {i if standing_halt(runs[0]) is None else 0 for i in apart}  # in a sentence about two
    parts = [
        f"{name} {'was ' if run.course.standing else ''}{halts_in_words(run.course)}."
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
        if run.course.halts and not (i in told and run.course.halted)
    ]
    for i, name in enumerate(names[1:], start=1):
        mine = [c for c in found if c.run == i]
        differing = [c.stat for c in mine if c.verdict(alpha) == "differs"]
        if i in apart:
            first = standing_halt(runs[0])
            halted, other = (name, names[0]) if first is None else (names[0], name)
            step = standing_halt(runs[i]) if first is None else first
            parts.append(f"{halted} halted at step {step}, over limits above its own noise floor; {other} did not.")
        if differing:
            parts.append(f"{name} differs from {names[0]} beyond the noise floor in {', '.join(differing)}.")
        elif i not in apart and mine and all(c.verdict(alpha) == "same" for c in mine):
            parts.append(f"{name} is the same as {names[0]} within the noise floor.")
        elif i not in apart:
            parts.append(f"{name} is not shown to differ from {names[0]} beyond the noise floor.")
    if any(c.windows < FEW for c in found):
        parts.append(f"Fewer than {FEW} windows were compared: they are taken as independent of each other.")
    return " ".join(parts)


_HEAD = (
    "run",
    "statistic",
    "reference",
    "run's",
    "difference",
    "noise floor",
    "windows (worth)",
    "p (Holm)",
    "answer",
)


def _rows(names: Sequence[str], found: Sequence[Any], alpha: float) -> list[tuple[str, ...]]:
    from ..report.format import number

    out: list[tuple[str, ...]] = []
    for c in found:
        p = "-" if math.isnan(c.p_holm) else "< 0.0001" if c.p_holm < 1e-4 else f"{c.p_holm:.2g}"
        spread = "" if math.isnan(c.low) else f" ± {(c.high - c.low) / 2:.2g}"
        windows = f"{c.windows} ({c.worth:.0f}){'' if c.paired else ' unpaired'}"
        floor = number(c.margin) if c.floored else "not known: 0"
        means = (number(c.mean_a), number(c.mean_b), f"{c.mean_b - c.mean_a:+.3g}{spread}")
        out.append((names[c.run], c.stat, *means, floor, windows, p, c.verdict(alpha)))
    return out


def _print_table(options: Any, names: Any, runs: Any, found: Any, code: int) -> None:
    from rich.console import Console
    from rich.text import Text

    from ..report.escape import visible
    from ..report.outcome import halts_in_words

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no right edge
        console.width = max(console.width, 160)
    for i, (name, c) in enumerate(zip(names, runs, strict=True)):
        halt = f", {halts_in_words(c.course)}" if c.course.halts else ""
        counts = ", ".join(f"{n:,} {s}" for s, n in c.statuses.items())
        role = "reference" if i == 0 else "run"
        console.print(Text(visible(f"{role}: {name}, {c.count:,} windows to step {c.last['step']} ({counts}){halt}")))
    console.print()
    console.print(_curves(names, runs))
    console.print()
    if found:
        console.print(_tests(names, found, options.alpha))
        console.print()
    said = sentence(code, found, names, runs, options.alpha)
    console.print(Text(visible(said), style="bold red" if code == 1 else "bold"))


def _curves(names: Sequence[str], runs: Sequence[Any]) -> Table:
    """A line a statistic and run; those of one statistic share a scale."""
    from rich.table import Table
    from rich.text import Text

    from ..report.escape import visible
    from ..report.terminal import sparkline
    from ..results.compare import SHOWN

    table = Table(box=None, pad_edge=False, show_header=False)
    for stat in SHOWN:
        lines = [_thinned([x if x == x else None for x in c.values[stat]], 40) for c in runs]
        scale = [x for line in lines for x in line if x is not None]
        for i, (name, line) in enumerate(zip(names, lines, strict=True)):
            if scale:
                table.add_row(stat if i == 0 else "", Text(visible(name)), sparkline(line, scale))
    return table


def _tests(names: Sequence[str], found: Sequence[Any], alpha: float) -> Table:
    """A row a test; of two runs only, without their names."""
    from rich.table import Table
    from rich.text import Text

    from ..report.escape import visible

    table = Table(box=None, pad_edge=False, header_style="dim")
    first = 0 if len(names) > 2 else 1
    for name in _HEAD[first:]:
        left = name in ("run", "statistic", "answer")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    styles = {"differs": "bold red", "same": "green"}
    for row in _rows(names, found, alpha):
        cells = [Text(visible(x)) for x in row[first:]]
        cells[-1].stylize(styles.get(row[-1], "yellow"))
        table.add_row(*cells)
    return table


def _thinned(values: list[float | None], most: int) -> list[float | None]:
    """Means of neighbours, so that a long curve fits."""
    if len(values) <= most:
        return values
    cuts = [round(i * len(values) / most) for i in range(most + 1)]
    parts = [[v for v in values[a:b] if v is not None] for a, b in itertools.pairwise(cuts)]
    return [sum(p) / len(p) if p else None for p in parts]


def _print_json(options: Any, names: Any, runs: Any, found: Any, code: int) -> None:
    import json
    from dataclasses import asdict

    from ..files import jsonable

    result = {
        "reference": names[0],
        "runs": [
            {"name": n, "windows": c.count, "first_halt": c.first_halt} for n, c in zip(names, runs, strict=True)
        ],
        "alpha": options.alpha,
        "tests": [{**asdict(c), "run": names[c.run], "answer": c.verdict(options.alpha)} for c in found],
        "answer": sentence(code, found, names, runs, options.alpha),
        "exit_code": code,
    }
    print(json.dumps(jsonable(result), indent=1, allow_nan=False))


def _write(options: Any, names: Any, runs: Any, found: Any, code: int) -> None:
    """The files that were asked for."""
    if not (options.html or options.markdown or options.picture):
        return
    import sys

    from ..errors import ConfigError
    from ..files import write_atomic
    from ..report.figures import draw_comparison
    from ..report.rendering import render_markdown
    from ..results.compare import SHOWN
    from ..results.compare import __doc__ as method

    try:
        png, note = draw_comparison(names, runs, SHOWN), ""
    except ImportError as e:
        png, note = None, f"No picture: matplotlib can't be imported ({e}). Run: pip install 'trl-parity[report]'."
        if options.picture and not (options.html or options.markdown):
            raise ConfigError(note) from e
    pictures = {} if png is None else {"compare.png": png}

    def markdown(*, picture: bool) -> str:
        answer = sentence(code, found, names, runs, options.alpha)
        rows = _rows(names, found, options.alpha)
        method_said = (method or "").strip().replace("``", "")
        return render_markdown(
            "compare.md.j2", answer=answer, picture=picture, note=note, heads=_HEAD, rows=rows, method=method_said
        )

    if options.html:
        from ..report.html import render_page

        page = render_page("trl-parity: runs compared", [markdown(picture=bool(png))], pictures)
        write_atomic(Path(options.html), page)
    if options.markdown == "-":
        print(markdown(picture=False))
    elif options.markdown:
        from .report import write_markdown

        write_markdown(Path(options.markdown), markdown(picture=bool(png)), pictures)
    if options.picture and png is not None:
        write_atomic(Path(options.picture), png)
    for file in (options.html, options.markdown, options.picture):
        if file and file != "-" and not options.json:
            print(f"wrote {file}")
    if note:
        print(f"trl-parity: {note}", file=sys.stderr)
