"""The ``trl-parity`` command.

Exit codes: 0 done, 1 a drill was missed or misnamed, or lint found an error, 2 the input can't be used (said in one
line on stderr).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .errors import ConfigError, ParityError

__all__ = ["main"]

_REPLAY = """Judge a finished run again with other rules, with the breaker that judged it.

The settings the run was made with are read from config.json beside its metrics.jsonl, unless --config is given;
--set changes single ones. Windows after a halt are judged as far as they were recorded."""
_REPLAY_EXAMPLES = """examples:
  trl-parity replay runs/mine
  trl-parity replay runs/mine/parity/metrics.jsonl --set rules.kl_k3.k=8 --set consecutive=2
  trl-parity replay runs/mine --set rules.honesty_gap=null --all
  trl-parity replay runs/mine --config configs/default.yaml --json"""

_WATCH = """Follow metrics.jsonl of a running job: status, streak, each statistic with its noise floor, how much of its
limit it uses, and its last windows. Copes with restarts and with a file that is not there yet; Ctrl-C ends it. Where
the output is no terminal, each new window is one plain line."""
_WATCH_EXAMPLES = """examples:
  trl-parity watch runs/mine
  trl-parity watch runs/mine --once
  trl-parity watch runs/mine >> parity.log &"""

_PANELS = """Make a W&B workspace view with sections Health, Drift, Policy, Engine and Tokens. A view with the same
content is found again and left as it is, your edits included; a later version with other content makes another."""
_PANELS_EXAMPLES = """examples:
  trl-parity panels --project trl-parity
  trl-parity panels --project rl --entity my-team"""

_LINT = """Find known traps in a run's settings before it starts: raw log-probs, two temperatures, truncation,
penalties, dropout, dtypes and heads that differ, a server's own defaults. A running callback checks the live engine
and trainer with the same rules, and says so before the first update. What only the engine knows is not guessed."""
_LINT_EXAMPLES = """examples:
  trl-parity lint configs/grpo_gpu.yaml
  trl-parity lint configs/grpo_gpu.yaml --set top_p=0.9 --set temperature=0.7
  trl-parity lint configs/grpo_gpu.yaml --serve "vllm serve Qwen/Qwen3-0.6B --max-model-len 1024"

exit codes: 0 no error found, 1 at least one, 2 the input can't be used"""

_DRILL = """Break the real stack on purpose, train a few GRPO steps with ParityCallback, and see whether the fault is
detected, how fast, and which cause is named. Needs the repository (recipes/drill) and vLLM; a CPU is enough. Progress
goes to stderr, the result to stdout."""
_DRILL_EXAMPLES = """examples:
  trl-parity drill --list
  trl-parity drill lost-sync                      # one run, with a control beside it
  trl-parity drill temperature top-p --seeds 0 1 2 --temperatures 0.7 1.0
  trl-parity drill --all --json > drills.json
  trl-parity drill dropout --keep runs/drill

exit codes: 0 all detected and named as expected, 1 some not, 2 the input can't be used"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="trl-parity",
        description="Is the vLLM engine that samples the same policy as the TRL trainer that learns?",
        epilog="exit codes: 0 done, 1 a drill was missed or lint found an error, 2 the input can't be used",
    )
    parser.add_argument("--version", action="version", version=f"trl-parity {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], short: str, long: str, examples: str) -> argparse.ArgumentParser:
        plain = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=short, description=long, epilog=examples, formatter_class=plain)
        sub.set_defaults(run=run)
        return sub

    sub = command("replay", _replay, "judge a finished run again with other rules", _REPLAY, _REPLAY_EXAMPLES)
    sub.add_argument("path", help="metrics.jsonl, or the folder of the run")
    sub.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting (repeatable)"
    )
    sub.add_argument("--config", help="YAML file of settings instead of the run's own")
    sub.add_argument("--all", action="store_true", help="list every window, not only those that matter")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    sub = command("watch", _watch, "follow a running job in the terminal", _WATCH, _WATCH_EXAMPLES)
    sub.add_argument("path", help="metrics.jsonl, or the folder of the run; it need not exist yet")
    sub.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="how often to look (default: 1)")
    sub.add_argument("--once", action="store_true", help="show the run as it is now, and end")
    sub = command("panels", _panels, "make the ready-made W&B workspace of a project", _PANELS, _PANELS_EXAMPLES)
    sub.add_argument("--project", required=True, help="W&B project")
    sub.add_argument("--entity", help="W&B user or team (default: your own)")
    sub = command("lint", _lint, "find known traps in a run's settings", _LINT, _LINT_EXAMPLES)
    sub.add_argument("config", help="YAML file of TRL's and trl-parity's settings, as the recipes use")
    sub.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="lay one setting over it")
    sub.add_argument("--serve", metavar="LINE", help="how the server is started: 'vllm serve MODEL --dtype ...'")
    sub.add_argument("--trainer", choices=["grpo", "rloo"], default="grpo", help="default: grpo")
    sub.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    sub = command("drill", _drill, "break the stack on purpose and see what is named", _DRILL, _DRILL_EXAMPLES)
    sub.add_argument("names", nargs="*", metavar="NAME", help="drills to run")
    sub.add_argument("--all", action="store_true", help="run all drills, the control included")
    sub.add_argument("--list", action="store_true", help="list the drills, and end")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="seeds (default: 0)")
    sub.add_argument("--temperatures", type=float, nargs="+", default=[0.7], metavar="T", help="default: 0.7")
    sub.add_argument("--model", metavar="PATH", help="folder of a model (default: the recipe's tiny one, built once)")
    sub.add_argument("--keep", metavar="DIR", help="keep the runs' folders here")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except ParityError as e:
        print(f"trl-parity: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
        return 0


def _replay(options: argparse.Namespace) -> int:
    from .config import ParityConfig
    from .replay import changed_config, read_windows, recorded_config, replay

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


def _lint(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    import yaml

    from .errors import ConfigError
    from .lint import configured_facts, lint

    try:
        with open(options.config, encoding="utf-8") as f:
            values = yaml.safe_load(f) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{options.config} holds a {type(values).__name__}. Expected a mapping of settings.")
        for item in options.set:
            name, equals, value = item.partition("=")
            if not equals:
                raise ConfigError(f"--set {item!r} has no '='. Expected NAME=VALUE, e.g. --set top_p=0.9.")
            values[name.strip()] = yaml.safe_load(value)
    except OSError as e:
        raise ConfigError(f"cannot read {options.config}: {e.strerror}. Expected a YAML file of settings.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{options.config} is not valid YAML: {e}") from e
    try:
        found = list(lint(configured_facts(values, serve=options.serve, trainer=options.trainer)))
    except (TypeError, ValueError, SystemExit) as e:
        raise ConfigError(f"a setting can't be read ({e}). Check {options.config}, --set and --serve.") from e
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in found:
            style = styles[finding.severity]
            table.add_row(
                f"[{style}]{finding.severity}[/]",
                finding.cause,
                f"{escape(finding.text)}\n[bold]Fix:[/] {escape(finding.fix)}",
            )
        Console(highlight=False).print(table if found else "no known trap in these settings")
    return 1 if any(finding.severity == "error" for finding in found) else 0


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .terminal import watch

    try:
        for _ in watch(options.path, Console(), every=options.every, once=options.once):
            pass
    except KeyboardInterrupt:
        pass
    return 0


def _panels(options: argparse.Namespace) -> int:
    from .panels import create

    url, made = create(options.project, options.entity)
    print(("made" if made else "already there, left as it is") + f": {url}")
    return 0


def _drill(options: argparse.Namespace) -> int:
    import importlib.util

    places = (Path(__file__).resolve().parent.parent, Path.cwd())
    path = next((p for place in places if (p := place / "recipes" / "drill" / "run.py").is_file()), None)
    if path is None:
        raise ConfigError(
            "the drills are not part of the installed package and recipes/drill is not under the current folder. "
            "Clone the repository and run `trl-parity drill` in it."
        )
    spec = importlib.util.spec_from_file_location("trl_parity_drill", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.main(options))


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


if __name__ == "__main__":
    sys.exit(main())
