"""Every drill at all its strengths: how many windows from onset to halt, with the default configuration.

    python benchmarks/faults.py                     # all, about 15 minutes on two cores
    python benchmarks/faults.py --only lost-sync temperature
    python benchmarks/faults.py --json faults.json

The faults are those of recipes/drill/drills.py, each one setting of the real stack or one small honest patch of it,
on a real GRPO run with a real vLLM engine, and ``fp32-trainer``, which is no drill: on the tiny model it drifts no
more than the floor. The drift column is the mean |log-ratio| (trimmed) at the worst window up to the halt, over its
noise floor. A fault that drifts above 5 x the floor must be halted; weaker ones are printed too, halted or not.
``control`` has no fault.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "drill"))
from drills import DRILLS, Drill, pick
from work import STEPS, Job, execute, serve

from trl_parity.errors import ConfigError

FAULTS = [
    *DRILLS,
    Drill(name="fp32-trainer", cause="dtype_gap", what="fp32 trainer (no autocast), bf16 engine, learning rate {}",
          strengths=(1e-6, 1e-5, 1e-4), base=lambda s, _: {"learning_rate": s},
          arguments=lambda s, _: {"bf16": False}),
]  # fmt: skip


def report(rows: list[dict[str, Any]], versions: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"windows from onset to halt, of at most {STEPS}")
    for column in ("cause", "drill", "fault", "windows", "drift / floor", "named", "rules that breached"):
        table.add_column(column)
    missed = []
    for i, row in enumerate(rows):
        if row["cause"] and not row["detected"] and (row["drift"] or 0) > 5:
            missed.append(row)
        first = i == 0 or rows[i - 1]["drill"] != row["drill"]
        table.add_row(row["cause"] if first else "", row["drill"] if first else "", row["what"],
                      str(row["windows"] or "-"), "-" if row["drift"] is None else f"{row['drift']:.1f}",
                      row["named"], ", ".join(row["rules"]) or "-")  # fmt: skip
    console = Console(width=180)
    console.print(table)
    halts = [row for row in rows if not row["cause"] and row["detected"]]
    console.print(f"missed above 5 x the floor: {len(missed)}; control halted: {len(halts)}")
    console.print(versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="drills to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    try:
        chosen = pick(options.only, FAULTS) if options.only else FAULTS
    except ConfigError as e:
        parser.error(str(e))
    jobs = [Job(f.name, i, options.seed, options.temperature) for f in chosen for i in range(len(f.strengths))]
    rows, versions, failed = execute(
        FAULTS, jobs, __file__,
        on_engine=lambda n, of, group: print(f"engine {n}/{of}: {len(group)} runs ...", flush=True),
        on_row=lambda row: print(f"{row['drill']}, {row['what']}: {row['statuses']} {row['drift']}", flush=True),
    )  # fmt: skip
    report(rows, versions)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(FAULTS, sys.argv[2])
    else:
        main()
