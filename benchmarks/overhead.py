"""What ParityCallback costs: the same GRPO training with and without it, one process each, step by step.

    python benchmarks/overhead.py                      # recipe's tiny model, CPU, about 3 minutes
    python benchmarks/overhead.py --steps 60 --pairs 3 --json overhead.json

Both arms generate from the same per-request seeds, and training is bit-equal with and without the callback, so step k
of one arm does exactly the work of step k of the other. The table gives the step time of each arm, the ratio of paired
steps (median over all pairs: robust against a busy machine), and the callback's own account of itself
(``parity/cost/share``: host seconds inside trl-parity over wall seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # steps left out: first generations compile and fill caches


def run_arm(arm: str, steps: int, batch: int, length: int, out: Path) -> None:
    """One training in this process; writes step seconds and cost shares as JSON."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the recipe: so small a model only waits for a second thread
    sys.path.insert(0, str(ROOT / "recipes" / "grpo"))
    import task
    import tiny_model
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from trl_parity import ParityCallback
    from trl_parity.engine.cpu import prepare_cpu_engine

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            self.seconds.append(time.perf_counter() - self.start)

    prepare_cpu_engine()  # both arms on the same engine
    parity = ParityCallback() if arm == "with" else None
    callbacks = ([parity] if parity else []) + [Clock()]
    with tempfile.TemporaryDirectory() as directory:
        args = GRPOConfig(
            output_dir=directory,
            use_cpu=True,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.1,
            vllm_max_model_length=128,
            per_device_train_batch_size=batch,
            num_generations=8,
            max_completion_length=length,
            temperature=0.7,
            learning_rate=1e-5,
            max_steps=steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            beta=0.0,
            generation_kwargs={"seed": 1},
        )
        model = str(tiny_model.build())
        trainer = GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=[task.exact, task.closeness],
            train_dataset=task.make_dataset(max(64, batch * steps), seed=0, split="train"),
            callbacks=callbacks,
        )
        trainer.train()
    shares = [v.stats["cost/share"] for v in parity.verdicts if v.stats] if parity else []
    out.write_text(json.dumps({"seconds": Clock.seconds, "shares": shares}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=1, help="trainings per arm, in alternation")
    parser.add_argument("--batch", type=int, default=64, help="completions per step")
    parser.add_argument("--length", type=int, default=40, help="completion tokens at most")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--arm", choices=["with", "without"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options.arm, options.steps, options.batch, options.length, options.out)
        return
    runs: dict[str, list[dict]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as directory:
        for pair in range(options.pairs):
            for arm in ("without", "with") if pair % 2 == 0 else ("with", "without"):
                print(f"pair {pair + 1}/{options.pairs}: training {arm} the callback ...", flush=True)
                out = Path(directory) / f"{arm}-{pair}.json"
                sizes = ["--steps", options.steps, "--batch", options.batch, "--length", options.length]
                command = [sys.executable, __file__, "--arm", arm, "--out", out, *sizes]
                log = Path(directory) / "log"
                with open(log, "w") as f:
                    done = subprocess.run([str(x) for x in command], stdout=f, stderr=subprocess.STDOUT)
                if done.returncode:
                    sys.exit(f"the training {arm} the callback failed:\n{log.read_text()[-3000:]}")
                runs[arm].append(json.loads(out.read_text()))
    report(runs, options)


def report(runs: dict[str, list[dict]], options: argparse.Namespace) -> None:
    import torch
    import trl
    import vllm
    from rich.console import Console
    from rich.table import Table

    steps = {arm: [s for run in rs for s in run["seconds"][WARM_UP:]] for arm, rs in runs.items()}
    ratios = [a / b for a, b in zip(steps["with"], steps["without"], strict=True)]
    shares = [s for run in runs["with"] for s in run["shares"][WARM_UP:]]

    def spread(values: list[float], scale: float, unit: str) -> list[str]:
        low, middle, high = (x * scale for x in (min(values), statistics.median(values), max(values)))
        quarters = statistics.quantiles(values, n=4)
        return [
            f"{middle:.3f} {unit}",
            f"{quarters[0] * scale:.3f} to {quarters[2] * scale:.3f}",
            f"{low:.3f} to {high:.3f}",
        ]

    table = Table(title=f"{len(ratios)} paired steps, {options.batch} completions of at most {options.length} tokens")
    for column in ("", "median", "middle half", "all"):
        table.add_column(column)
    table.add_row("step without", *spread(steps["without"], 1e3, "ms"))
    table.add_row("step with", *spread(steps["with"], 1e3, "ms"))
    table.add_row("ratio of paired steps", *spread(ratios, 1, ""))
    table.add_row("parity/cost/share", *spread(shares, 100, "%"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, trl {trl.__version__}, vllm {vllm.__version__}"
    Console(width=100).print(table, machine, versions, sep="\n")
    if options.json:
        figures = {"steps": steps, "ratios": ratios, "shares": shares, "machine": machine, "versions": versions}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
