"""Judge a finished run again with other rules, with the breaker that judged it.

The settings the run was made with are read from config.json beside its metrics.jsonl, unless --config is given;
--set changes single ones. Windows after a halt are judged as far as they were recorded."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

SHORT = "judge a finished run again with other rules"
EXAMPLES = """examples:
  trl-parity replay runs/mine
  trl-parity replay runs/mine/parity/metrics.jsonl --set rules.kl_k3.k=8 --set consecutive=2
  trl-parity replay runs/mine --set rules.honesty_gap=null --all
  trl-parity replay runs/mine --config configs/default.yaml --json"""


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
    from ..config import ParityConfig
    from ..replay import changed_config, read_windows, recorded_config, replay

    rows = read_windows(options.path)
    recorded = recorded_config(options.path)
    config = ParityConfig.from_yaml(options.config) if options.config else recorded or ParityConfig()
    config = changed_config(config, options.set)
    judged = list(replay(rows, config))
    result = {
        "windows": len(judged),
        "recorded": _outcome([(row["step"], row["status"]) for row, _ in judged]),
        "replayed": _outcome([(v.step, str(v.status)) for _, v in judged]),
        "changed": [
            {
                "step": v.step,
                "recorded": row["status"],
                "replayed": str(v.status),
                "streak": v.streak,
                "breaches": list(v.breaches),
                "reason": v.reason,
            }
            for row, v in judged
            if row["status"] != v.status
        ],
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    if recorded is None and not options.config:
        print("note: no config.json beside the windows; replayed with the default settings", file=sys.stderr)
    _print_replay(judged, result, everything=options.all)
    return 0


def _outcome(statuses: list[tuple[int, str]]) -> dict[str, Any]:
    return {
        "statuses": dict(Counter(status for _, status in statuses)),
        "first_halt": next((step for step, status in statuses if status == "HALT"), None),
    }


def _print_replay(judged: list[Any], result: dict[str, Any], everything: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    styles = {"HALT": "bold red", "BREACH": "red", "ERROR": "magenta", "WARN": "yellow"}

    def shown(status: str, streak: int) -> str:
        text = f"{status} {streak}" if streak else status
        return f"[{styles[status]}]{text}[/]" if status in styles else text

    table = Table(box=None, pad_edge=False)
    for column, kwargs in (("step", {"justify": "right"}), ("recorded", {}), ("replayed", {}), ("why, replayed", {})):
        table.add_column(column, **kwargs)  # type: ignore[arg-type]
    hidden = 0
    for row, verdict in judged:
        same = row["status"] == verdict.status and row["streak"] == verdict.streak
        if not everything and same and verdict.status in ("OK", "CALIBRATING", "NO_DATA"):
            hidden += 1
            continue
        mark = "" if row["status"] == verdict.status else " *"
        table.add_row(
            f"{verdict.step}", shown(row["status"], row["streak"]),
            shown(str(verdict.status), verdict.streak) + mark, verdict.reason,
        )  # fmt: skip
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    if hidden:
        console.print(f"({hidden} windows are healthy and the same in both; --all lists them)")
    for name in ("recorded", "replayed"):
        outcome = result[name]
        counts = ", ".join(f"{n} {status}" for status, n in outcome["statuses"].items())
        halt = outcome["first_halt"]
        verb = "halted" if name == "recorded" else "would have halted"
        ending = f"{verb} at step {halt}" if halt is not None else f"{verb} nowhere"
        console.print(f"[bold]{name}:[/] {ending} ({counts})")
