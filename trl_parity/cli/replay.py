"""Judge a finished run again with other rules, with the breaker that judged it.

The settings the run was made with are read from config.json beside its metrics.jsonl, unless --config is given;
--set changes single ones. Windows after a halt are judged as far as they were recorded."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..verdict import Verdict

SHORT = "judge a finished run again with other rules"

EXAMPLES = """examples:
  trl-parity replay runs/mine
  trl-parity replay runs/mine/parity/metrics.jsonl --set rules.kl_k3.k=8 --set consecutive=2
  trl-parity replay runs/mine --set rules.honesty_gap=null --all
  trl-parity replay runs/mine --config configs/default.yaml --json

exit codes: 0 replayed, whatever came out; 2 the input can't be used"""

_MOST = 5000  # windows that are listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", help="metrics.jsonl, or the folder of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting (repeatable)"
    )
    parser.add_argument("--config", help="YAML file of settings instead of the run's own")
    parser.add_argument("--all", action="store_true", help="list every window, not only those that matter")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..config.parity import ParityConfig
    from ..results.reader import iter_windows, recorded_config
    from ..results.rejudge import changed_config, has_floor, rejudge, require_rejudged

    floored = has_floor(iter_windows(options.path, quiet=True))
    recorded = recorded_config(options.path)
    config = ParityConfig.from_yaml(options.config) if options.config else recorded or ParityConfig()
    config = changed_config(config, options.set)
    require_rejudged(options.set)
    if recorded is None and not options.config and not options.json:
        print("note: no config.json beside the windows; replayed with the default settings", file=sys.stderr)
    told = Told(everything=options.all)
    for judged in rejudge(iter_windows(options.path), config, floored=floored):
        told.add(*judged)
    if options.json:
        print(json.dumps(told.result(), indent=1))
    else:
        told.show()
    return 0


class Told:
    """What is told of the windows; only those to be shown are kept, and of very many the first."""

    def __init__(self, everything: bool):
        self._everything = everything
        self._statuses: dict[str, Counter[str]] = {"recorded": Counter(), "replayed": Counter()}
        self._halts: dict[str, int | None] = {"recorded": None, "replayed": None}
        self._changed: list[dict[str, Any]] = []
        self._lines: list[tuple[int, str, int, str, int, str]] = []
        self._counts: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any], verdict: Verdict) -> None:
        """One window."""
        before, after = row["status"], str(verdict.status)
        self._counts["windows"] += 1
        for name, status in (("recorded", before), ("replayed", after)):
            self._statuses[name][status] += 1
            if status == "HALT" and self._halts[name] is None:
                self._halts[name] = row["step"]
        if before != after:
            self._counts["changed"] += 1
            if len(self._changed) < _MOST:
                self._changed.append(
                    {
                        "step": verdict.step,
                        "recorded": before,
                        "replayed": after,
                        "streak": verdict.streak,
                        "breaches": list(verdict.breaches),
                        "reason": verdict.reason,
                    }
                )
        same = before == after and row["streak"] == verdict.streak
        if not self._everything and same and after in ("OK", "CALIBRATING", "NO_DATA"):
            self._counts["hidden"] += 1
        elif len(self._lines) < _MOST:
            self._lines.append((verdict.step, before, row["streak"], after, verdict.streak, verdict.reason))
        else:
            self._counts["left out"] += 1

    def result(self) -> dict[str, Any]:
        """As JSON."""
        outcomes = {
            name: {"statuses": dict(statuses), "first_halt": self._halts[name]}
            for name, statuses in self._statuses.items()
        }
        more = self._counts["changed"] - len(self._changed)
        left_out = {"changed_left_out": more} if more else {}
        return {"windows": self._counts["windows"], **outcomes, "changed": self._changed} | left_out

    def show(self) -> None:
        """As a table."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from ..report.escape import visible

        styles = {"HALT": "bold red", "BREACH": "red", "ERROR": "magenta", "WARN": "yellow"}

        def shown(status: str, streak: int, mark: str = "") -> Text:
            return Text(visible(f"{status} {streak}" if streak else status) + mark, style=styles.get(status, ""))

        table = Table(box=None, pad_edge=False)
        for column in ("step", "recorded", "replayed", "why, replayed"):
            table.add_column(column, justify="right" if column == "step" else "left")
        for step, before, streak, after, streak_after, reason in self._lines:
            mark = "" if before == after else " *"
            table.add_row(f"{step}", shown(before, streak), shown(after, streak_after, mark), Text(visible(reason)))
        console = Console(highlight=False)
        if table.row_count:
            console.print(table)
        if left_out := self._counts["left out"]:
            console.print(f"({left_out:,} more windows are not listed)")
        if hidden := self._counts["hidden"]:
            console.print(f"({hidden} windows are healthy and the same in both; --all lists them)")
        for name, statuses in self._statuses.items():
            counts = ", ".join(f"{n} {visible(status)}" for status, n in statuses.items())
            halt = self._halts[name]
            verb = "halted" if name == "recorded" else "would have halted"
            ending = f"{verb} at step {halt}" if halt is not None else f"{verb} nowhere"
            console.print(Text.assemble((f"{name}:", "bold"), f" {ending} ({counts})"))
