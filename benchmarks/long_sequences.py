"""How the rules on sequences read healthy noise and a small bias, by length: no engine, numbers drawn at random.

    python benchmarks/long_sequences.py                # 2 minutes
    python benchmarks/long_sequences.py --windows 2000 --json long_sequences.json

A window has N sequences of T tokens. Noise: Δ ~ N(-σ²/2, σ²) by token, an honest engine's (mean of e^Δ is 1), and the
weights TRL's default correction (``sequence_mask``, w <= 3) makes of it. σ of bf16 engines is .01 to .04 nats. Bias:
the engine reports so many nats a token less, on top of the noise. Given are the largest value / limit over all
windows, and the shares of windows in which a rule on sequences warns and breaches.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from trl_parity import ParityConfig
from trl_parity.judging.breaker import read
from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch

RULES = ("seq/bias_gap", "correction/zeroed", "correction/long/zeroed", "correction/lost")
CASES = [  # σ, bias, N, T
    *((sigma, 0.0, n, t) for sigma in (0.01, 0.02, 0.033) for n in (8, 64) for t in (256, 1024, 4096, 16384)),
    *((sigma, 0.0, 8, 32768) for sigma in (0.01, 0.02)),
    (0.0, 0.0014, 8, 1024), (0.01, 0.0014, 8, 1024), (0.02, 0.0014, 8, 1024), (0.02, 0.0014, 64, 1024),
    (0.01, -0.0014, 8, 4096), (0.01, 0.0003, 64, 4096),
]  # fmt: skip


def window(sigma: float, bias: float, n: int, t: int, generator: torch.Generator) -> dict[str, Any]:
    """The scalars of one window; lengths from T/2 to T."""
    lengths = torch.randint(t // 2, t + 1, (n, 1), generator=generator)
    mask = torch.arange(t) < lengths
    rollout = torch.full((n, t), -1.0)
    trainer = rollout + (torch.randn(n, t, generator=generator) * sigma - sigma**2 / 2 + bias) * mask
    w = ((trainer - rollout) * mask).sum(-1, keepdim=True).exp()
    batch = ScoredBatch(
        mask=mask, rollout_logprobs=rollout, trainer_logprobs=trainer, own_logprobs=trainer, entropy=None,
        correction_weights=w.masked_fill(w > 3, 0.0),
    )  # fmt: skip
    first = int(torch.randint(4096, (1,), generator=generator))
    return dict(compute(measure(batch, first_sequence=first)).values_by_name)


def measured(windows: int) -> list[dict[str, Any]]:
    rules = [rule for rule in ParityConfig().resolved_rules() if rule.stat in RULES]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for sigma, bias, n, t in CASES:
        count = max(20, min(windows, windows * 65536 // (n * t)))
        largest: dict[str, float] = defaultdict(float)
        warned = breached = 0
        for _ in range(count):
            scalars = window(sigma, bias, n, t, generator)
            readings = [r for rule in rules if (r := read(rule, scalars)) is not None]
            for r in readings:
                largest[r.rule.stat] = max(largest[r.rule.stat], r.value / r.limit)
            over = any(r.over for r in readings if not r.rule.warn_only)
            breached += over
            warned += not over and any(r.over if r.rule.warn_only else r.warns for r in readings)
        rows.append({"sigma": sigma, "bias": bias, "N": n, "T": t, "windows": count, "WARN": warned / count,
                     "BREACH": breached / count, **largest})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    rows = measured(options.windows)
    table = Table(title="largest value / limit")
    for column in ("σ", "bias", "N", "T", "windows", *RULES, "WARN", "BREACH"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(f"{row['sigma']:g}", f"{row['bias']:g}", str(row["N"]), str(row["T"]), str(row["windows"]),
                      *(f"{row[stat]:.2f}" if stat in row else "-" for stat in RULES),
                      f"{row['WARN']:.1%}", f"{row['BREACH']:.1%}")  # fmt: skip
    Console(width=180).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
