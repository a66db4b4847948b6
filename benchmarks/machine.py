"""What a benchmark runs on, and what that device can do at best in this very run: the physical limit of its times.

    python benchmarks/machine.py                 # print it
    python benchmarks/machine.py --device cuda

The limit is measured, not read from a data sheet: a large copy for the memory, a large square product for the
arithmetic, each the best of many tries in a fraction of a second, with the threads the process has.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SECONDS = 0.4  # spent on each rate
PACKAGES = ("torch", "transformers", "trl", "vllm")


def best_seconds(device: str, call: Callable[[], Any], budget: float = SECONDS) -> float:
    """The shortest of as many calls as fit in the budget, after one that is not counted (at least three)."""
    cuda = device.startswith("cuda")
    call()
    best, tries, end = float("inf"), 0, time.perf_counter() + budget
    while tries < 3 or time.perf_counter() < end:
        if cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            best = min(best, start.elapsed_time(stop) / 1e3)
        else:
            begun = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begun)
        tries += 1
    return best


def copy_bandwidth(device: str = "cpu") -> float:
    """GB/s of a plain copy far larger than the caches: bytes read and bytes written both count."""
    size = (1024 if device.startswith("cuda") else 256) << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(device, lambda: target.copy_(source)) / 1e9


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square matrix product in this dtype, with torch's default precision (no TF32)."""
    n = 8192 if device.startswith("cuda") else 1536
    left, right = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * n**3 / best_seconds(device, lambda: torch.mm(left, right, out=out))


def limits(device: str = "cpu") -> dict[str, float]:
    """Both rates of this device now: GB/s of a copy, FLOP/s in fp32 and bf16. About two seconds."""
    return {
        "copy_gb_per_s": copy_bandwidth(device),
        "gemm_flop_per_s_float32": gemm_rate(device, torch.float32),
        "gemm_flop_per_s_bfloat16": gemm_rate(device, torch.bfloat16),
    }


def describe(device: str = "cpu", packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """The device, its threads and the versions of what is installed, for a caption and the JSON."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    return about | versions(packages)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def lines(about: dict[str, Any], rates: dict[str, float] | None = None) -> str:
    """`describe` and `limits` in two lines to print under a table."""
    text = ", ".join(f"{name} {value}" for name, value in about.items() if name != "device")
    text = f"{about['device']}: {text}"
    if rates:
        text += (
            f"\nlimits measured in this run: copy {rates['copy_gb_per_s']:.3g} GB/s, product "
            f"{rates['gemm_flop_per_s_float32'] / 1e9:,.0f} GFLOP/s in fp32, "
            f"{rates['gemm_flop_per_s_bfloat16'] / 1e9:,.0f} in bf16"
        )
    return text


def limit_seconds(rates: dict[str, float], *, flop: float = 0.0, moved: float = 0.0, dtype: str = "float32") -> float:
    """The least time work of so many FLOP and bytes to move can take: whichever of the two takes longer."""
    arithmetic = flop / rates[f"gemm_flop_per_s_{dtype}"] if flop else 0.0
    return max(arithmetic, moved / 1e9 / rates["copy_gb_per_s"])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The middle half's ends and the median: (25 %, 50 %, 75 %), interpolated, of one value or more."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(lines(describe(options.device), limits(options.device)))


if __name__ == "__main__":
    main()
