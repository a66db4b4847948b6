"""Real faults at three strengths each: how many windows from onset to halt, with the default configuration.

    python benchmarks/faults.py                     # all, about 8 minutes on two cores
    python benchmarks/faults.py --only stale_weights temperature
    python benchmarks/faults.py --json faults.json

Each fault is one setting of the real stack or one small honest patch of it, on a real GRPO run with a real vLLM
engine, present from the first batch where its nature allows. The drift column is the mean |log-ratio| (trimmed) at
the worst window up to the halt, over its noise floor. A fault that drifts above 5 x the floor must be halted; weaker
ones are printed too, halted or not. ``control`` has no fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import runs

STEPS = 14
Patch = Callable[[Any, Any], contextlib.AbstractContextManager[None]]  # (trainer, strength)


@dataclass(frozen=True)
class Fault:
    """A way to break the stack. ``arguments`` of GRPOConfig and ParityConfig and the patch depend on the strength."""

    name: str  # the cause's identifier
    what: str
    strengths: tuple[Any, ...]
    arguments: Callable[[Any], dict[str, Any]] = lambda s: {}
    parity: dict[str, Any] = field(default_factory=dict)
    patch: Patch | None = None
    engine: dict[str, Any] = field(default_factory=dict)  # engine arguments: a process of its own
    onset: int = 1


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside the block."""
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def lose_sync(trainer: Any, _: Any) -> Any:
    """The first sync arrives, later ones are lost."""
    generation, calls = trainer.vllm_generation, []
    real = generation.sync_weights
    return swapped(generation, "sync_weights", lambda: calls.append(1) or (real() if len(calls) == 1 else None))


def lose_tensors(trainer: Any, part: str) -> Any:
    """Tensors whose name has ``part`` in it never reach the engine again after the first sync."""
    model = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    real, calls = model.load_weights, []

    def load(weights: Any) -> Any:
        calls.append(1)
        first = len(calls) <= len(list(trainer.model.named_parameters()))  # one call a tensor: all of the first sync
        return real((name, tensor) for name, tensor in weights if first or part not in name)

    return swapped(model, "load_weights", load)


def keep_cache(trainer: Any, _: Any) -> Any:
    """The engine can't reset its prefix cache (blocks are held), and says so in a bool that nobody reads."""
    return swapped(trainer.vllm_generation.llm, "reset_prefix_cache", lambda *a, **k: False)


def touch_logprobs(change: Callable[[list, Any, random.Random], list]) -> Patch:
    """A patch of what the engine hands over: per sequence, its list of one-element log-prob lists."""

    def patch(trainer: Any, strength: Any) -> Any:
        generation, rng = trainer.vllm_generation, random.Random(0)
        real = generation.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            prompts, completions, logprobs, ids = real(*args, **kwargs)
            return prompts, completions, [change(row, strength, rng) for row in logprobs], ids

        return swapped(generation, "generate", generate)

    return patch


def shift(row: list, share: float, rng: random.Random) -> list:
    """Log-probs one place late: each is the one of the token before."""
    return [row[0], *row[:-1]] if rng.random() < share else row


def spoil(row: list, share: float, rng: random.Random) -> list:
    return [[math.nan] if rng.random() < share else value for value in row]


@contextlib.contextmanager
def dropout(trainer: Any, p: float) -> Iterator[None]:
    """Dropout left on: in train mode the trainer scores with it."""
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = p
    yield


@contextlib.contextmanager
def other_rope(trainer: Any, factor: float) -> Iterator[None]:
    """The trainer rotates positions by another frequency than the engine."""
    for module in trainer.model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.mul_(factor)
    yield


def long_prompts(trainer: Any, _: Any) -> Any:
    """Every prompt begins with the same 48 tokens, so that prefixes are cached, and the cache is never reset."""
    prefix = "mint oak fox sea " * 3
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"prompt": prefix + row["prompt"]})
    return keep_cache(trainer, None)


FAULTS = [
    Fault("control", "nothing is wrong", (1e-6, 1e-4, 1e-3), lambda s: {"learning_rate": s}),
    Fault("temperature", "engine's temperature x", (1.05, 1.15, 1.5),
          lambda s: {"generation_kwargs": {"temperature": 0.7 * s}}),
    Fault("truncated_sampling", "top_p, not replayed", (0.98, 0.95, 0.9), lambda s: {"top_p": s},
          {"truncation": "ignore"}),
    Fault("truncated_sampling", "min_p, not replayed", (0.02, 0.05, 0.2), lambda s: {"min_p": s},
          {"truncation": "ignore"}),
    Fault("penalties", "repetition_penalty, not replayed", (1.02, 1.05, 1.2), lambda s: {"repetition_penalty": s},
          {"truncation": "ignore"}),
    Fault("constrained_decoding", "logit_bias on one letter", (-0.5, -2.0, -100.0),
          lambda s: {"generation_kwargs": {"logit_bias": {20: s}}}),
    Fault("token_misalignment", "log-probs one place late in a share of sequences", (0.05, 0.2, 1.0),
          patch=touch_logprobs(shift)),
    Fault("nonfinite_logprobs", "NaN in a share of tokens", (0.02, 0.1, 0.5), patch=touch_logprobs(spoil)),
    Fault("stale_weights", "sync lost after the first batch, learning rate", (1e-4, 3e-4, 1e-3),
          lambda s: {"learning_rate": s}, patch=lose_sync, onset=2),
    Fault("partial_sync", "tensors that never arrive (learning rate 1e-3)", ("layers.0.mlp.down", "mlp", "layers"),
          lambda s: {"learning_rate": 1e-3}, patch=lose_tensors, onset=2),
    Fault("trainer_numerics", "attention dropout left on", (0.01, 0.05, 0.2), patch=dropout),
    Fault("model_definition", "trainer's rope frequencies x", (1.01, 1.05, 1.3), patch=other_rope),
    Fault("dtype_gap", "fp32 trainer (no autocast), bf16 engine, learning rate", (1e-6, 1e-5, 1e-4),
          lambda s: {"bf16": False, "learning_rate": s}),
    Fault("raw_logprobs", "logprobs_mode=raw_logprobs at temperature", (0.9, 0.7, 0.5), lambda s: {"temperature": s},
          engine={"logprobs_mode": "raw_logprobs"}),
    Fault("kv_cache_precision", "fp8_e5m2 KV cache, completion tokens", (10, 20, 40),
          lambda s: {"max_completion_length": s}, engine={"kv_cache_dtype": "fp8_e5m2"}),
    Fault("stale_prefix_cache", "prefix cache kept over syncs, learning rate", (1e-4, 3e-4, 1e-3),
          lambda s: {"learning_rate": s}, patch=long_prompts, onset=2,
          engine={"block_size": 32, "enable_prefix_caching": True, "max_model_len": 128}),
]  # fmt: skip


def run(model: str, fault: Fault, strength: Any, seed: int) -> dict[str, Any]:
    """One run until it halts or its steps are over."""
    from trl_parity import ParityCallback

    callback = ParityCallback(action="stop", **fault.parity)
    arguments = {"max_steps": STEPS, "seed": seed} | fault.arguments(strength)
    trainer = runs.make_trainer(model, [callback], **arguments)
    with contextlib.nullcontext() if fault.patch is None else fault.patch(trainer, strength):
        trainer.train()
    verdicts = list(callback.verdicts)
    ratios = [
        v.stats["trimmed/logp_abs_diff/mean"] / max(v.stats["floor/logp_abs_diff/mean"], 1e-12)
        for v in verdicts[fault.onset - 1 :]
        if v.stats["trimmed/logp_abs_diff/mean"] is not None
    ]
    last = verdicts[-1]
    return {
        "fault": fault.name,
        "what": fault.what,
        "strength": strength,
        "halted": last.halted,
        "windows": last.step - fault.onset + 1 if last.halted else None,
        "drift": max(ratios, default=None),
        "rules": sorted({rule for v in verdicts for rule in v.breaches}),
        "statuses": [str(v.status) for v in verdicts],
    }


def run_group(faults: list[Fault], seed: int) -> list[dict[str, Any]]:
    """Faults that share an engine, in this process."""
    runs.quiet()
    model, rows = runs.tiny(), []
    with runs.shared_engine(**faults[0].engine):
        for fault in faults:
            for strength in fault.strengths:
                row = run(model, fault, strength, seed)
                print(f"{fault.name} {strength}: {row['statuses']} {row['rules']} {row['drift']}", flush=True)
                rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"windows from onset to halt, of at most {STEPS}")
    for column in ("cause", "fault", "strength", "windows", "drift / floor", "rules that breached"):
        table.add_column(column)
    missed = []
    for i, row in enumerate(rows):
        if row["fault"] != "control" and not row["halted"] and (row["drift"] or 0) > 5:
            missed.append(row)
        first = i == 0 or rows[i - 1]["what"] != row["what"]
        table.add_row(row["fault"] if first else "", row["what"] if first else "", str(row["strength"]),
                      str(row["windows"] or "-"), "-" if row["drift"] is None else f"{row['drift']:.1f}",
                      ", ".join(row["rules"]) or "-")  # fmt: skip
    console = Console(width=150)
    console.print(table)
    halts = [row for row in rows if row["fault"] == "control" and row["halted"]]
    console.print(f"missed above 5 x the floor: {len(missed)}; control halted: {len(halts)}")
    console.print(runs.versions())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="causes to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [i for i, fault in enumerate(FAULTS) if not options.only or fault.name in options.only]
    if options.out:
        options.out.write_text(json.dumps(run_group([FAULTS[i] for i in chosen], options.seed)))
        return
    groups: dict[str, list[str]] = {}
    for i in chosen:
        groups.setdefault(str(FAULTS[i].engine), []).append(FAULTS[i].name)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        for number, names in enumerate(groups.values()):
            out, log = Path(directory) / f"{number}.json", Path(directory) / f"{number}.log"
            command = [sys.executable, __file__, "--seed", str(options.seed), "--out", str(out), "--only", *names]
            print(f"engine {number + 1}/{len(groups)}: {', '.join(dict.fromkeys(names))} ...", flush=True)
            with open(log, "w") as f:
                done = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT)
            if done.returncode:  # the other engines' faults go on
                failed.append(names[0])
                print(f"failed:\n{log.read_text()[-3000:]}", file=sys.stderr)
            else:
                rows += json.loads(out.read_text())
    report(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if failed:
        sys.exit(f"not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
