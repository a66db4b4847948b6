"""The ``trl-parity`` command: one module a subcommand, whose docstring is the help; each imports what it runs when it
runs it, so that ``--help`` needs no torch.

Exit codes: 0 done, and what was asked holds; 1 it does not (a drill was missed or misnamed, lint found an error); 2 it
can't be told, as where the input can't be used (said in one line on stderr).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import ParityError

__all__ = ["main"]

_LONGEST = 4000  # characters of an error

# in the order --help lists them: before a run, during, after, and ourselves
COMMANDS = ("check", "baseline", "engine", "lint", "pilot", "watch", "report", "compare", "replay", "panels", "drill")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="trl-parity",
        description="Is the vLLM engine that samples the same policy as the TRL trainer that learns?",
        epilog="exit codes: 0 done, and what was asked holds; 1 it does not; 2 it can't be told, or the input\n"
        "can't be used. Each command's own help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl-parity {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        sub = commands.add_parser(
            name,
            help=module.SHORT,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    options = parser.parse_args(argv)
    try:
        return int(options.run(options))
    except ParityError as e:
        print(f"trl-parity: {_shown(str(e))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
        return 0


def _shown(message: str) -> str:
    """What may quote a file: as a terminal can take it, and no longer than a person reads."""
    from ..report.escape import visible
    from ..report.format import cut

    return "\n".join(visible(line) for line in cut(message, _LONGEST).split("\n"))


if __name__ == "__main__":
    sys.exit(main())
