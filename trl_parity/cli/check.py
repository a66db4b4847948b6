"""Is this engine fit for RL with this model? The real vLLM engine is started with the given settings and
compared, token by token, with the transformers model in fp32, and with itself: KL over the whole vocabulary,
what the log-probs mean, precision, weights, positions, caches, batches, weight updates. Needs no network."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import fields
from ..config.reading import settings
from ..lines import about, progress_bar

if TYPE_CHECKING:
    from ..preflight.check.settings import CheckSettings

SHORT = "is this engine fit for RL, before the first step"

EXAMPLES = """examples:
  trl-parity check --model Qwen/Qwen3-0.6B --config configs/vllm_rl.yaml --trainer-dtype bfloat16
  trl-parity check --model runs/sft --config rl --set kv_cache_dtype=fp8 --output runs/check
  trl-parity check --model runs/sft --config rl --target-length 4096 --prompts prompts.jsonl --json > check.json

With --output a check that was killed goes on where it was: the same command again.

exit codes: 0 fit: no row fails, and whatever misses a limit misses it for noise of the dtype alone;
            1 unfit: at least one row fails;
            2 could not tell: a row that is needed was not run or needs more trials, or the input can't be used"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from ..preflight.check.rows import Limits
    from ..preflight.check.settings import CheckSettings

    parser.add_argument(
        "--config",
        default="rl",
        metavar="FILE",
        help="YAML of engine arguments, or the name of a preset (default: rl)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="lay one engine argument over it"
    )
    fields.add_arguments(parser, CheckSettings)
    fields.add_arguments(parser, Limits)
    parser.add_argument("--output", metavar="DIR", help="check.json, report.md, pictures and trials.jsonl go here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    with _hushed():
        return _check(options)


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..engine.config import checked, laid_over, read_engine_config
    from ..preflight.check.left import TimeLeft
    from ..preflight.check.report import as_json, print_table, with_commands, write
    from ..preflight.check.rows import EXIT_CODES, Limits
    from ..preflight.check.settings import STAGES, CheckSettings

    given = read_engine_config(options.config)
    over = {name.replace("-", "_"): value for name, value in settings(options.set, "dtype=float32").items()}
    args = checked(laid_over(given.engine, over), given.where)
    args.pop("model", None)
    directory = Path(options.output) if options.output else None
    limits = fields.from_arguments(Limits, options)
    check = fields.from_arguments(CheckSettings, options, engine_args=args, limits=limits)
    without = [name for name, (group, _) in STAGES.items() if group in check.skip]
    left = TimeLeft(check.model, [*without, *([] if check.baseline else ["baseline"])])
    with progress_bar("starting", logged=True) as update, redirect_stdout(sys.stderr):  # stdout is the report's alone

        def tell(what: str, done: int, of: int) -> None:
            update(done, of, what, about(left(what, done, of)))

        tell("starting", 0, 0)
        from ..preflight.check.check import run_check  # takes seconds

        result = run_check(check, directory, tell)
    if result.resumed:
        print(f"went on with {result.resumed} findings of an earlier run in {directory}", file=sys.stderr)
    result = with_commands(result, _again(options, check))
    if directory is not None:
        write(result, directory)
    if options.json:
        sys.stdout.write(as_json(result))
    else:
        print_table(result, Console(highlight=False))
        if directory is not None:
            print(f"{directory / 'report.md'}")
    return EXIT_CODES[result.outcome]


@contextmanager
def _hushed() -> Iterator[None]:
    """Before anything heavy is imported: of libraries, errors only."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    ours = logging.getLogger("trl_parity")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.setLevel(level)


def _again(options: argparse.Namespace, check: CheckSettings) -> list[str]:
    """The arguments that reproduce a case: what this command was given, without what is only about output."""
    from ..preflight.check.settings import CheckSettings

    words = ["--model", options.model, "--config", options.config]
    for item in options.set:
        words += ["--set", item]
    for name in ("seed", "temperature", "trainer_dtype", "max_tokens"):
        if getattr(check, name) != fields.default_of(CheckSettings.__dataclass_fields__[name]):
            words += [f"--{name.replace('_', '-')}", str(getattr(check, name))]
    return words
