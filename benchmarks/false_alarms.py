"""How often a healthy run is warned about, breached or halted: it should be never, seldom and never.

    python benchmarks/false_alarms.py --quick              # 60 rollout batches, a minute
    python benchmarks/false_alarms.py                      # 1,200 batches: 3 seeds x 4 temperatures x 4 learning rates
    python benchmarks/false_alarms.py --seeds 0 --steps 8  # 128 of them
    python benchmarks/false_alarms.py --json false_alarms.json
    python benchmarks/false_alarms.py --models tiny Llama Mistral Gemma3Text Cohere Qwen3Moe --seeds 0 1 --steps 16
    python benchmarks/false_alarms.py --trainer rloo --seeds 0

Every batch is a real rollout of a real vLLM engine in a real GRPO run whose policy moves, from not at all to visibly
sharpening (entropy is in the table). Nothing is wrong in any of them, so every WARN, BREACH and HALT is a false one.
The second table gives, for each rule, how close a clean window came to its limit (the largest and the 99.9th
percentile of value / limit) and in how many windows it warned and breached. ``--models``: the recipe's (tiny), and
random ones of other architectures (held_out.py), one process each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import runs

SEEDS, TEMPERATURES, RATES = (0, 1, 2), (0.5, 0.7, 1.0, 1.3), (1e-6, 1e-4, 3e-4, 1e-3)


def clean_run(model: str, trainer: str, seed: int, temperature: float, rate: float, steps: int) -> Any:
    """One healthy run; the callback with its verdicts."""
    from trl_parity import ParityCallback

    callback = ParityCallback(action="log")
    overrides = {"seed": seed, "temperature": temperature, "learning_rate": rate, "max_steps": steps}
    runs.make_trainer(model, [callback], trainer=trainer, **overrides).train()
    return callback


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
    seeds: Any, temperatures: Any, rates: Any, steps: int, name: str = "tiny", trainer: str = "grpo"
) -> dict[str, Any]:
    """All runs of a model, one after the other, on one engine."""
    from held_out import model_of

    rows, close = [], defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, runs.shared_engine():
        model = runs.tiny() if name == "tiny" else model_of(name, Path(folder))
        grid = list(itertools.product(temperatures, rates, seeds))
        for i, (temperature, rate, seed) in enumerate(grid):
            start = time.perf_counter()
            callback = clean_run(model, trainer, seed, temperature, rate, steps)
            for stat, values in closeness(callback).items():
                close[stat] += values
            verdicts = list(callback.verdicts)
            entropy = [v.stats["entropy/trainer"] for v in verdicts]
            rows.append(
                {
                    "model": name,
                    "temperature": temperature,
                    "rate": rate,
                    "seed": seed,
                    "statuses": Counter(str(v.status) for v in verdicts),
                    "warnings": Counter(stat for v in verdicts for stat in v.warnings),
                    "breaches": Counter(stat for v in verdicts for stat in v.breaches),
                    "alarms": [f"step {v.step}: {v.status} {v.reason}" for v in verdicts if v.status != "OK"],
                    "entropy": [entropy[0], entropy[-1]],
                    "kl_k3": max(v.stats["kl_k3"] for v in verdicts),
                    "floor": verdicts[-1].stats["floor/kl_k3"],
                }
            )
            seconds = time.perf_counter() - start
            print(f"{name} {i + 1}/{len(grid)} T {temperature} lr {rate:g} seed {seed}: {seconds:.0f} s "
                  f"{dict(rows[-1]['statuses'])} {rows[-1]['alarms'][:2]}", flush=True)  # fmt: skip
    return {"rows": rows, "closeness": close}


def report(figures: dict[str, Any]) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    groups = defaultdict(list)
    for row in figures["rows"]:
        groups[row["model"], row["temperature"], row["rate"]].append(row)
    table = Table(title="clean runs")
    for column in ("model", "T", "learning rate", "windows", "WARN", "BREACH", "HALT", "entropy first to last",
                   "largest k3 KL", "its floor"):  # fmt: skip
        table.add_column(column, justify="right")
    total = Counter()
    for (model, temperature, rate), rows in groups.items():
        statuses = sum((row["statuses"] for row in rows), Counter())
        total += statuses
        first, last = (sum(row["entropy"][i] for row in rows) / len(rows) for i in (0, 1))
        counts = [str(statuses[s]) for s in ("WARN", "BREACH", "HALT")]
        worst = max(rows, key=lambda row: row["kl_k3"])
        table.add_row(model, f"{temperature:g}", f"{rate:g}", str(sum(statuses.values())), *counts,
                      f"{first:.2f} to {last:.2f}", f"{worst['kl_k3']:.1e}", f"{worst['floor']:.1e}")  # fmt: skip
    margins = Table(title="how close a clean window came to each limit (1 = at the limit)")
    for column in ("rule", "99.9th percentile", "largest", "WARN", "BREACH"):
        margins.add_column(column)
    for stat, values in figures["closeness"].items():
        counts = (str(sum(row[kind][stat] for row in figures["rows"])) for kind in ("warnings", "breaches"))
        margins.add_row(stat, f"{np.quantile(values, 0.999):.3f}", f"{max(values):.3f}", *counts)
    n = sum(total.values())
    console = Console(width=120)
    console.print(table, margins)
    console.print(
        f"{n} clean windows: {total['HALT']} HALT, {total['BREACH']} BREACH, {total['WARN']} WARN "
        f"(false-WARN rate {total['WARN'] / n:.3%})"
    )
    console.print(runs.versions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 batches: 2 temperatures x 2 learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=25, help="rollout batches per run")
    parser.add_argument("--models", nargs="+", default=["tiny"], metavar="NAME")
    parser.add_argument("--trainer", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    runs.quiet()
    if options.quick:
        figures = measure((0,), (0.5, 1.3), (1e-6, 1e-3), 15)
    elif len(options.models) == 1:
        grid = (options.seeds, TEMPERATURES, RATES, options.steps)
        figures = measure(*grid, options.models[0], options.trainer)
    else:
        figures = {"rows": [], "closeness": defaultdict(list)}
        with tempfile.TemporaryDirectory() as folder:
            for name in options.models:
                kept = Path(folder) / f"{name}.json"
                more = [str(x) for x in ("--steps", options.steps, "--seeds", *options.seeds)]
                command = [sys.executable, __file__, "--models", name, "--trainer", options.trainer, "--json", kept]
                subprocess.run([*map(str, command), *more], check=True)
                found = json.loads(kept.read_text())
                figures["rows"] += [
                    row | {key: Counter(row[key]) for key in ("statuses", "warnings", "breaches")}
                    for row in found["rows"]
                ]
                for stat, values in found["closeness"].items():
                    figures["closeness"][stat] += values
    report(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
