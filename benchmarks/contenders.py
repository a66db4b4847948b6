"""The contenders of benchmarks/head.py. Each runs in a process of its own, by this file; head.py starts them.

A contender may live in an interpreter of its own, so this file needs torch only, and each contender its own package.
All get the same hidden states, weight and targets, and no gradient is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch

Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, "torch.Tensor | None"]]


@dataclass(frozen=True)
class Contender:
    """``label``: its row. ``how``: the function called, and what is rounded where."""

    label: str
    how: str
    entropy: bool = True  # False: it gives the log-prob only
    fp32: bool = False  # products of fp32 numbers, whatever the inputs are
    devices: tuple[str, ...] = ("cpu", "cuda")
    peer: bool = False  # runs with --peer-python
    tensors: int = 0  # bytes of its (tokens x vocabulary) tensors together, a token and vocabulary entry
    copies: bool = False  # holds the whole weight in fp32


CONTENDERS = {
    "ours": Contender("ours", "score_tokens: products exact, sums in fp32; Triton on CUDA, torch on a CPU"),
    "ours_torch": Contender("ours, torch", "the same without Triton", devices=("cuda",)),
    "naive": Contender("full fp32 logits", "log_softmax(h.float() @ w.float().T)", fp32=True, tensors=8, copies=True),
    "trl": Contender("TRL fused", "the kernel of TRL's fused head: logits rounded to the inputs' dtype"),
    "trl_fp32": Contender("TRL fused, fp32", "the same as under cast_lm_head_to_fp32", fp32=True),
    "liger": Contender(
        "Liger GRPO",
        "the log-prob of Liger's GRPO loss: logits rounded to the inputs' dtype",
        entropy=False,
        peer=True,
    ),
    "liger_fp32": Contender("Liger GRPO, fp32", "the same on hidden.float()", entropy=False, fp32=True, peer=True),
    "liger_ce": Contender(
        "Liger cross-entropy",
        "LigerFusedLinearCrossEntropy, reduction='none': logits rounded to the inputs' dtype",
        entropy=False,
        devices=("cuda",),
        peer=True,
    ),
    "cce": Contender(
        "CCE", "linear_cross_entropy, reduction='none': sums in fp32", entropy=False, devices=("cuda",), peer=True
    ),
    "cce_compile": Contender(
        "CCE, torch.compile",
        "its implementation without Triton: full logits, rounded to the inputs' dtype",
        entropy=False,
        devices=("cpu",),
        peer=True,
        tensors=2,
    ),
}


def load(name: str) -> Score:
    """The contender as a function (hidden, weight, targets) -> (logprobs, entropy or None)."""
    if name.startswith("ours"):
        from trl_parity.scoring.head import score_tokens
        from trl_parity.scoring.head_spec import Head

        def ours(h: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> Any:
            backend = "triton" if h.is_cuda and name == "ours" else "torch"
            return score_tokens(h, targets, Head(weight=w), backend=backend)

        return ours
    if name == "naive":
        return _naive
    if name.startswith("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

        def trl(h: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> Any:
            h = h.float() if name == "trl_fp32" else h
            return ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, chunk, None, 1.0, ("log_probs", "entropy"))[
                :2
            ]

        return trl
    if name == "liger_ce":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda h, w, targets: (-liger_fused_linear_cross_entropy(h, w, targets, reduction="none"), None)
    if name.startswith("liger"):
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

        def liger(h: torch.Tensor, w: torch.Tensor, targets: torch.Tensor) -> Any:
            h = h.float() if name == "liger_fp32" else h
            return LigerFusedLinearPPOBase.chunk_forward(h[None], w, targets[None])[0], None

        return liger
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if name == "cce" else "torch_compile"
    return lambda h, w, targets: (-linear_cross_entropy(h, w, targets, reduction="none", impl=implementation), None)


def _naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(hidden.float() @ weight.float().T, -1)
    return logp.gather(1, targets[:, None])[:, 0], -logp.exp().mul_(logp).sum(-1)


def peak_bytes(device: str) -> int:
    """The most memory this process has held: torch's allocator on CUDA, else the resident set."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at the size of the process that spawned this one, VmHWM does not
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: str) -> None:
    """Start the peak anew, so that one while the inputs were read or a kernel was compiled hides nothing."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def main() -> None:
    """Memory and scores of one contender on the first line of stdout, then a time for every line on stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(CONTENDERS))
    parser.add_argument("inputs", help="file with hidden, weight, targets, and the sample whose scores are asked for")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    cuda = options.device.startswith("cuda")
    score = load(options.name)
    inputs = torch.load(options.inputs, mmap=True)  # one copy in memory for all contenders
    hidden, weight, targets = (inputs[name].to(options.device) for name in ("hidden", "weight", "targets"))
    for rows in (*hidden.split(256), *weight.split(256)):  # read in, before the peak is looked at
        rows.sum()
    for n in (8, 24, 40):  # libraries, threads and compilers come up before the measurement
        score(hidden[:n], weight[: 8 * n], targets[:n] % (8 * n))
    forget_peak(options.device)
    before = peak_bytes(options.device)
    logprobs, entropy = score(hidden, weight, targets)
    added = peak_bytes(options.device) - before
    scores = [None if x is None else x.cpu().double()[inputs["sample"]].tolist() for x in (logprobs, entropy)]
    versions = machine.versions(("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy"))
    print(json.dumps({"versions": versions, "bytes_added": added, "scores": scores}), flush=True)
    del logprobs, entropy
    if cuda:
        torch.cuda.empty_cache()  # the other contenders are on the same device
    for _ in sys.stdin:
        start = time.perf_counter()
        score(hidden, weight, targets)
        if cuda:
            torch.cuda.synchronize()
        print(json.dumps(time.perf_counter() - start), flush=True)
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
