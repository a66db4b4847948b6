"""What the callback's parts cost against tokens, vocabulary, window length and ranks, one factor at a time.

    python benchmarks/scaling.py                 # two CPU cores: about 2 minutes
    python benchmarks/scaling.py --device cuda --json scaling.json
    python benchmarks/scaling.py --only measure window --repeats 25

Parts: the head (score_tokens); measure, which turns a scored batch into sums; a window of n rollout batches
(every_n_steps), measured and added up, and its end alone (statistics, verdict, a line in the file); and reduce_sums
over ranks of this machine, which talk over gloo whatever the device.

Sizes take turns, so that a busy machine hurts all alike: times are medians over rounds with their quartiles. "slope"
is the exponent p of time ~ size^p, least squares on the logs of the medians, with its standard error: 1 is linear, 0
is constant. "of limit" is the least time the device can take, over the time taken: the head's products at the rate of
a large one, elsewhere the bytes that go in and out at the speed of a large copy. Needs rich.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch
from rich.console import Console
from rich.table import Table

from trl_parity import ParityMonitor
from trl_parity.live.window import OpenWindow
from trl_parity.metrics.reduction import reduce_sums
from trl_parity.metrics.statistics import compute, measure
from trl_parity.metrics.sums import MismatchSums
from trl_parity.records import ScoredBatch
from trl_parity.scoring.head import score_tokens
from trl_parity.scoring.head_spec import Head

console = Console(width=100, highlight=False)
LENGTH = 256  # tokens of a completion
FLOOR = {"kl_k3": 2e-5, "logp_abs_diff/mean": 3e-3}  # a noise floor as bf16 leaves it: the rules have work to do


@dataclass
class Curve:
    """One part against one factor: ``limits`` are least seconds, ``rounds`` the seconds of each round, by size."""

    part: str
    factor: str
    held: str  # what is the same at all sizes
    limits: dict[int, float]
    rounds: dict[int, list[float]] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()  # sizes that are no part of the fit

    def slope(self) -> tuple[float, float]:
        """p of time ~ size^p and its standard error."""
        sizes = [n for n in self.rounds if n not in self.skipped]
        x = torch.tensor([math.log(n) for n in sizes], dtype=torch.float64)
        y = torch.tensor([math.log(machine.quartiles(self.rounds[n])[1]) for n in sizes], dtype=torch.float64)
        if len(sizes) < 2:
            return math.nan, math.nan
        dx = x - x.mean()
        p = float(dx @ y / (dx @ dx))
        rest = y - y.mean() - p * dx
        # two points lie on their line: no error to tell
        error = math.sqrt(float(rest @ rest) / (len(sizes) - 2) / float(dx @ dx)) if len(sizes) > 2 else math.nan
        return p, error


def timed(device: str, call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(curve: Curve, device: str, repeats: int, calls: dict[int, Callable[[], Any]]) -> Curve:
    """Time the calls, by size, in turns; one round before is not counted."""
    for turn in range(repeats + 1):
        for size, call in calls.items():
            seconds = timed(device, call)
            if turn:
                curve.rounds.setdefault(size, []).append(seconds)
    return curve


def head_curves(device: str, repeats: int, rates: dict[str, float]) -> list[Curve]:
    """score_tokens on bf16 over tokens, and over the vocabulary."""
    cuda = device.startswith("cuda")
    width = 4096 if cuda else 512
    tokens, vocab = (4096, 151_936) if cuda else (256, 32_000)
    many = [2**i for i in range(10, 16)] if cuda else [2**i for i in range(6, 12)]
    large = [2**i for i in range(14, 19)] if cuda else [2**i for i in range(12, 18)]
    g = torch.Generator(device).manual_seed(0)

    def noise(rows: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=g, device=device, dtype=torch.bfloat16) / width**0.25

    hidden, weight = noise(max(many)), noise(max(*large, vocab))

    def call(n: int, v: int) -> Callable[[], Any]:
        targets = torch.arange(n, device=device) % v
        return lambda: score_tokens(hidden[:n], targets, Head(weight=weight[:v]))

    def limit(n: int, v: int) -> float:
        moved = 2 * (n + v) * width + 16 * n
        return machine.limit_seconds(rates, flop=2.0 * n * v * width, moved=moved, dtype="bfloat16")

    by_tokens = Curve("head", "tokens", f"vocabulary {vocab:,}, hidden {width:,}", {n: limit(n, vocab) for n in many})
    by_vocab = Curve(
        "head", "vocabulary", f"{tokens:,} tokens, hidden {width:,}", {v: limit(tokens, v) for v in large}
    )
    return [
        run(by_tokens, device, repeats, {n: call(n, vocab) for n in many}),
        run(by_vocab, device, repeats, {v: call(tokens, v) for v in large}),
    ]


def scored(sequences: int, device: str, seed: int = 0) -> ScoredBatch:
    """A batch whose two sides differ by noise as of a bf16 engine."""
    g = torch.Generator(device).manual_seed(seed)
    shape = (sequences, LENGTH)
    rollout = torch.randn(shape, generator=g, device=device).abs().neg()
    trainer = rollout + 5e-3 * torch.randn(shape, generator=g, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    entropy = torch.rand(shape, generator=g, device=device)
    return ScoredBatch(
        mask=mask, rollout_logprobs=rollout, trainer_logprobs=trainer, own_logprobs=trainer, entropy=entropy
    )


TOKEN_BYTES = 4 * 4 + 1  # three log-probs, an entropy, the mask


def measure_curves(device: str, repeats: int, rates: dict[str, float]) -> list[Curve]:
    """Measure over the tokens of a batch."""
    sizes = [2**i for i in range(11, 22 if device.startswith("cuda") else 19)]
    batches = {n: scored(n // LENGTH, device) for n in sizes}
    limits = {n: machine.limit_seconds(rates, moved=n * TOKEN_BYTES) for n in sizes}
    curve = Curve("measure", "tokens", f"completions of {LENGTH}", limits)
    return [run(curve, device, repeats, {n: lambda n=n: measure(batches[n]) for n in sizes})]


def window_curves(device: str, repeats: int, rates: dict[str, float]) -> list[Curve]:
    """A window of n batches, and its end alone."""
    sizes, sequences = [1, 2, 4, 8, 16, 32], 16
    batch, bootstrap = scored(sequences, device), ParityMonitor().config.bootstrap_samples
    one = measure(batch, bootstrap_samples=bootstrap)
    sum_bytes = 8 * (one.additive.numel() + one.maxima.numel())
    held = f"batches of {sequences * LENGTH:,} tokens"
    with tempfile.TemporaryDirectory() as directory:
        monitor = ParityMonitor(output_dir=directory, floor=FLOOR)

        def gathered(n: int) -> MismatchSums:
            window = OpenWindow(bootstrap)
            for _ in range(n):
                window.add(monitor.sums_of(batch, 0), "")
            return window.sums(device)

        def end(sums: MismatchSums) -> None:
            monitor.judge(0, monitor.scalars(compute(sums), new_window=True))

        full = {n: gathered(n) for n in sizes}
        curves = [
            Curve(
                "window",
                "batches",
                held,
                {n: machine.limit_seconds(rates, moved=n * sequences * LENGTH * TOKEN_BYTES) for n in sizes},
            ),
            Curve("its end", "batches", held, {n: machine.limit_seconds(rates, moved=sum_bytes) for n in sizes}),
        ]
        run(curves[0], device, repeats, {n: lambda n=n: end(gathered(n)) for n in sizes})
        run(curves[1], device, repeats, {n: lambda n=n: end(full[n]) for n in sizes})
        monitor.close()
    return curves


def reduce_rank(rank: int, world: int, port: int, repeats: int, out: str) -> None:
    """One rank of `ranks_curves`: seconds of each reduction, the slowest rank's, from rank 0."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    import torch.distributed as dist
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    sums = measure(scored(16, "cpu", rank))
    seconds = torch.zeros(repeats, dtype=torch.float64)
    for turn in range(-1, repeats):
        accelerator.wait_for_everyone()
        took = timed("cpu", lambda: reduce_sums(sums, accelerator))
        if turn >= 0:
            seconds[turn] = took
    if world > 1:
        seconds = accelerator.gather(seconds[None]).amax(0)
    if rank == 0:
        Path(out).write_text(json.dumps(seconds.tolist()))
    if dist.is_initialized():
        dist.destroy_process_group()


def ranks_curves(device: str, repeats: int, rates: dict[str, float]) -> list[Curve]:
    """The reduction at a window's end over 1 to 4 ranks; one has nothing to do."""
    del device
    sums = MismatchSums.zeros()
    size = 8 * (sums.additive.numel() + sums.maxima.numel())
    sizes = (1, 2, 3, 4)
    # each rank has to read what the others sent
    limits = {n: machine.limit_seconds(rates, moved=(n - 1) * size) for n in sizes}
    curve = Curve("reduce", "ranks", f"{size / 1024:.0f} KiB a rank, gloo", limits, skipped=(1,))
    for world in sizes:
        with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()  # free for the ranks
            out = str(Path(directory) / "seconds.json")
            torch.multiprocessing.spawn(reduce_rank, args=(world, port, 4 * repeats, out), nprocs=world)
            curve.rounds[world] = json.loads(Path(out).read_text())
    return [curve]


PARTS: dict[str, Callable[[str, int, dict[str, float]], list[Curve]]] = {
    "head": head_curves,
    "measure": measure_curves,
    "window": window_curves,
    "ranks": ranks_curves,
}


def report(curves: list[Curve], repeats: int) -> None:
    table = Table(title=f"Cost by size, {repeats} rounds", box=None, padding=(0, 2, 0, 0))
    for column in ("part", "against", "size", "median ms", "quartiles ms", "us each", "of limit", "slope"):
        left = column in ("part", "against")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for curve in curves:
        p, error = curve.slope()
        for i, (size, seconds) in enumerate(curve.rounds.items()):
            low, middle, high = machine.quartiles(seconds)
            table.add_row(
                curve.part if not i else "",
                curve.factor if not i else "",
                f"{size:,}",
                f"{1e3 * middle:.3g}",
                f"{1e3 * low:.3g}-{1e3 * high:.3g}",
                f"{1e6 * middle / size:.3g}",
                f"{100 * curve.limits[size] / middle:.2g} %" if curve.limits[size] else "-",
                "" if i else f"{p:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}"),
            )
    console.print(table)
    for curve in curves:
        text = f"{curve.part} against {curve.factor}: {curve.held}"
        if curve.skipped:
            text += "; one rank has nothing to reduce and is not in the fit"
        console.print(text, markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (ranks: four times as many)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="write every number here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    about = machine.describe(options.device, ("torch", "accelerate", "trl"))
    rates = machine.limits(options.device)
    curves: list[Curve] = []
    for name in options.only:
        print(f"{name} ...", flush=True)
        curves += PARTS[name](options.device, options.repeats, rates)
    report(curves, options.repeats)
    console.print(machine.lines(about, rates), markup=False)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        rows = [
            {
                "part": c.part,
                "factor": c.factor,
                "held": c.held,
                "slope": c.slope(),
                "limit_seconds": c.limits,
                "seconds": c.rounds,
            }
            for c in curves
        ]
        options.json.write_text(
            json.dumps({"settings": settings, "about": about, "limits": rates, "curves": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
