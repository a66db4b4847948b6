"""Runs drills and shows what became of them; started by ``trl-parity drill``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import drills
import work

from trl_parity.errors import ConfigError


def main(options: argparse.Namespace) -> int:
    """0: all detected and named as expected; 1: some not. Raises ConfigError when it is told what it can't do."""
    if options.list:
        show_list(terminal())
        return 0
    if not options.names and not options.all:
        raise ConfigError("name one drill or more, or --all; --list shows them")
    if options.model and not Path(options.model).is_dir():
        raise ConfigError(f"{options.model!r} is no folder of a model")
    chosen = drills.DRILLS if options.all else drills.pick(options.names, drills.DRILLS)
    jobs = [work.Job(d.name, seed=s, temperature=t) for d in chosen for t in options.temperatures
            for s in options.seeds]  # fmt: skip
    single = len(jobs) == 1 and not options.json
    if single and chosen[0].cause:
        jobs.append(replace(jobs[0], control=True))
    if options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)
    with progress(jobs) as (on_engine, on_row):
        rows, versions, failed = work.execute(
            drills.DRILLS, jobs, __file__, model=options.model, keep=Path(options.keep) if options.keep else None,
            on_engine=on_engine, on_row=on_row,
        )  # fmt: skip
    for reason in failed:
        print(reason, file=sys.stderr)
    counted = [row for row in rows if not row["control"]]
    if options.json:
        print(json.dumps({"runs": counted, "summary": summarize(counted), "versions": versions}, indent=1))
    elif single:
        show_single(terminal(), chosen[0], rows, bool(options.keep))
    else:
        show_table(terminal(), summarize(counted), versions)
    return 1 if failed or not all(passed(row) for row in rows) else 0


def passed(row: dict[str, Any]) -> bool:
    """Detected and named as expected; of a healthy run: neither halted nor accused of anything."""
    return row["correct"] and row["detected"] == bool(row["cause"])


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a drill, over its seeds and temperatures."""
    medians = ("windows", "seconds_to_halt", "drift", "explained", "confidence", "seconds_to_diagnose")
    medians += ("seconds_total", "cost_share")
    out = []
    for name in dict.fromkeys(row["drill"] for row in rows):
        runs = [row for row in rows if row["drill"] == name]
        entry = {
            "drill": name,
            "cause": runs[0]["cause"],
            "runs": len(runs),
            "detected": sum(row["detected"] for row in runs),
            "correct": sum(row["correct"] for row in runs),
            "passed": sum(passed(row) for row in runs),
            "named": sorted({row["named"] for row in runs}),
        }
        out.append(entry | {key: median(runs, key) for key in medians})
    return out


def median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.median(values) if values else None


# ---- on the terminal ----------------------------------------------------------------------------------------------


def terminal() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def shown(value: float | None, form: str = "g") -> str:
    return "-" if value is None else format(value, form)


def show_list(console: Any) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("drill", "cause to be named", "what is broken"):
        table.add_column(column)
    for drill in drills.DRILLS:
        table.add_row(drill.name, drill.cause or "none", drill.says(drill.strengths[-1]))
    console.print(table)


def show_table(console: Any, summary: list[dict[str, Any]], versions: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("drill", no_wrap=True)
    table.add_column("cause", no_wrap=True)
    for column in ("detected", "windows", "drift / floor", "named", "explained", "to diagnose", "run", "cost"):
        table.add_column(column, justify="right")
    for row in summary:
        style = None if row["passed"] == row["runs"] else "red"
        share = "-" if row["cost_share"] is None else f"{row['cost_share']:.1%}"
        seconds = [shown(row[key], ".1f") for key in ("seconds_to_diagnose", "seconds_total")]
        table.add_row(
            row["drill"], row["cause"] or "none", f"{row['detected']}/{row['runs']}", shown(row["windows"]),
            shown(row["drift"], ".1f"), f"{row['correct']}/{row['runs']}", shown(row["explained"], ".0%"),
            *(s if s == "-" else f"{s} s" for s in seconds), share, style=style,
        )  # fmt: skip
    console.print(table)
    console.print()
    for row in summary:
        others = [name for name in row["named"] if name != (row["cause"] or "-")]
        if others:
            console.print(f"{row['drill']}: named {', '.join(others)}; expected {row['cause'] or 'nothing'}")
    faults = [row for row in summary if row["cause"]]
    total, detected = sum(row["runs"] for row in faults), sum(row["detected"] for row in faults)
    named = sum(row["correct"] for row in faults)
    alarms = sum(row["runs"] - row["passed"] for row in summary if not row["cause"])
    console.print(f"detected {detected} of {total}, named {named} of {total}; false alarms of the control: {alarms}")
    console.print(versions, style="dim")


def show_single(console: Any, drill: drills.Drill, rows: list[dict[str, Any]], kept: bool) -> None:
    console.print(f"[bold]{drill.name}[/], broken on purpose: {drill.says(drill.strengths[-1])}", soft_wrap=True)
    for row in sorted(rows, key=lambda row: bool(row["cause"])):
        name = "broken" if row["cause"] else "control"
        console.print(f"{name:<8} {' '.join(row['statuses'])}   worst drift {shown(row['drift'], '.1f')} x floor")
    for row in rows[:1]:
        if row["halt_message"]:
            console.print("\n" + row["halt_message"].strip() + "\n", markup=False, soft_wrap=True)
        if not kept:
            console.print("(the run's folder is gone; --keep DIR keeps it)", style="dim")
        console.print(one_line(row), style="green" if passed(row) else "red", soft_wrap=True)


def one_line(row: dict[str, Any]) -> str:
    """A run's result."""
    if not row["cause"]:
        verb = "halted" if row["detected"] else "not halted"
        return f"{row['drill']}: {verb}, {'nothing named' if row['named'] == '-' else 'named ' + row['named']}"
    verb = "halted" if row["halts"] else "warned of"
    windows = f"{verb} after {row['windows']} windows" if row["detected"] else f"not {verb}"
    text = f"{row['drill']}: {windows}, named {row['named']} (expected {row['cause']})"
    if row["explained"] is not None:
        text += f", explains {row['explained']:.0%}"
    if row["seconds_to_diagnose"] is not None:
        text += f", {row['seconds_to_diagnose']:.1f} s to diagnose"
    return text + f", cost {shown(row['cost_share'], '.1%')}"


@contextmanager
def progress(jobs: list[work.Job]) -> Iterator[tuple[Any, Any]]:
    """Tells on stderr how far it is: a bar on a terminal, plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console, done = Console(stderr=True, highlight=False), 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=len(jobs))

    def on_engine(number: int, of: int, group: list[work.Job]) -> None:
        names = ", ".join(dict.fromkeys(job.drill for job in group))
        bar.update(task, description=f"engine {number}/{of}")
        console.print(f"engine {number}/{of}: {names}", markup=False, soft_wrap=True)

    def on_row(row: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        bar.advance(task)
        beside = " (control beside it)" if row["control"] else ""
        text = f"  {done}/{len(jobs)} T {row['temperature']:g} seed {row['seed']}{beside}  {one_line(row)}"
        console.print(text, markup=False, soft_wrap=True)

    with bar:
        yield on_engine, on_row


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    work.serve(drills.DRILLS, sys.argv[2])
