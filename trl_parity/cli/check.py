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

from ..config.reading import settings
from ..progress import progress_bar

SHORT = "is this engine fit for RL, before the first step"

EXAMPLES = """examples:
  trl-parity check --model Qwen/Qwen3-0.6B --config configs/vllm_rl.yaml --trainer-dtype bfloat16
  trl-parity check --model runs/sft --config rl --set kv_cache_dtype=fp8 --output runs/check
  trl-parity check --model runs/sft --config rl --target-length 4096 --prompts prompts.jsonl --json > check.json

With --output a check that was killed goes on where it was: the same command again.

exit codes: 0 fit: no row fails, and whatever misses a limit misses it for noise of the dtype alone;
            1 unfit: at least one row fails;
            2 could not tell: a row was not run or needs more trials, or the input can't be used"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", required=True, metavar="NAME", help="folder or hub name of the model")
    parser.add_argument(
        "--config",
        default="rl",
        metavar="FILE",
        help="YAML of engine arguments, or the name of a preset (default: rl)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="lay one engine argument over it"
    )
    parser.add_argument("--trials", type=int, default=50, help="batches of prompts (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and sampling (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the training run (default: 1)")
    parser.add_argument(
        "--trainer-dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="of the trainer's weights and forward, whose noise the engine is measured against (default: float32)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="sampled after a prompt (default: 16)")
    parser.add_argument("--max-length", type=int, default=256, metavar="N", help="of a trial's prompts (default: 256)")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N", help="prompts in a trial (default: 8)")
    parser.add_argument(
        "--target-length", type=int, metavar="N",
        help="tokens the run works with; 125, 150 and 200 %% of it are checked (default: half of max_model_len)",
    )  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="JSONL of prompts to use in place of drawn ones")
    parser.add_argument("--baseline", metavar="DIR", help="also compare with a stored reference (trl-parity baseline)")
    parser.add_argument("--case", metavar="TEXT", help="this one batch only, as a failed check prints it")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="ROW", help="rows, or groups of them, not to run: they never pass"
    )
    parser.add_argument(
        "--budget", type=float, default=900.0, metavar="SECONDS",
        help="nothing new is begun after it; what is left is 'not run' (default: 900)",
    )  # fmt: skip
    for name, default, what in (
        ("max-mean-kl", 1e-3, "limit of the mean KL"),
        ("max-trial-kl", 3e-3, "limit of a trial's mean KL, and of a token's"),
        ("min-pass-rate", 0.995, "share of tokens within it"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="X", help=f"{what} (default: {default:g})"
        )
    parser.add_argument("--device", default="cpu", help="of the reference (default: cpu)")
    parser.add_argument("--output", metavar="DIR", help="check.json, report.md, pictures and trials.jsonl go here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    with _hushed():
        return _check(options)


def _check(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..engine.config import checked, laid_over, read_engine_config
    from ..preflight.check.check import run_check
    from ..preflight.check.report import as_json, print_table, with_commands, write
    from ..preflight.check.rows import EXIT_CODES, Limits
    from ..preflight.check.settings import CheckSettings

    given = read_engine_config(options.config)
    over = {name.replace("-", "_"): value for name, value in settings(options.set, "dtype=float32").items()}
    args = checked(laid_over(given.engine, over), given.where)
    args.pop("model", None)
    directory = Path(options.output) if options.output else None
    check = CheckSettings(
        model=options.model, engine_args=args, trials=options.trials, seed=options.seed,
        temperature=options.temperature, trainer_dtype=options.trainer_dtype, max_tokens=options.max_tokens,
        max_length=options.max_length, max_batch=options.max_batch, target_length=options.target_length,
        prompts=options.prompts, baseline=options.baseline, case=options.case, skip=tuple(options.skip),
        budget=options.budget, device=options.device,
        limits=Limits(mean_kl=options.max_mean_kl, max_kl=options.max_trial_kl, pass_rate=options.min_pass_rate),
    )  # fmt: skip
    with progress_bar("starting") as update, redirect_stdout(sys.stderr):  # stdout is the report's alone
        result = run_check(check, directory, lambda what, done, of: update(done, of, what))
    if result.resumed:
        print(f"went on with {result.resumed} findings of an earlier run in {directory}", file=sys.stderr)
    result = with_commands(result, _again(options))
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


def _again(options: argparse.Namespace) -> list[str]:
    """The arguments that reproduce a case: what this command was given, without what is only about output."""
    words = ["--model", options.model, "--config", options.config]
    for item in options.set:
        words += ["--set", item]
    for name in ("seed", "temperature", "trainer_dtype", "max_tokens"):
        default = {"seed": 0, "temperature": 1.0, "trainer_dtype": "float32", "max_tokens": 16}[name]
        if getattr(options, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return words
