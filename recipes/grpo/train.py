"""GRPO with a vLLM engine and trl-parity watching that both are the same policy.

On a CPU, with a tiny model that this recipe trains first (a minute or two in all):

    accelerate launch --cpu --num_processes 1 recipes/grpo/train.py --config configs/grpo_tiny_cpu.yaml

On GPUs, the same file:

    accelerate launch --main_process_port 0 recipes/grpo/train.py --config configs/grpo_gpu.yaml

Every field of the YAML file is also an option, e.g. ``--max_steps 5 --action log``.

Exit codes: 0 the run went through; 3 trl-parity halted it, and the last line of stderr says why (``accelerate launch``
exits with 1 then; with ``--quiet`` it adds no traceback of its own to that line); anything else is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import netrc
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

HALTED = 3
TINY = "tiny"


@dataclass
class RecipeArguments:
    """What this recipe adds to TRL's own arguments."""

    train_size: int = field(default=512, metadata={"help": "Prompts in the training set."})
    eval_size: int = field(
        default=64, metadata={"help": "Held-out prompts, used when eval_strategy (or eval_on_start) is set."}
    )
    task_length: int = field(
        default=5, metadata={"help": "Characters to sort in a prompt. The tiny model knows 5 digits only."}
    )
    task_alphabet: str = field(
        default="digits", metadata={"help": "What is sorted.", "choices": ["digits", "letters"]}
    )
    tiny_cache: str = field(
        default=".cache/trl-parity",
        metadata={"help": "Where the tiny model of `model_name_or_path: tiny` is kept once it is trained."},
    )


def set_environment(argv: list[str]) -> None:
    """Settle what OpenMP, vLLM, the hub client and W&B read from the environment when they are imported.

    The ``env`` block of the config wins (TrlParser sets it too, but later), then what is already set, then defaults.
    """
    import yaml

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--model_name_or_path")
    known, _ = parser.parse_known_args(argv)
    config = yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) if known.config else {}
    os.environ.update({key: str(value) for key, value in (config.get("env") or {}).items()})
    model = known.model_name_or_path or config.get("model_name_or_path")
    if model == TINY:  # nothing to look up on the hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # not before: OpenMP counts its threads now

    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default takes half of the memory
    if "WORLD_SIZE" not in os.environ:  # else the launcher's; two runs that start at once would find the same one free
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("WANDB_PROJECT", "trl-parity")
    if not wandb_login():
        os.environ.setdefault("WANDB_MODE", "offline")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wandb_login() -> bool:
    """Whether W&B credentials are configured: an API key in the environment or a `wandb login` in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    names = (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")
    path = next((p for n in names if n and (p := Path(n).expanduser()).is_file()), None)
    try:
        return path is not None and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def parse(argv: list[str]) -> tuple[Any, ...]:
    from trl import GRPOConfig, ModelConfig, TrlParser

    from trl_parity import ParityConfig

    parser = TrlParser(
        (RecipeArguments, GRPOConfig, ModelConfig, ParityConfig),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser.parse_args_and_config(argv)


def main(argv: list[str]) -> int:
    set_environment(argv)
    recipe, args, model_args, parity_args = parse(argv)

    import task
    import tiny_model
    from transformers import AutoTokenizer
    from trl import GRPOTrainer, get_peft_config, get_quantization_config

    from trl_parity import ParityCallback

    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DIR", str(args.output_dir))
    if model_args.model_name_or_path == TINY:
        with args.main_process_first(desc="training the tiny model"):
            model_args.model_name_or_path = str(tiny_model.build(recipe.tiny_cache))

    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, padding_side="left"
    )
    kind = {
        "length": recipe.task_length,
        "alphabet": task.DIGITS if recipe.task_alphabet == "digits" else task.LETTERS,
        "chat": tokenizer.chat_template is not None,
    }
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (args.model_init_kwargs or {})

    parity = ParityCallback(parity_args)  # before the trainer: on a CPU it prepares vLLM for weight sync
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=args,
        reward_funcs=[task.exact, task.closeness],
        train_dataset=task.make_dataset(recipe.train_size, args.seed, "train", **kind),
        eval_dataset=task.make_dataset(recipe.eval_size, args.seed, "eval", **kind),
        processing_class=tokenizer,
        callbacks=[parity],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if not args.disable_tqdm:
        short_progress(trainer)
    halted = train_watched(trainer, parity, resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.accelerator.is_main_process:
        path = metrics_path(args, parity_args)
        summarize(read_windows(path), path, trainer.state.log_history, args, halted is not None)
    return exit_code(halted)


def train_watched(trainer: Any, parity: Any, **train_args: Any) -> Exception | None:
    """Train and save the model; where trl-parity halted the run, nothing is saved, and what it says is returned."""
    from trl_parity import ParityHalt

    try:
        trainer.train(**train_args)
        parity.raise_if_halted()  # on every rank, as saving needs all of them
    except ParityHalt as halt:
        return halt
    trainer.save_model(trainer.args.output_dir)
    return None


def exit_code(halted: Exception | None) -> int:
    """0; of a halted run 3, and the reason is the last line of stderr."""
    if halted is None:
        return 0
    print(str(halted).splitlines()[-1], file=sys.stderr, flush=True)
    return HALTED


def short_progress(trainer: Any) -> None:
    """One readable line a log instead of the dictionary of some seventy values; the trackers get them all."""
    from transformers.trainer_callback import ProgressCallback

    class StepLines(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and "reward" in logs:
                shown = (("accuracy", "rewards/exact/mean", ".2f"), ("reward", "reward", ".2f"))
                shown += (("entropy", "entropy", ".2f"), ("k3 KL", "parity/kl_k3", ".1e"))
                shown += (("max |log-ratio|", "parity/logp_abs_diff/max", ".1e"),)
                parts = [status_name(logs.get("parity/breaker/status"))]
                parts += [f"{name} {logs[key]:{form}}" for name, key, form in shown if key in logs]
                self.training_bar.write("  ".join([f"step {state.global_step:>4}", *parts]))

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepLines)


def status_name(code: float | None) -> str:
    """The verdict behind the number that trackers plot; '-' where none was logged."""
    from trl_parity import Status

    return next((str(status) for status in Status if status.code == code), "-")


def metrics_path(args: Any, parity_args: Any) -> Path:
    return Path(parity_args.parity_dir or Path(args.output_dir) / "parity") / "metrics.jsonl"


def read_windows(path: Path) -> list[dict[str, Any]]:
    """The windows in trl-parity's file, oldest first; a line torn by a kill is passed over."""
    windows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            windows.append(json.loads(line))
    return windows


def worst(windows: list[dict[str, Any]], stat: str) -> str:
    measured = [w for w in windows if w.get(stat) is not None]
    if not measured:
        return "not measured"
    window = max(measured, key=lambda w: w[stat])
    return f"{window[stat]:.2e} (step {window['step']})"


def trend(history: list[dict[str, Any]], key: str, span: int = 5) -> str:
    """Means over the first and the last ``span`` logs."""
    values = [row[key] for row in history if key in row]
    if not values:
        return "not logged"
    first, last = values[:span], values[-span:]
    return (
        f"{sum(first) / len(first):.2f} -> {sum(last) / len(last):.2f} (means of the first and last {len(last)} logs)"
    )


def summarize(
    windows: list[dict[str, Any]], path: Path, history: list[dict[str, Any]], args: Any, halted: bool
) -> None:
    """Print what came out and where it lies."""
    from rich.console import Console
    from rich.table import Table

    wandb_dir = finish_wandb() if "wandb" in args.report_to else None
    last = windows[-1] if windows else {"status": "nothing was measured", "step": "?", "breaches": []}
    table = Table(title="trl-parity: engine against trainer", show_header=False, title_justify="left")
    table.add_row("last verdict", f"{last['status']} (step {last['step']})", style="bold red" if halted else "bold")
    table.add_row("windows measured", f"{len(windows)}: {count_statuses(windows)}")
    if last["breaches"]:
        table.add_row("rules breached", ", ".join(last["breaches"]))
    table.add_row("worst k3 KL", f"{worst(windows, 'kl_k3')} nats/token")
    if last.get("floor/kl_k3") is not None:
        table.add_row("its noise floor", f"{last['floor/kl_k3']:.2e} nats/token")
    table.add_row("worst |log-ratio|", f"{worst(windows, 'logp_abs_diff/max')} nats")
    table.add_row("reward", trend(history, "reward"))
    table.add_row("accuracy", trend(history, "rewards/exact/mean"))
    table.add_row("entropy, nats/token", trend(history, "entropy"))
    console = Console(soft_wrap=True)
    console.print(table)
    page = Path(args.output_dir) / "report.html"
    lines = {
        "Every window": path,
        "What it came to": f"{command('trl-parity')} report {args.output_dir}",
        "As a page": f"{command('trl-parity')} report {args.output_dir} --html {page}",
    }
    if wandb_dir is not None:
        wandb = command("wandb")
        lines |= {"Curves, here": f"{wandb} leet {wandb_dir}", "As JSON": f"{wandb} leet inspect --json {wandb_dir}"}
        if wandb_dir.name.startswith("offline-"):
            lines["In the browser"] = f"{wandb} sync {wandb_dir}"
    for name, line in lines.items():
        console.print(f"{name + ':':<18} {line}", highlight=False)
    if halted:
        console.print(
            "[bold red]trl-parity halted this run[/]: the engine that sampled and the trainer that learns were not "
            f"the same policy. The condemned batch was not learned from. Exit code {HALTED}."
        )


def command(name: str) -> str:
    """A program of this environment as it can be typed: by its name where the environment is activated."""
    folder = Path(sys.executable).parent
    active = os.environ.get("VIRTUAL_ENV") == str(folder.parent) or not (folder / name).exists()
    return name if active else os.path.relpath(folder / name)


def count_statuses(windows: list[dict[str, Any]]) -> str:
    statuses = [w["status"] for w in windows]
    return ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)) or "no status"


def finish_wandb() -> Path | None:
    """Close the W&B run, so that its files are whole; the folder they are in."""
    import wandb

    if wandb.run is None:
        return None
    folder = Path(wandb.run.dir).parent
    wandb.finish()
    return Path(os.path.relpath(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
