"""Run a short training, and say whether to scale up: did engine and trainer stay one policy (status, drift over its
noise floor), did entropy hold, do rewards look like a stored baseline's? The training is your own launch command after
`--`, with ParityCallback in it. --max_steps and --output_dir are appended, as TRL's parser (TrlParser,
HfArgumentParser) reads them; a command with {steps} or {output} in it gets them there instead, and nothing appended.
Without a command, the folder of a finished run is judged. Its output goes to stderr, the result to stdout and to
pilot.json in the run's folder."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError

SHORT = "run a short training, and say whether to scale up"

EXAMPLES = """examples:
  trl-parity pilot --steps 20 --output runs/pilot --save-baseline rewards.json -- \\
      accelerate launch --main_process_port 0 recipes/grpo/train.py --config configs/grpo_gpu.yaml
  trl-parity pilot --steps 20 --output runs/pilot2 --baseline rewards.json -- \\
      accelerate launch --main_process_port 0 recipes/grpo/train.py --config configs/grpo_gpu.yaml --learning_rate 1e-5
  trl-parity pilot --output runs/pilot -- python train.py --n {steps} --out {output}
  trl-parity pilot --output runs/mine --baseline rewards.json        # a run that is over

exit codes: 0 scale up; 1 don't, as the reasons say; 2 could not tell (it crashed, nothing was measured, too few
rewards), or the input can't be used"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder of the run; new or empty, if there is a command")
    add("--steps", type=int, metavar="N", help="optimizer steps (default: 20)")
    add(
        "--baseline",
        metavar="FILE",
        help="rewards to compare with: an earlier pilot's, or any run's parity/rewards.json",
    )
    add("--save-baseline", metavar="FILE", help="keep the rewards for later, unless the training or parity failed")
    add("--min-effect", type=float, default=0.2, metavar="D", help="Cliff's delta or Kolmogorov-Smirnov distance from "
        "which on rewards count as other ones (default: 0.2)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("launch", nargs="*", metavar="-- COMMAND", help="what starts the training")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..credentials import without_credentials
    from ..files import write_atomic
    from ..metrics.rewards import RewardBaseline
    from ..preflight.pilot import PilotOutcome, judge_pilot

    if not 0 < options.min_effect <= 1:
        raise ConfigError(f"--min-effect is {options.min_effect:g}. Expected a number above 0 and up to 1.")
    baseline = RewardBaseline.load(options.baseline) if options.baseline else None  # before hours of training
    output, steps, returncode, command = Path(options.output), options.steps, 0, None
    if options.launch:
        steps = 20 if steps is None else steps
        command = launch_command(options.launch, steps, output)
        returncode = _train(command, output)
    elif not output.exists():
        raise ConfigError(f"there is no {output}, and no command after `--`. Expected a finished run or a command.")
    report = judge_pilot(output, baseline, min_effect=options.min_effect, steps=steps, returncode=returncode)
    told = without_credentials(command)  # what else stands in it is for the reader of pilot.json
    result = report.to_dict() | {"command": told, "returncode": returncode, "baseline": options.baseline}
    outcomes = {check.name: check.outcome for check in report.checks}
    if options.save_baseline:
        sound = outcomes["training"] is PilotOutcome.PASS and outcomes["parity"] is PilotOutcome.PASS
        result["saved"] = bool(sound and report.rewards)
        if sound and report.rewards is not None:
            RewardBaseline(report.rewards.rewards, str(output)).save(options.save_baseline)
        else:
            print(f"trl-parity: {options.save_baseline} was not written: no rewards of a sound run", file=sys.stderr)
    if output.is_dir():
        write_atomic(output / "pilot.json", json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        _print(report)
    return report.decision.exit_code


def launch_command(launch: list[str], steps: int, output: Path) -> list[str]:
    """The command with its overrides: in place of {steps} and {output}, or appended as TRL's parser reads them."""
    if steps < 1:
        raise ConfigError(f"--steps is {steps}. Expected at least 1.")
    if any("{steps}" in word or "{output}" in word for word in launch):
        return [word.replace("{steps}", str(steps)).replace("{output}", str(output)) for word in launch]
    return [*launch, "--max_steps", str(steps), "--output_dir", str(output)]


def _train(command: list[str], output: Path) -> int:
    """The exit code of the training, whose output goes to stderr."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty. Expected a new folder, so that no earlier run is judged.")
    try:
        return subprocess.run(command, stdout=sys.stderr.fileno(), check=False).returncode
    except OSError as e:
        raise ConfigError(f"cannot start {command[0]!r}: {e.strerror}. Expected a command after `--`.") from e


def _print(report: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..report.escape import visible

    styles = {"pass": "green", "fail": "bold red", "unknown": "yellow"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in report.checks:
        table.add_row(check.name, f"[{styles[check.outcome]}]{check.outcome}[/]", escape(visible(check.text)))
    console = Console(highlight=False)
    console.print(table)
    style = {0: "bold green", 1: "bold red", 2: "bold yellow"}[report.decision.exit_code]
    console.print(f"[{style}]{report.decision}[/]")
