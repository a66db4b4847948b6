"""The ``trl-parity`` command: one module a subcommand, whose docstring is the help; each imports what it runs when it
runs it, so that ``--help`` needs no torch.

Exit codes: 0 done, and what was asked holds; 1 it does not (a drill was missed or misnamed, lint found an error); 2 it
can't be told, as where the input can't be used or something failed (said in one line on stderr; with
``TRL_PARITY_DEBUG=1`` behind the traceback); 130 interrupted by Ctrl-C. A crash is never a verdict.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from .._version import __version__
from ..errors import ParityError

__all__ = ["main"]

_LONGEST = 4000  # characters of an error

# in the order --help lists them: before a run, during, after, and ourselves
COMMANDS = (
    "check", "atlas", "baseline", "engine", "lint", "pilot", "watch", "report", "compare", "replay", "panels", "drill",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Raises SystemExit for ``--help``, and for arguments that are none."""
    try:
        options = _parser().parse_args(argv)
        code = _run(options)
        sys.stdout.flush()  # what is not told is no verdict
    except ParityError as e:
        return _failed(str(e))
    except KeyboardInterrupt:
        _failed("interrupted")
        return 130
    except BrokenPipeError:  # `| head`: nobody reads on, and nothing is to be said of it when stdout is closed
        with suppress(Exception):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except Exception as e:
        seen = " ".join(f"{type(e).__name__}: {e}".split())
        return _failed(f"{seen}. A failure of ours or of a library, no answer. TRL_PARITY_DEBUG=1 shows where.")
    return code


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except SystemExit as e:  # of a library: its 1 is not ours
        if e.code in (None, 0):
            return 0
        return _failed(f"a library ended the process: {e.code}")


def _failed(message: str) -> int:
    """Say in one line why nothing can be told."""
    with suppress(Exception):  # nobody is there to be told
        if os.environ.get("TRL_PARITY_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"trl-parity: {_shown(message)}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
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
    return parser


def _shown(message: str) -> str:
    """What may quote a file: as a terminal can take it, and no longer than a person reads."""
    from ..report.escape import visible
    from ..report.format import cut

    return "\n".join(visible(line) for line in cut(message, _LONGEST).split("\n"))


if __name__ == "__main__":
    sys.exit(main())
