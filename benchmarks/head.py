"""Time, memory and error of the fp32 head against full logits and TRL's fused head.

    python benchmarks/head.py                              # 4,096 tokens x 151,936 vocabulary x 1,024 hidden, bf16
    python benchmarks/head.py --tokens 512 --vocab 32000 --dtype float32 --json head.json
    python benchmarks/head.py --device cuda --tokens 16384 --hidden 4096

Every contender gives log-prob and entropy of each token, in a process of its own. Memory is what its first call adds
to the peak (resident set on a CPU, torch's allocator on CUDA). Then the contenders take turns, one call each a round,
so that a busy machine hurts all alike: times are medians over rounds, "x ours" is the median ratio within a round.
Errors are in nats, the larger of log-prob and entropy, against fp64 on a sample of the tokens. Needs rich.
"""

import argparse
import contextlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CONTENDERS = {
    "ours": "score_tokens",
    "naive": "full fp32 logits",
    "trl": "TRL fused",
    "trl_fp32": "TRL fused, fp32",
}
SAMPLE = 128


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="write every number here too")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_inputs(args):
    """Logits of about unit-3 noise, each target some 13 above it: neither certain nor hopeless, as sampled text is."""
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    weight = torch.empty(args.vocab, args.hidden, dtype=dtype)
    hidden = torch.empty(args.tokens, args.hidden, dtype=dtype)
    targets = torch.randint(0, args.vocab, (args.tokens,), generator=g)
    # In pieces, so that making the inputs does not raise the peak that is measured later.
    for rows in weight.split(1024):
        rows.copy_(torch.randn(rows.shape, generator=g) * (3 / args.hidden**0.5))
    for rows, ids in zip(hidden.split(1024), targets.split(1024), strict=True):
        rows.copy_(torch.randn(rows.shape, generator=g) + 1.5 * weight[ids].float())
    return hidden.to(args.device), weight.to(args.device), targets.to(args.device)


def sample_of(args):
    return torch.linspace(0, args.tokens - 1, min(SAMPLE, args.tokens)).long()


def oracle(args):
    """(2, sample) fp64 log-probs and entropies, vocabulary slice by slice."""
    hidden, weight, targets = (t.cpu() for t in make_inputs(args))
    sample = sample_of(args)
    h = hidden[sample].double()
    logp = torch.cat([h @ w.double().T for w in weight.split(8192)], 1).log_softmax(-1)
    return torch.stack([logp.gather(1, targets[sample, None])[:, 0], -(logp.exp() * logp).sum(-1)])


def load(name):
    """The contender as a function (hidden, weight, targets) -> (logprobs, entropy)."""
    if name == "ours":
        from trl_parity.head import Head, score_tokens

        return lambda hidden, weight, targets: score_tokens(hidden, targets, Head(weight=weight))
    if name == "naive":

        def naive(hidden, weight, targets):
            logp = torch.log_softmax(hidden.float() @ weight.float().T, -1)
            return logp.gather(1, targets[:, None])[:, 0], -logp.exp().mul_(logp).sum(-1)

        return naive
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def trl(hidden, weight, targets):
        hidden = hidden.float() if name == "trl_fp32" else hidden
        outputs = ("log_probs", "entropy")
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
        )[:2]

    return trl


def peak_bytes(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at the size of the process that spawned this one, VmHWM does not
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def work(args):
    """Measure one contender: memory and scores on the first line of stdout, then a time for every line on stdin."""
    score = load(args.worker)
    hidden, weight, targets = make_inputs(args)
    score(hidden[:8], weight[:64], targets[:8] % 64)  # libraries and threads come up before the measurement
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(args.device)
    logprobs, entropy = score(hidden, weight, targets)
    added = peak_bytes(args.device) - before
    sample = sample_of(args)
    scores = [t.cpu().double()[sample].tolist() for t in (logprobs, entropy)]
    print(json.dumps({"bytes_added": added, "scores": scores}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        score(hidden, weight, targets)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        print(json.dumps(time.perf_counter() - start), flush=True)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()  # the other contenders are on the same device


def describe(args):
    """Device and versions, for the table's caption and the JSON."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    from importlib.metadata import version

    return {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu,
        "threads": args.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "trl": version("trl"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def ask(worker, line=None):
    """The worker's next answer, after sending it a line."""
    if line is not None:
        worker.stdin.write(line + "\n")
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit(f"a contender ended with status {worker.wait()}; its message is above")
    return json.loads(answer)


def main():
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.worker:
        return work(args)
    from rich.console import Console
    from rich.table import Table

    console = Console()
    about = describe(args)
    shape = f"{args.tokens:,} tokens x {args.vocab:,} vocabulary x {args.hidden:,} hidden, {args.dtype}"
    console.print(f"{shape}, on {about['device']}", soft_wrap=True)
    with console.status("fp64 oracle"):
        expected = oracle(args)
    # Without a lower precision to cast from, TRL's two ways are one.
    names = [name for name in CONTENDERS if not (name == "trl" and args.dtype == "float32")]
    workers, results = {}, {}
    with contextlib.ExitStack() as stack:
        for i, name in enumerate(names, 1):
            with console.status(f"memory and error, {i}/{len(names)}: {CONTENDERS[name]}"):
                command = [sys.executable, __file__, "--worker", name, *sys.argv[1:]]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
                workers[name] = stack.enter_context(subprocess.Popen(command, **pipes))
                results[name] = ask(workers[name])
            gap = (torch.tensor(results[name].pop("scores"), dtype=torch.float64) - expected).abs()
            results[name] |= {"max_error": gap.max().item(), "rms_error": gap.square().mean(-1).sqrt().max().item()}
            results[name]["seconds"] = []
            console.print(f"memory and error, {i}/{len(names)}: {CONTENDERS[name]} done")
        for turn in range(1, args.repeats + 1):
            for name in names:
                with console.status(f"time, round {turn}/{args.repeats}: {CONTENDERS[name]}"):
                    results[name]["seconds"].append(ask(workers[name], "go"))
            console.print(f"time, round {turn}/{args.repeats} done")
        for worker in workers.values():
            worker.stdin.close()
    for result in results.values():
        result["median_seconds"] = statistics.median(result["seconds"])
        pairs = zip(result["seconds"], results["ours"]["seconds"], strict=True)
        result["ratio_to_ours"] = statistics.median(theirs / ours for theirs, ours in pairs)

    table = Table(title=shape, caption=", ".join(f"{k} {v}" for k, v in about.items()))
    for column in ("", "median s", "min-max s", "x ours", "MiB", "max error", "rms error"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, r in results.items():
        table.add_row(
            CONTENDERS[name],
            f"{r['median_seconds']:.3g}",
            f"{min(r['seconds']):.3g}-{max(r['seconds']):.3g}",
            f"{r['ratio_to_ours']:.2f}",
            f"{r['bytes_added'] / 2**20:,.0f}",
            f"{r['max_error']:.1e}",
            f"{r['rms_error']:.1e}",
        )
    console.print(table)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "worker")}
        args.json.write_text(json.dumps({"settings": settings, "about": about, "results": results}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
