"""What a long run leaves in memory and on disk: the judge that a callback has, over 10,000 windows.

    python benchmarks/long_run.py                       # about a minute
    python benchmarks/long_run.py --windows 2000 --json long_run.json

Every window is a batch of its own with small drift, measured, judged and written as in a training; rewards, floor and
entropy watch are on. No engine runs: what grows, or does not, is ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from trl_parity import ParityMonitor


def resident_kib() -> int:
    """This process's resident set now (Linux), elsewhere its largest so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize() // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (options.sequences, options.tokens)
    marks = sorted({options.windows // 10, options.windows // 2, options.windows} - {0})
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        monitor = ParityMonitor(output_dir=directory, floor={"kl_k3": 1e-6, "logp_abs_diff/mean": 1e-3})
        path = Path(directory) / "parity" / "metrics.jsonl"
        start = time.perf_counter()
        for step in range(1, options.windows + 1):
            rollout = -torch.rand(shape, generator=generator)
            trainer = rollout + 1e-3 * torch.randn(shape, generator=generator)
            rewards = torch.rand(options.sequences, generator=generator).tolist()
            monitor.log_step(
                step, rollout_logprobs=rollout, trainer_logprobs=trainer, entropy=-rollout, rewards=rewards
            )
            if step in marks:
                size, state = path.stat().st_size, len(json.dumps(monitor.state()))
                rows.append(
                    {
                        "windows": step,
                        "resident MiB": round(resident_kib() / 1024, 1),
                        "jsonl MiB": round(size / 2**20, 2),
                        "bytes a window": round(size / step),
                        "checkpoint state KiB": round(state / 1024, 1),
                        "ms a window": round(1e3 * (time.perf_counter() - start) / step, 2),
                    }
                )
        monitor.close()
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{options.windows:,} windows of {shape[0]} x {shape[1]} tokens", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:,}" for value in row.values()))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
