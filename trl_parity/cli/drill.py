"""Break the real stack on purpose, train a few GRPO steps with ParityCallback, and see whether the fault is
detected, how fast, and which cause is named. Needs the repository (recipes/drill) and vLLM; a CPU is enough. Progress
goes to stderr, the result to stdout."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError

SHORT = "break the stack on purpose and see what is named"

EXAMPLES = """examples:
  trl-parity drill --list
  trl-parity drill lost-sync                      # one run, with a control beside it
  trl-parity drill temperature top-p --seeds 0 1 2 --temperatures 0.7 1.0
  trl-parity drill --all --json > drills.json
  trl-parity drill dropout --keep runs/drill

exit codes: 0 all detected and named as expected, 1 some not, 2 the input can't be used"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="drills to run")
    parser.add_argument("--all", action="store_true", help="run all drills, the control included")
    parser.add_argument("--list", action="store_true", help="list the drills, and end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="seeds (default: 0)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7], metavar="T", help="default: 0.7")
    parser.add_argument(
        "--model", metavar="PATH", help="folder of a model (default: the recipe's tiny one, built once)"
    )
    parser.add_argument("--keep", metavar="DIR", help="keep the runs' folders here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import importlib.util

    places = (Path(__file__).resolve().parent.parent.parent, Path.cwd())
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
