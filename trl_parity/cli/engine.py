"""Check vLLM's engine arguments against the vLLM that is installed: names it does not know (with what replaced those
it once knew, and since when), wrong types and ranges, arguments that do not go together. Prints each with why it is
set and what it costs, and what it would do to RL. With --model, vLLM's own whole configuration is built too, as an
engine would start with it; nothing is loaded. TRL's colocated engine gets the same arguments by
ParityConfig(engine_args=...), a server by the line that --serve prints."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config.reading import settings
from ..errors import ConfigError

SHORT = "check and explain vLLM's engine arguments"

EXAMPLES = """examples:
  trl-parity engine
  trl-parity engine rl --set max_model_len=4096 --model Qwen/Qwen3-0.6B --serve
  trl-parity engine mine.yaml --json

exit codes: 0 fine, 1 problems found (for a file with a trainer: block also what is wrong for RL), 2 can't tell: the
file can't be read, or no vLLM is installed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "source", nargs="?", default="rl", metavar="PRESET|FILE",
        help="rl (default), throughput, long_context, mixed_cluster, or a YAML file of engine arguments",
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="lay one argument over it")
    parser.add_argument("--model", help="name or folder of the model the engine is for")
    parser.add_argument("--serve", action="store_true", help="print only the `vllm serve` line")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..engine.config import laid_over, problems, read_engine_config, serve_line
    from ..lint.facts import rl_traps

    config = read_engine_config(options.source)
    args = laid_over(config.engine, settings(options.set, "max_model_len=4096"))
    traps = rl_traps(args, config.trainer)
    found, unchecked = [], ""
    try:
        with _quiet():
            found = list(problems(args))
            if options.model and not found:
                found += _whole(args, options.model)
    except ConfigError as e:  # no vLLM: what needs none is said all the same
        unchecked = str(e)
    if options.serve:  # what vllm.LLM alone refuses
        found = [problem for problem in found if problem.names != ("data_parallel_size",)]
    line = serve_line(args, options.model or "MODEL")
    wrong = bool(found) or (config.trainer is not None and any(trap.severity == "error" for trap in traps))
    if options.json:
        print(json.dumps(_as_json(config, args, found, traps, line, unchecked), indent=1, default=str))
    elif options.serve:
        for problem in found:
            print(f"trl-parity: {problem}", file=sys.stderr)
        if unchecked:
            print(f"trl-parity: {unchecked}", file=sys.stderr)
        print(line)
    else:
        _print(config, args, found, traps, line, unchecked)
    return 1 if wrong else 2 if unchecked else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """A check, not a run: what vLLM and its plugins log is not wanted."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    ours = logging.getLogger("trl_parity")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


def _whole(args: dict[str, Any], model: str) -> list[Any]:
    """What vLLM refuses when it makes its whole configuration for this model, as before an engine is built."""
    from ..engine.argument_schema import refusal
    from ..engine.config import Problem

    said = refusal(args | {"model": model}, whole=True)
    return [Problem((model,), f"vLLM refuses this model with them: {said}")] if said else []


def _as_json(config: Any, args: Any, found: Any, traps: Any, line: str, unchecked: str) -> dict[str, Any]:
    from dataclasses import asdict

    from ..engine.argument_schema import installed

    return {
        "source": config.where,
        "vllm": installed(),
        "checked": not unchecked,
        "arguments": args,
        "trainer": config.trainer,
        "reasons": {name: config.reasons[name] for name in args if name in config.reasons},
        "problems": [{"arguments": list(p.names), "text": p.text} for p in found],
        "for_rl": [asdict(trap) for trap in traps],
        "serve": line,
    }


def _print(config: Any, args: Any, found: Any, traps: Any, line: str, unchecked: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..engine.argument_schema import installed

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("argument", "value", "why, and what it costs"):
        table.add_column(column, overflow="fold")
    for name, value in args.items():
        shown = value if isinstance(value, str) else json.dumps(value, default=str)
        table.add_row(f"[bold]{escape(name)}[/]", escape(shown), escape(config.reasons.get(name, "")))
    for name, value in (config.trainer or {}).items():
        table.add_row(f"trainer: {escape(name)}", json.dumps(value, default=str), escape("on TRL's side"))
    console.print(table)
    console.print()
    for problem in found:
        names = ", ".join(problem.names)
        console.print(f"[bold red]problem[/]  [bold]{escape(names)}[/] {escape(problem.text)}", soft_wrap=True)
    if unchecked:
        console.print(f"[yellow]not checked[/]  {escape(unchecked)}", soft_wrap=True)
    elif not found:
        console.print(f"vLLM {installed()} takes all of them.")
    styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for trap in traps:
        words = f"[{styles[trap.severity]}]in RL, {trap.severity}[/]  {trap.cause}: {escape(trap.text)}"
        console.print(f"{words} [bold]Fix:[/] {escape(trap.fix)}", soft_wrap=True)
    console.print(f"\n[bold]a server:[/]  {escape(line)}", soft_wrap=True)
