"""How often a healthy run is warned about, breached or halted: it should be never, seldom and never.

    python benchmarks/false_alarms.py --quick              # 60 rollout batches, a minute
    python benchmarks/false_alarms.py                      # 1,200 batches: 3 seeds x 4 temperatures x 4 learning rates
    python benchmarks/false_alarms.py --seeds 0 --steps 8  # 128 of them
    python benchmarks/false_alarms.py --models tiny Llama GPT2 Gemma2 Qwen3Moe --seeds 0 1 --steps 16 --json grpo.json
    python benchmarks/false_alarms.py --trainer rloo --seeds 0 --json rloo.json
    python benchmarks/false_alarms.py --models smollm2 --temperatures 0.7 1 --rates 1e-6 1e-5 --seeds 0 --steps 10
    python benchmarks/false_alarms.py --trainer async --temperatures 0.7 1 --rates 1e-6 1e-4 --seeds 0
    python benchmarks/false_alarms.py --kept grpo.json rloo.json    # both in one table, nothing is run

Every batch is a real rollout of a real vLLM engine in a real run of TRL whose policy moves, from not at all to visibly
sharpening (entropy is in the table). Nothing is wrong in any of them, so every WARN, BREACH and HALT is a false one,
and so is every incident left on disk. The second table gives, for each rule, how close a clean window came to its
limit (the largest and the 99.9th percentile of value / limit) and in how many windows it warned and breached.
``--models``: the recipe's (tiny), random ones of other architectures (held_out.py) and smollm2 (smollm2.py), one
process each. ``--trainer async``: TRL's AsyncGRPOTrainer with a vLLM server; plain torch stands in for its GPU kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import runs

SEEDS, TEMPERATURES, RATES = (0, 1, 2), (0.5, 0.7, 1.0, 1.3), (1e-6, 1e-4, 3e-4, 1e-3)


def model_folder(name: str, folder: Path) -> str:
    """Where the model lies; a random one is made in ``folder``."""
    if name == "tiny":
        return runs.tiny()
    if name == "smollm2":
        import smollm2

        return str(smollm2.build(runs.CACHE))
    from held_out import model_of

    return model_of(name, folder)


@contextlib.contextmanager
def trainers(model: str, kind: str) -> Iterator[Callable[..., Any]]:
    """What makes a trainer of a callback and fields of its config, while the engine of all of them lives."""
    if kind == "async":
        with async_trainers(model) as make:
            yield make
    else:
        with runs.shared_engine():
            yield lambda callback, **fields: runs.make_trainer(model, [callback], trainer=kind, **fields)


@contextlib.contextmanager
def async_trainers(model: str) -> Iterator[Callable[..., Any]]:
    sys.path.append(str(runs.ROOT / "tests"))
    import task
    from support.async_stack import async_args, on_a_cpu, saved_tokenizer
    from support.vllm_server import Server
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    from trl_parity.engine.weight_transfer import FileTransfer

    on_a_cpu()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(model, Path(folder) / "server.log")
        try:
            url = server.run("processed_logprobs").url

            def make(callback: Any, **fields: Any) -> Any:
                # a short queue: the worker stops at once when it has nothing left to hand over
                args = async_args(Path(tempfile.mkdtemp()), vllm_server_base_url=url, queue_maxsize=16, **fields)
                chats = task.make_dataset(64, seed=args.seed, split="train").map(
                    lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}
                )
                return AsyncGRPOTrainer(
                    model=model, args=args, reward_funcs=[task.exact, task.closeness], train_dataset=chats,
                    processing_class=saved_tokenizer(model), callbacks=[callback], weight_transfer=FileTransfer(url),
                )  # fmt: skip

            yield make
        finally:
            server.stop()


def closeness(callback: Any) -> dict[str, list[float]]:
    """Per statistic with a rule: value / limit in every window."""
    from trl_parity.judging.breaker import read

    out = defaultdict(list)
    for verdict in callback.verdicts:
        for rule in callback.monitor.breaker.rules:
            reading = read(rule, verdict.stats)
            if reading is not None and reading.limit:
                shown = (
                    reading.limit / reading.value if rule.below and reading.value else reading.value / reading.limit
                )
                out[rule.stat].append(shown)
    return out


def measure(
    seeds: Any, temperatures: Any, rates: Any, steps: int, name: str = "tiny", kind: str = "grpo"
) -> dict[str, Any]:
    """All runs of a model, one after the other, on one engine."""
    from both_models import MODELS

    from trl_parity import ParityCallback

    rows, close = [], defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, trainers(model_folder(name, Path(folder)), kind) as make:
        grid = list(itertools.product(temperatures, rates, seeds))
        for i, (temperature, rate, seed) in enumerate(grid):
            start = time.perf_counter()
            fields = {"seed": seed, "temperature": temperature, "learning_rate": rate, "max_steps": steps}
            callback = ParityCallback(action="log")
            trainer = make(callback, **MODELS.get(name, {}) | fields)
            trainer.train()
            for stat, values in closeness(callback).items():
                close[stat] += values
            verdicts = list(callback.verdicts)
            entropy = [v.stats["entropy/trainer"] for v in verdicts]
            rows.append(
                {
                    "model": name,
                    "trainer": kind,
                    "temperature": temperature,
                    "rate": rate,
                    "seed": seed,
                    "statuses": Counter(str(v.status) for v in verdicts),
                    "warnings": Counter(stat for v in verdicts for stat in v.warnings),
                    "breaches": Counter(stat for v in verdicts for stat in v.breaches),
                    "alarms": [f"step {v.step}: {v.status} {v.reason}" for v in verdicts if v.status != "OK"],
                    "incidents": len(list(Path(trainer.args.output_dir).rglob("incident.json"))),
                    "entropy": [entropy[0], entropy[-1]],
                    "kl_k3": max(v.stats["kl_k3"] for v in verdicts),
                    "floor": verdicts[-1].stats["floor/kl_k3"],
                }
            )
            seconds = time.perf_counter() - start
            print(f"{name} {kind} {i + 1}/{len(grid)} T {temperature} lr {rate:g} seed {seed}: {seconds:.0f} s "
                  f"{dict(rows[-1]['statuses'])} {rows[-1]['alarms'][:2]}", flush=True)  # fmt: skip
    return {"rows": rows, "closeness": close}


def merged(kept: list[Path]) -> dict[str, Any]:
    """The figures of several runs of this benchmark, as ``--json`` keeps them."""
    figures = {"rows": [], "closeness": defaultdict(list)}
    for path in kept:
        found = json.loads(path.read_text())
        figures["rows"] += [
            row | {key: Counter(row[key]) for key in ("statuses", "warnings", "breaches")} for row in found["rows"]
        ]
        for stat, values in found["closeness"].items():
            figures["closeness"][stat] += values
    return figures


def report(figures: dict[str, Any]) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    groups = defaultdict(list)
    for row in figures["rows"]:
        groups[row["trainer"], row["model"]].append(row)
    table = Table(title="clean runs")
    for column in ("trainer", "model", "runs", "windows", "WARN", "BREACH", "HALT", "incidents",
                   "entropy keeps", "largest k3 KL", "its floor"):  # fmt: skip
        table.add_column(column, justify="right")
    total = Counter()
    for (kind, model), rows in groups.items():
        counts = sum((row["statuses"] for row in rows), Counter())
        counts["incidents"] = sum(row["incidents"] for row in rows)
        total += counts
        windows = counts.total() - counts["incidents"]
        least = min(row["entropy"][1] / row["entropy"][0] for row in rows)
        worst = max(rows, key=lambda row: row["kl_k3"])
        table.add_row(kind, model, str(len(rows)), str(windows),
                      *(str(counts[s]) for s in ("WARN", "BREACH", "HALT", "incidents")),
                      f"{least:.0%}", f"{worst['kl_k3']:.1e}", f"{worst['floor']:.1e}")  # fmt: skip
    margins = Table(title="how close a clean window came to each limit (1 = at the limit)")
    for column in ("rule", "99.9th percentile", "largest", "WARN", "BREACH"):
        margins.add_column(column)
    for stat, values in figures["closeness"].items():
        counts = (str(sum(row[kind][stat] for row in figures["rows"])) for kind in ("warnings", "breaches"))
        margins.add_row(stat, f"{np.quantile(values, 0.999):.3f}", f"{max(values):.3f}", *counts)
    n = total.total() - total["incidents"]
    console = Console(width=140)
    console.print(table, margins)
    console.print(
        f"{n} clean windows of {len(figures['rows'])} runs: {total['HALT']} HALT, {total['BREACH']} BREACH, "
        f"{total['WARN']} WARN (false-WARN rate {total['WARN'] / n:.3%}), {total['incidents']} incidents"
    )
    console.print(runs.versions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 batches: 2 temperatures x 2 learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    parser.add_argument("--steps", type=int, default=25, help="rollout batches per run")
    parser.add_argument("--models", nargs="+", default=["tiny"], metavar="NAME")
    parser.add_argument("--trainer", choices=("grpo", "rloo", "async"), default="grpo")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--kept", type=Path, nargs="+", help="figures of earlier runs: print their tables, run none")
    options = parser.parse_args()
    runs.quiet()
    if options.kept:
        figures = merged(options.kept)
    elif options.quick:
        figures = measure((0,), (0.5, 1.3), (1e-6, 1e-3), 15)
    elif len(options.models) == 1:
        grid = (options.seeds, options.temperatures, options.rates, options.steps)
        figures = measure(*grid, options.models[0], options.trainer)
    else:
        with tempfile.TemporaryDirectory() as folder:
            kept = [Path(folder) / f"{name}.json" for name in options.models]
            given = {"--seeds": options.seeds, "--temperatures": options.temperatures, "--rates": options.rates,
                     "--steps": [options.steps], "--trainer": [options.trainer]}  # fmt: skip
            more = [str(x) for key, values in given.items() for x in (key, *values)]
            for name, path in zip(options.models, kept, strict=True):
                subprocess.run([sys.executable, __file__, "--models", name, "--json", str(path), *more], check=True)
            figures = merged(kept)
    report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
