"""Find known traps in a run's settings before it starts: raw log-probs, two temperatures, truncation,
penalties, dropout, dtypes and heads that differ, a server's own defaults. A running callback checks the live engine
and trainer with the same rules, and says so before the first update. What only the engine knows is not guessed."""

from __future__ import annotations

import argparse
import json

from ..config.reading import read_mapping, settings
from ..errors import ConfigError

SHORT = "find known traps in a run's settings"

EXAMPLES = """examples:
  trl-parity lint configs/grpo_gpu.yaml
  trl-parity lint configs/grpo_gpu.yaml --set top_p=0.9 --set temperature=0.7
  trl-parity lint configs/grpo_gpu.yaml --serve "vllm serve Qwen/Qwen3-0.6B --host 127.0.0.1 --max-model-len 1024"

exit codes: 0 no error found, 1 at least one, 2 the input can't be used"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="YAML file of TRL's and trl-parity's settings, as the recipes use")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="lay one setting over it")
    parser.add_argument("--serve", metavar="LINE", help="how the server is started: 'vllm serve MODEL --dtype ...'")
    parser.add_argument("--trainer", choices=["grpo", "rloo"], default="grpo", help="default: grpo")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")


def _refuse_typos(names: list[str], options: argparse.Namespace) -> None:
    """Raise ConfigError for a name that is no setting: what it was meant to change would be judged as it is."""
    from ..config.parity import ParityConfig
    from ..config.rules import nearest
    from ..trainers.setting_names import setting_names

    known = [*setting_names(options.trainer), *ParityConfig.__dataclass_fields__]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--set: unknown setting {name!r}{nearest(name, known)}. Expected one that {options.config} has, or a "
                f"field of TRL's {options.trainer.upper()}Config, its ModelConfig or ParityConfig."
            )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from dataclasses import asdict

    from ..lint.facts import configured_facts
    from ..lint.rules import lint

    values, given = read_mapping(options.config, "temperature: 0.7"), settings(options.set, "top_p=0.9")
    if unknown := [name for name in given if name not in values]:
        _refuse_typos(unknown, options)
    values |= given
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
