"""Faults that come and go, and faint ones: windows from the first bad one to the HALT, on the real stack.

    python benchmarks/patterns.py                        # 14 patterns x 3 seeds, some 25 minutes on one core
    python benchmarks/patterns.py --only "every 2nd" --seeds 0 --json patterns.json

The recipe's tiny model in GRPO runs of TRL on one vLLM engine, default settings, temperature 0.7, at most 40 windows.
A sync that is lost lets one batch be sampled with the weights before the last update. Drift is the trimmed mean |Δ|
over the noise floor. What drifts by twice the floor in most windows, or comes and goes, has to be halted within 25.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runs import ROOT, make_trainer, quiet, shared_engine, tiny, versions

sys.path.insert(0, str(ROOT / "recipes" / "drill"))
import patches

WINDOWS, MOST, MATTERS = 40, 25, 2.0


def lost(when: Callable[[int, random.Random], bool]) -> patches.Patch:
    """A sync is lost where ``when(number, rng)`` says so; the first never is."""

    def patch(trainer: Any, seed: int) -> Any:
        generation, rng, number = trainer.vllm_generation, random.Random(seed), 0
        real = generation.sync_weights

        def sync_weights() -> None:
            nonlocal number
            number += 1
            if number == 1 or not when(number, rng):
                real()

        return patches.swapped(generation, "sync_weights", sync_weights)

    return patch


@contextlib.contextmanager
def larger_table(trainer: Any, _: int) -> Iterator[None]:
    """The engine's rotary table x 1.02."""
    model = patches.engine_model(trainer)
    tables = {m.cos_sin_cache.data_ptr(): m.cos_sin_cache for m in model.modules() if hasattr(m, "cos_sin_cache")}
    before = {key: table.clone() for key, table in tables.items()}
    for table in tables.values():
        table.mul_(1.02)
    try:
        yield
    finally:
        for key, table in tables.items():
            table.copy_(before[key])


def settings(**fields: Any) -> dict[str, Any]:
    return {"learning_rate": 1e-5} | fields


def set_to(name: str, value: Any) -> patches.Patch:
    return lambda trainer, _: patches.hidden(name)(trainer, value)


# fields of GRPOConfig, the patch, and the first window it can show in
PATTERNS: dict[str, tuple[dict[str, Any], patches.Patch | None, int]] = {
    "every 2nd": ({"learning_rate": 3e-4}, lost(lambda n, _: n % 2 == 0), 2),
    "every 3rd": ({"learning_rate": 3e-4}, lost(lambda n, _: n % 3 == 0), 3),
    "every 4th": ({"learning_rate": 3e-4}, lost(lambda n, _: n % 4 == 0), 4),
    "one in five": ({"learning_rate": 3e-4}, lost(lambda n, _: n % 5 == 0), 5),
    "2 of every 3": ({"learning_rate": 3e-4}, lost(lambda n, _: n % 3 != 1), 2),
    "random 30 %": ({"learning_rate": 3e-4}, lost(lambda n, rng: rng.random() < 0.3), 2),
    "top_p .98": (settings(top_p=0.98), None, 1),
    "temperature x 1.02": (settings(generation_kwargs={"temperature": 0.714}), None, 1),
    "o_proj x 1.04": (settings(), lambda trainer, _: patches.touch_tensors("o_proj", lambda x, by: by * x)(
        trainer, 1.04), 1),
    "rotary x 1.02": (settings(), larger_table, 1),
    "min_tokens 16": (settings(), set_to("min_tokens", 16), 1),
    "NaN in .2 %": (settings(), lambda trainer, _: patches.touch_logprobs(patches.spoil)(trainer, 0.002), 1),
    "fp32 trainer, 1e-4": ({"learning_rate": 1e-4, "bf16": False}, None, 2),
    "clean": (settings(), None, 1),
}  # fmt: skip

COMING_AND_GOING = tuple(name for name, (fields, *_) in PATTERNS.items() if fields == {"learning_rate": 3e-4})


def run(model: str, name: str, seed: int) -> dict[str, Any]:
    from trl_parity import ParityCallback

    fields, patch, onset = PATTERNS[name]
    callback = ParityCallback()
    trainer = make_trainer(model, [callback], max_steps=WINDOWS, seed=seed, **fields)
    with contextlib.nullcontext() if patch is None else patch(trainer, seed):
        trainer.train()
    verdicts = list(callback.verdicts)
    mean, floor = "trimmed/logp_abs_diff/mean", "floor/logp_abs_diff/mean"
    told = [v.stats for v in verdicts[onset - 1 :] if v.stats and v.stats[mean] is not None and v.stats[floor]]
    drifts = sorted(stats[mean] / stats[floor] for stats in told)
    halted = verdicts[-1].halted
    return {
        "pattern": name, "seed": seed, "statuses": "".join(str(v.status)[0] for v in verdicts),
        "halted": verdicts[-1].step - onset + 1 if halted else None, "rules": list(verdicts[-1].breaches),
        "worst": drifts[-1], "drift": drifts[len(drifts) // 2],
        "named": callback.diagnosis.cause if callback.diagnosis else None,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| pattern | windows to the HALT, by seed | drift / floor: median (worst) | named |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["pattern"] for row in rows):
        mine = [row for row in rows if row["pattern"] == name]
        halts = ", ".join("-" if row["halted"] is None else str(row["halted"]) for row in mine)
        drift = ", ".join(f"{row['drift']:.1f} ({row['worst']:.1f})" for row in mine)
        causes = ", ".join(sorted({f"`{row['named']}`" for row in mine if row["named"]})) or "-"
        lines.append(f"| {name} | {halts} | {drift} | {causes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PATTERNS, default=list(PATTERNS), metavar="PATTERN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="keep the rows here")
    options = parser.parse_args()
    quiet()
    rows = []
    with shared_engine():
        model = tiny()
        for name in options.only:
            for seed in options.seeds:
                rows.append(run(model, name, seed))
                print(f"{json.dumps(rows[-1])}", file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    late = [row for row in rows if row["drift"] >= MATTERS or row["pattern"] in COMING_AND_GOING]
    late = [row for row in late if row["halted"] is None or row["halted"] > MOST]
    print(
        f"\nComing and going, or at {MATTERS:g} x the floor, and not halted within {MOST}: {len(late)} of {len(rows)}."
    )
    print(versions())


if __name__ == "__main__":
    main()
