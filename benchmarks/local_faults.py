"""Faults of one rank or of a few sequences: when they halt, and how often chance looks like them.

    python benchmarks/local_faults.py                       # 10,000 healthy windows a row
    python benchmarks/local_faults.py --windows 1000

Windows are simulated by sequences: a sequence's mean |Δ| is lognormal with a spread that all ranks share, its k3 goes
with the square. Judged by ``Replicas`` and the breaker with the default settings, against a noise floor that is what
noise is. First table: healthy windows, by the rules on one rank alone. Second: one rank at 10 x the noise in every
n-th window, windows to the HALT, and whether it names the rank. Third: ``concentration/dispersion`` of drift that is
spread evenly over sequences of unequal length, token by token of a heavy-tailed law, and how many windows would be
called concentrated. Fourth: what comparing frozen weights and judging ranks costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from trl_parity.config.parity import ParityConfig
from trl_parity.judging.breaker import Breaker
from trl_parity.judging.replicas import Replicas
from trl_parity.live.frozen import FrozenWeights
from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch
from trl_parity.report.places import concentrated
from trl_parity.verdict import MismatchStats

NATS, TOKENS = 0.016, 64  # mean |Δ| of noise; tokens of a sequence

Window = tuple[np.ndarray, dict[str, float | None]]


def windows(rng: np.random.Generator, ranks: int, rows: int, spread: float, sick: Any) -> Iterator[Window]:
    """What is known of each: by rank, and of all together. ``sick``: of a window's number, times the noise by rank."""
    floor = {"floor/logp_abs_diff/mean": 1.03 * NATS, "floor/kl_k3": 1.03 * 0.8 * NATS**2 * np.exp(spread**2)}
    step = 0
    while True:
        x = NATS * np.exp(spread * rng.standard_normal((ranks, rows)) - spread**2 / 2) * sick(step)[:, None]
        step += 1
        n = float(TOKENS * ranks * rows)
        k3 = 0.8 * x * x
        stats: dict[str, float | None] = {"effective_sequences": float(ranks * rows), "nonfinite_rate": 0.0, **floor}
        for stat, of in (("logp_abs_diff/mean", x), ("kl_k3", k3)):
            stats |= {stat: float(of.mean()), f"se/{stat}": float(of.std(ddof=1) / np.sqrt(of.size))}
        of_rank = np.full(ranks, n / ranks)
        sums = [of_rank, TOKENS * k3.sum(1), TOKENS * x.sum(1), 3.0 * x.max(1), 3.0 * x.max(1)]
        yield np.stack(sums, axis=-1), stats


def judged(source: Iterator[Window], **settings: Any) -> Iterator[tuple[str, float | None]]:
    """Status and rank named, of each window; a HALT begins anew."""
    config = ParityConfig(**settings)
    breaker, replicas = Breaker.from_config(config), Replicas(config.consecutive, config.breach_memory)
    for step, (by_rank, stats) in enumerate(source):
        told = stats | replicas.add(by_rank, stats)
        verdict = breaker.judge(step, MismatchStats(1, 1, 1, 0, told))
        yield str(verdict.status), told.get("replica/rank")
        if verdict.halted:
            breaker, replicas = Breaker.from_config(config), Replicas(config.consecutive, config.breach_memory)


def healthy(args: argparse.Namespace) -> Table:
    """How often healthy ranks breach, or warn, by the rules on one rank alone."""
    alone = dict.fromkeys(("kl_k3", "logp_abs_diff/mean"))
    table = Table("ranks", "sequences a rank", "spread", "windows", "not OK", "HALT", title="healthy")
    for ranks, rows in ((2, 8), (2, 4), (64, 8), (64, 1), (1024, 8), (1024, 1)):
        for spread in (0.5, 1.0):
            source = windows(np.random.default_rng(0), ranks, rows, spread, lambda step, n=ranks: np.ones(n))
            seen = [status for (status, _), _ in zip(judged(source, rules=alone), range(args.windows), strict=False)]
            odd = sum(status != "OK" for status in seen)
            table.add_row(*map(str, (ranks, rows, spread, len(seen), odd, seen.count("HALT"))))
    return table


def sick(args: argparse.Namespace) -> Table:
    """One sick rank, in every n-th window."""
    table = Table("ranks", "sick in every", "windows to the HALT", "rank named", title="one rank at 10 x the noise")
    for ranks, rows in ((2, 8), (64, 8), (1024, 8)):
        for every in (1, 2, 3, 4):
            found = []
            for seed in range(5):
                scales = np.ones(ranks)
                scales[seed % ranks] = 10.0
                rng = np.random.default_rng(seed)
                source = windows(
                    rng, ranks, rows, 0.5, lambda step, n=every, s=scales: s if step % n == 0 else s * 0 + 1
                )
                for step, (status, rank) in zip(range(100), judged(source), strict=False):
                    if status == "HALT":
                        found.append((step + 1, rank == seed % ranks))
                        break
            delays = sorted({step for step, _ in found})
            table.add_row(str(ranks), str(every), str(delays), f"{sum(named for _, named in found)} of 5")
    return table


def spread_evenly(args: argparse.Namespace) -> Table:
    """Dispersion where nothing is anywhere."""
    table = Table("Δ", "sequences", "windows", "median", "largest", "called concentrated", title="evenly spread drift")
    rng, count = np.random.default_rng(0), max(100, args.windows // 10)
    laws = {
        "normal": lambda shape: 0.05 * rng.standard_normal(shape),
        "Student's t, 3": lambda shape: 0.05 * rng.standard_t(3, shape),
        "Student's t, 2": lambda shape: 0.05 * rng.standard_t(2, shape).clip(-20, 20),
        "1 of 500 tokens is 3 nats off": lambda shape: np.where(rng.random(shape) < 0.002, -3.0, 0.01),
    }
    for name, law in laws.items():
        for rows in (8, 64):
            found, called = [], 0
            for _ in range(count):
                delta = torch.from_numpy(law((rows, 128)))
                lengths = torch.from_numpy(np.maximum(4, 128 * rng.beta(2, 2, rows)).astype(np.int64))
                rollout = torch.full_like(delta, -1.0)
                batch = ScoredBatch(
                    mask=torch.arange(128) < lengths[:, None], rollout_logprobs=rollout,
                    trainer_logprobs=rollout + delta, own_logprobs=rollout + delta, entropy=None,
                )  # fmt: skip
                stats = compute(measure(batch, bootstrap_samples=2))
                found.append(stats["concentration/dispersion"] or 0.0)
                called += bool(concentrated(stats))
            table.add_row(name, str(rows), str(count), f"{np.median(found):.2f}", f"{max(found):.2f}", str(called))
    return table


def cost(args: argparse.Namespace) -> Table:
    """CPU time of what a window costs, the least of many."""
    table = Table("what", "ms", title="CPU time a window")
    weights = [torch.randn(200, 200).bfloat16() for _ in range(512)]
    model, frozen = (
        torch.nn.ParameterList(torch.nn.Parameter(x, requires_grad=False) for x in weights),
        FrozenWeights(),
    )

    def least(call: Callable[[], object], times: int = 60) -> str:
        found = []
        for _ in range(times):
            start = time.process_time()
            call()
            found.append(time.process_time() - start)
        return f"{1000 * min(found[times // 2 :]):.2f}"

    table.add_row("512 frozen tensors compared", least(lambda: frozen.moved(model)))
    for ranks in (2, 64, 1024):
        source, replicas = (
            windows(np.random.default_rng(0), ranks, 8, 0.5, lambda step, n=ranks: np.ones(n)),
            Replicas(3, 20),
        )
        known = iter([next(source) for _ in range(60)])
        table.add_row(f"{ranks} ranks judged", least(lambda r=replicas, k=known: r.add(*next(k))))
    return table


TABLES = {"healthy": healthy, "sick": sick, "even": spread_evenly, "cost": cost}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    for name, table in TABLES.items():
        if name in args.only:
            console.print(table(args))


if __name__ == "__main__":
    main()
