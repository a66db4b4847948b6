"""How often the host waits for the device, of one rollout batch and of a window's end: the profiler's count.

    python benchmarks/syncs.py                    # needs a CUDA device; 64 sequences of 512 tokens
    python benchmarks/syncs.py --sequences 256 --tokens 2048 --json syncs.json

Counted are the calls that block the host: synchronizations of streams, events and the device, and copies to the host
that wait. ``measure`` is to have none, the end of a window a handful, whatever the batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from torch.profiler import ProfilerActivity, profile

from trl_parity import ParityMonitor
from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def batch(sequences: int, tokens: int) -> ScoredBatch:
    """Log-probs a few thousandths of a nat apart, on the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    rollout = -3.0 * torch.rand(sequences, tokens, generator=generator, device="cuda")
    trainer = rollout + 0.002 * torch.randn(sequences, tokens, generator=generator, device="cuda")
    return ScoredBatch(
        mask=torch.ones_like(rollout, dtype=torch.bool), rollout_logprobs=rollout, trainer_logprobs=trainer,
        own_logprobs=trainer, entropy=torch.full_like(rollout, 1.5),
    )  # fmt: skip


def waits(act: Callable[[], object]) -> dict[str, int]:
    """Calls that block the host in ``act``, by name; one call of it before is not counted."""
    act()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        act()
    return dict(Counter(event.name for event in profiler.events() if event.name in WAITS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("syncs.py: no CUDA device. Expected one: on a CPU the host waits for nothing.", file=sys.stderr)
        return 2
    scored, monitor, steps = batch(options.sequences, options.tokens), ParityMonitor(), iter(range(1, 100))
    given = {"rollout_logprobs": scored.rollout_logprobs, "trainer_logprobs": scored.trainer_logprobs}
    found = {
        "measure, one batch": waits(lambda: measure(scored)),
        "statistics of its sums": waits(lambda: compute(measure(scored))),
        "a window: measured, judged, told": waits(lambda: monitor.log_step(next(steps), **given)),
    }
    print(machine.lines(machine.describe("cuda")))
    for what, counts in found.items():
        named = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
        print(f"{what}: {sum(counts.values())} waits" + (f" ({named})" if named else ""))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
