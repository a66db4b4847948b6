"""Time, memory and error of the fp32 head against full logits, TRL's fused head, Liger and Cut Cross-Entropy.

    python benchmarks/head.py                              # 4,096 tokens x 151,936 vocabulary x 1,024 hidden, bf16
    python benchmarks/head.py --tokens 512 --vocab 32000 --dtype float32 --json head.json
    python benchmarks/head.py --grid --peer-python ~/peers/bin/python --json head.json
    python benchmarks/head.py --grid --device cuda

Every contender scores the same tokens in a process of its own; some give log-prob and entropy, some the log-prob
only. Liger and Cut Cross-Entropy take part where they are installed: here, or in the interpreter of --peer-python.
Memory is what the first call adds to the peak (resident set on a CPU, torch's allocator on CUDA). Then the contenders
take turns, one call each a round, so that a busy machine hurts all alike: times are medians over rounds with their
quartiles, "x ours" is the median ratio within a round. Errors are in nats, against fp64 on a sample of 128 tokens.

"of limit" is the least time the device can take for a shape, over the time taken: 2 x tokens x vocabulary x hidden
FLOP at the rate of a large product in the inputs' dtype, or reading inputs and writing results at the speed of a large
copy, whichever takes longer, both measured in this run. --grid runs vocabularies of 32,000, 151,936 and 256,000 with
hidden sizes of 1,024 and 4,096 and with 4,096 and 32,768 tokens; a point that would take more than --point-minutes by
the measured rates runs with fewer tokens (half, a quarter, ...), and that is said. Needs rich.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch
from contenders import CONTENDERS
from rich.console import Console
from rich.table import Table

SAMPLE = 128
GRID_VOCAB, GRID_HIDDEN, GRID_TOKENS = (32_000, 151_936, 256_000), (1024, 4096), (4096, 32_768)
FEWEST_TOKENS = 128
HERE = Path(__file__).resolve().parent
console = Console(width=100, highlight=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="default 4096; with --grid: this many at every point, as they are")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--grid", action="store_true", help="the 12 shapes above instead of one")
    parser.add_argument("--point-minutes", type=float, help="at most this long a point (default 1; on CUDA 10)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="contenders (default: all that run)")
    parser.add_argument("--peer-python", help="interpreter that has liger-kernel and cut-cross-entropy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="write every number here too")
    return parser.parse_args()


def make_inputs(args: argparse.Namespace, tokens: int, vocab: int, width: int) -> dict[str, torch.Tensor]:
    """Logits of about unit-3 noise, each target some 13 above it: neither certain nor hopeless, as sampled text is."""
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    weight = torch.empty(vocab, width, dtype=dtype)
    hidden = torch.empty(tokens, width, dtype=dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    for rows in weight.split(1024):  # in pieces: an fp32 copy of the whole may not fit
        rows.copy_(torch.randn(rows.shape, generator=g) * (3 / width**0.5))
    for rows, ids in zip(hidden.split(1024), targets.split(1024), strict=True):
        rows.copy_(torch.randn(rows.shape, generator=g) + 1.5 * weight[ids].float())
    sample = torch.linspace(0, tokens - 1, min(SAMPLE, tokens)).long()
    return {"hidden": hidden, "weight": weight, "targets": targets, "sample": sample}


def oracle(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2, sample) fp64 log-probs and entropies, vocabulary slice by slice."""
    sample, targets = inputs["sample"], inputs["targets"]
    h = inputs["hidden"][sample].double()
    logp = torch.cat([h @ w.double().T for w in inputs["weight"].split(8192)], 1).log_softmax(-1)
    return torch.stack([logp.gather(1, targets[sample, None])[:, 0], -(logp.exp() * logp).sum(-1)])


def seconds_of(name: str, args: argparse.Namespace, rates: dict[str, float], shape: tuple[int, int, int]) -> float:
    """About how long one call takes: the product, and some ten passes over fp32 logits."""
    tokens, vocab, width = shape
    dtype = "float32" if CONTENDERS[name].fp32 else args.dtype
    return 2.0 * tokens * vocab * width / rates[f"gemm_flop_per_s_{dtype}"] + 40.0 * tokens * vocab / (
        rates["copy_gb_per_s"] * 1e9
    )


def free_bytes(device: str) -> float:
    """Memory that can be had now; infinite where nobody says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    return 1024 * int(info.read_text().split("MemAvailable:")[1].split()[0]) if info.exists() else float("inf")


def shapes_of(args: argparse.Namespace, names: list[str], rates: dict[str, float]) -> list[tuple[int, int, int]]:
    """The (tokens, vocabulary, hidden) to run; says which points are cut or left out."""
    if not args.grid:
        return [(args.tokens or 4096, args.vocab, args.hidden)]
    minutes = args.point_minutes or (10 if args.device.startswith("cuda") else 1)
    shapes: list[tuple[int, int, int]] = []
    for vocab, width in ((v, h) for h in GRID_HIDDEN for v in GRID_VOCAB):
        for asked in [args.tokens] if args.tokens else GRID_TOKENS:
            tokens = asked

            def guess(tokens: int, vocab: int = vocab, width: int = width) -> float:
                once = sum(seconds_of(name, args, rates, (tokens, vocab, width)) for name in names)
                return once * (args.repeats + 1) / 60

            while not args.tokens and guess(tokens) > minutes and tokens > FEWEST_TOKENS:
                tokens //= 2
            point = f"{asked:,} tokens x {vocab:,} x {width:,}, about {guess(asked):.1f} minutes"
            if (tokens, vocab, width) in shapes:
                console.print(f"left out: {point}, the same as the point before when cut")
                continue
            if tokens < asked:
                console.print(f"cut to {tokens:,} tokens: {point}")
            shapes.append((tokens, vocab, width))
    return shapes


class Worker:
    """A contender's process. ``reason``: why it does not take part, in words."""

    def __init__(self, name: str, args: argparse.Namespace, inputs: Path, log: Path):
        python = args.peer_python if args.peer_python and CONTENDERS[name].peer else sys.executable
        command = [python, str(HERE / "contenders.py"), name, str(inputs), "--device", args.device]
        command += ["--threads", str(args.threads or torch.get_num_threads())]
        self.log, self.reason = log, ""
        with open(log, "w") as errors:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, bufsize=1)

    def ask(self, line: str | None = None) -> Any:
        """Its next answer, after sending it a line; None if it has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            if line is not None:
                self.process.stdin.write(line + "\n")
        for answer in self.process.stdout:
            with contextlib.suppress(ValueError):  # a library's own words
                return json.loads(answer)
        said = [text.strip() for text in self.log.read_text().splitlines() if text.strip()]
        self.reason = f"{said[-1][:160] if said else 'no message'} (status {self.process.wait()})"
        return None

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def measure(args: argparse.Namespace, names: list[str], rates: dict[str, float], shape: tuple[int, int, int]) -> dict:
    """All contenders at one shape: their figures by name, and why others have none."""
    tokens, vocab, width = shape
    out: dict[str, Any] = {"tokens": tokens, "vocab": vocab, "hidden": width, "results": {}, "without": {}}
    size = getattr(torch, args.dtype).itemsize
    moved = (tokens + vocab) * width * size + 16 * tokens
    flop = 2.0 * tokens * vocab * width
    out["limit_seconds"] = limit = machine.limit_seconds(rates, flop=flop, moved=moved, dtype=args.dtype)
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        path = Path(directory) / "inputs.pt"
        with console.status("inputs and fp64 oracle"):
            inputs = make_inputs(args, tokens, vocab, width)
            expected = oracle(inputs)
            torch.save(inputs, path)
            del inputs
        for name in names:
            contender = CONTENDERS[name]
            needed = contender.tensors * tokens * vocab + contender.copies * 4 * (vocab + tokens) * width
            if needed > 0.8 * free_bytes(args.device):
                out["without"][name] = f"needs about {needed / 2**30:.1f} GiB, more than is free"
                continue
            console.print(f"  memory and error: {contender.label} ...")
            with console.status(contender.label):
                worker = Worker(name, args, path, Path(directory) / f"{name}.log")
                stack.callback(worker.close)
                answer = worker.ask()
            if answer is None:
                out["without"][name] = worker.reason
                continue
            workers[name] = worker
            out["results"][name] = {
                "bytes_added": answer["bytes_added"],
                "versions": answer["versions"],
                "seconds": [],
            }
            for what, got, true in zip(("logprob", "entropy"), answer["scores"], expected, strict=True):
                gap = None if got is None else (torch.tensor(got, dtype=torch.float64) - true).abs()
                out["results"][name] |= {
                    f"{what}_max_error": None if gap is None else gap.max().item(),
                    f"{what}_rms_error": None if gap is None else gap.square().mean().sqrt().item(),
                }
        for turn in range(1, args.repeats + 1):
            console.print(f"  time, round {turn}/{args.repeats} ...")
            for name in list(workers):
                with console.status(f"time, round {turn}/{args.repeats}: {CONTENDERS[name].label}"):
                    seconds = workers[name].ask("go")
                if seconds is None:
                    out["without"][name] = workers.pop(name).reason
                    del out["results"][name]
                else:
                    out["results"][name]["seconds"].append(seconds)
    ours = out["results"].get("ours", {}).get("seconds")
    for result in out["results"].values():
        low, middle, high = machine.quartiles(result["seconds"])
        result |= {"quartiles": [low, high], "median_seconds": middle, "share_of_limit": limit / middle}
        if ours:
            result["ratio_to_ours"] = statistics.median(a / b for a, b in zip(result["seconds"], ours, strict=True))
    return out


def report(args: argparse.Namespace, points: list[dict]) -> None:
    title = f"The head in {args.dtype}: tokens x vocabulary x hidden, {args.repeats} rounds, errors in nats"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    columns = ("", "median\ns", "quartiles\ns", "x ours", "of\nlimit", "added\nMiB")
    for column in (*columns, "log-prob\nmax", "log-prob\nrms", "entropy\nmax"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for point in points:
        shape = " x ".join(f"{point[name]:,}" for name in ("tokens", "vocab", "hidden"))
        table.add_row(f"[bold]{shape}[/]")
        for name, r in point["results"].items():
            table.add_row(
                CONTENDERS[name].label,
                f"{r['median_seconds']:.3g}",
                "-".join(f"{x:.3g}" for x in r["quartiles"]),
                f"{r['ratio_to_ours']:.2f}" if "ratio_to_ours" in r else "-",
                f"{100 * r['share_of_limit']:.0f} %",
                f"{r['bytes_added'] / 2**20:,.0f}",
                f"{r['logprob_max_error']:.1e}",
                f"{r['logprob_rms_error']:.1e}",
                "-" if r["entropy_max_error"] is None else f"{r['entropy_max_error']:.1e}",
            )
    console.print(table)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with console.status("rates of this device"):
        rates = machine.limits(args.device)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if args.dtype == "float16":
            rates["gemm_flop_per_s_float16"] = machine.gemm_rate(args.device, torch.float16)
    about = machine.describe(args.device, ("torch", "triton", "trl"))
    kind = args.device.split(":")[0]
    # Without a lower precision to cast from, the casting ones are the plain ones.
    twice = ("trl_fp32", "liger_fp32") if args.dtype == "float32" else ()
    chosen = [name for name in args.only or CONTENDERS if kind in CONTENDERS[name].devices and name not in twice]
    elsewhere = [c.label for c in CONTENDERS.values() if kind not in c.devices]
    shapes = shapes_of(args, chosen, rates)
    points = []
    for shape in shapes:
        console.print(f"{shape[0]:,} tokens x {shape[1]:,} vocabulary x {shape[2]:,} hidden, {args.dtype} ...")
        points.append(measure(args, chosen, rates, shape))
        for name, reason in points[-1]["without"].items():
            if points[1:] and points[-2]["without"].get(name) == reason:
                continue  # said
            console.print(f"  without {CONTENDERS[name].label}: {reason}", markup=False)
    report(args, points)
    for name in dict.fromkeys(name for point in points for name in point["results"]):
        entropy = "" if CONTENDERS[name].entropy else "; log-prob only, no entropy"
        console.print(f"{CONTENDERS[name].label}: {CONTENDERS[name].how}{entropy}", markup=False)
    console.print(f"not on this kind of device: {', '.join(elsewhere)}")
    peers = [r["versions"] for point in points for name, r in point["results"].items() if CONTENDERS[name].peer]
    if peers:
        console.print("Liger and CCE: " + ", ".join(f"{k} {v}" for k, v in peers[0].items()), markup=False)
    console.print(machine.lines(about, rates), markup=False)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.write_text(
            json.dumps({"settings": settings, "about": about, "limits": rates, "points": points}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
