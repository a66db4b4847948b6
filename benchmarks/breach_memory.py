"""What ``breach_memory`` halts that a streak does not, and how often it halts a run whose breaches are chance.

    python benchmarks/breach_memory.py

Windows that breach by a pattern, or with a fixed probability each, through the breaker's own code with the default
settings. The first table gives windows from the first breach to the HALT (of random patterns: median and 90th
percentile of 200 runs). The second counts HALTs per 10,000 windows, each run begun anew after its HALT, beside a
breaker that only knows breaches in a row (``breach_memory: 0``).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

from rich.console import Console
from rich.table import Table

from trl_parity.config.parity import ParityConfig
from trl_parity.judging.breaker import Breaker, Seen
from trl_parity.verdict import Status

MEMORIES = (ParityConfig().breach_memory, 0)

# is the window a breach?
PATTERNS: dict[str, Callable[[Random], Iterator[bool]]] = {
    "in a row": lambda rng: (True for _ in range(10**6)),
    "2 of every 3": lambda rng: (i % 3 != 2 for i in range(10**6)),
    **{f"every {n}th": lambda rng, n=n: (i % n == 0 for i in range(10**6)) for n in (2, 3, 4, 5, 10, 15, 25)},
    "random 30 %": lambda rng: (rng.random() < 0.3 for _ in range(10**6)),
    "random 10 %": lambda rng: (rng.random() < 0.1 for _ in range(10**6)),
}


def halted(breaker: Breaker, breach: bool) -> bool:
    """One window more, by the breaker's table."""
    seen = Seen.BREACH if breach else Seen.HEALTH
    return breaker._after(seen, breaker.consecutive if breach else None, may_halt=True) is Status.HALT


def fresh(memory: int) -> Breaker:
    return Breaker((), ParityConfig().consecutive, breach_memory=memory)


def delay(pattern: Callable[[Random], Iterator[bool]], memory: int, seed: int, within: int) -> float:
    """Windows from the first breach to the HALT; inf: none."""
    breaker, since = fresh(memory), 0
    for breach in islice(pattern(Random(seed)), within):
        since += bool(since or breach)
        if halted(breaker, breach):
            return since
    return float("inf")


def rate(p: float, memory: int, windows: int, seed: int) -> float:
    """HALTs per 10,000 windows that breach with probability ``p`` each."""
    rng, breaker, halts = Random(seed), fresh(memory), 0
    for _ in range(windows):
        if halted(breaker, rng.random() < p):
            halts += 1
            breaker = fresh(memory)
    return halts / windows * 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2_000_000, help="of each probability")
    options = parser.parse_args()
    console = Console(width=100)
    table = Table("breaches", *(f"breach_memory {memory}" for memory in MEMORIES), title="windows to the HALT")
    for name, pattern in PATTERNS.items():
        cells = []
        for memory in MEMORIES:
            found = sorted(delay(pattern, memory, seed, 2000) for seed in range(200 if "random" in name else 1))
            ends = {statistics.median_high(found), found[int(0.9 * len(found))]}
            cells.append(", ".join("never" if x == float("inf") else f"{x:.0f}" for x in sorted(ends)))
        table.add_row(name, *cells)
    console.print(table)
    table = Table("breaches, of windows", *(f"breach_memory {memory}" for memory in MEMORIES),
                  title=f"HALTs per 10,000 windows, {options.windows:,} of each")  # fmt: skip
    for p in (1e-4, 1e-3, 3e-3, 0.01, 0.02):
        table.add_row(f"{p:.2%}", *(f"{rate(p, memory, options.windows, 0):.3g}" for memory in MEMORIES))
    console.print(table)


if __name__ == "__main__":
    main()
