"""Follow metrics.jsonl of a running job: status, streak, each statistic with its noise floor, how much of its
limit it uses, and its last windows. Copes with restarts and with a file that is not there yet; Ctrl-C ends it. Where
the output is no terminal, each new window is one plain line."""

from __future__ import annotations

import argparse

SHORT = "follow a running job in the terminal"

EXAMPLES = """examples:
  trl-parity watch runs/mine
  trl-parity watch runs/mine --once
  trl-parity watch runs/mine >> parity.log &

exit codes: 0 ended with --once or by Ctrl-C, whatever the run's status; 2 the input can't be used, or with --once
is not there"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("path", help="metrics.jsonl, or the folder of the run; it need not exist yet")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="how often to look (default: 1)")
    parser.add_argument("--once", action="store_true", help="show the run as it is now, and end")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    from ..errors import DataError
    from ..report.follow import follow
    from ..results.paths import is_run, metrics_path

    if options.once and not is_run(options.path):
        raise DataError(
            f"{metrics_path(options.path)} is no file: no window of a run was judged yet. Give the folder of a run "
            "(its output_dir), or leave --once out to wait for it."
        )
    try:
        for _ in follow(options.path, Console(), every=options.every, once=options.once):
            pass
    except KeyboardInterrupt:
        pass
    return 0
