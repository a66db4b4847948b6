"""What ``cost_budget`` saves, and what a sample of tokens makes of statistics and of the time to a halt.

    python benchmarks/cost_budget.py                       # all three parts
    python benchmarks/cost_budget.py --only statistics     # seconds; no engine
    python benchmarks/cost_budget.py --only cost --fp32    # where the CPU has no units for bf16

``statistics``: healthy windows whose own head is off the fp32 one by rounding, as a bf16 head is; each statistic of a
sample of the tokens against that of all, root mean square of the relative error, and what the window's own standard
error is beside it. ``cost``: a real GRPO run of a model with hidden size 1,024, vocabulary 151,936 and two layers, by
budget: the account of its windows (medians over calm ones), and its statistics against those of budget 1, which has
the same completions. So large a batch as 8,192 tokens takes too long on a CPU, so ``cost_min_tokens`` is set to what
the run's few tokens leave. ``halts``: drills that break the tiny run from its sixth step on, by budget: windows to the
halt, and the cause named.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import runs
import torch
from machine import describe, limits, lines
from rich.console import Console
from rich.table import Table

from trl_parity import ParityCallback
from trl_parity.metrics.statistics import compute, measure
from trl_parity.records import ScoredBatch
from trl_parity.scoring.token_sample import TokenSample

LEAST = 64  # cost_min_tokens of the tiny runs: their batches have about 500 tokens
JUDGED = ("trimmed/kl_k3", "trimmed/logp_abs_diff/mean", "trimmed/logp_abs_diff/p99", "ess", "honesty", "kl_k1")
MEANS = ("kl_k3", "logp_abs_diff/mean", "entropy/trainer")
BREAK = 5  # steps before a drill's fault
DRILLS = ("logit-scale", "hidden-top-k", "lost-sync", "lost-tensors", "noise", "fp8-logits")


# ---- statistics ----------------------------------------------------------------------------------------------------


def healthy(rng: np.random.Generator, rounding: float, rows: int = 64, columns: int = 1024) -> ScoredBatch:
    """Engine noise of heavy tails, and an own head that rounds: both grow with how unlikely a token is."""
    size = rng.exponential(1.0, (rows, columns))
    rollout = torch.from_numpy(-size)
    scale = torch.from_numpy(0.01 * (0.2 + size) * np.exp(0.5 * rng.standard_normal((rows, 1))))
    trainer = rollout + scale * torch.from_numpy(rng.standard_t(5, (rows, columns)))
    own = trainer + rounding * torch.from_numpy(rng.uniform(-1.0, 1.0, (rows, columns)) * np.sqrt(3.0))
    lengths = torch.from_numpy(rng.integers(columns // 4, columns + 1, rows))
    entropy = torch.from_numpy(rng.exponential(1.0, (rows, columns)))
    return ScoredBatch(
        mask=torch.arange(columns) < lengths[:, None], rollout_logprobs=rollout, trainer_logprobs=trainer,
        own_logprobs=own, entropy=entropy, law_entropy=entropy,
    )  # fmt: skip


def thinned(batch: ScoredBatch, tokens: int, seed: int) -> ScoredBatch:
    """Of which about so many tokens were scored."""
    rows, columns = batch.mask.nonzero(as_tuple=True)
    kept, drawn = TokenSample(tokens / len(rows), seed).draw(rows)
    weights = torch.zeros(batch.mask.shape)
    weights[rows[kept], columns[kept]] = drawn
    assert batch.entropy is not None
    return replace(
        batch, weights=weights, entropy=batch.entropy.where(weights > 0, 0.0),
        law_entropy=batch.entropy.where(weights > 0, 0.0),
        trainer_logprobs=batch.trainer_logprobs.where(weights > 0, batch.own_logprobs),
    )  # fmt: skip


def of_statistics(args: argparse.Namespace) -> Table:
    table = Table("", title=f"relative error, root mean square of {args.windows} windows of about 41,000 tokens")
    names = (*JUDGED, *MEANS)
    found: dict[str, list[str]] = {name: [] for name in names}
    batches = [(seed, rounding) for rounding in (0.0, 0.01, 0.04) for seed in range(args.windows)]
    errors: dict[tuple[float, int, str], list[float]] = {}
    for seed, rounding in batches:
        batch = healthy(np.random.default_rng(seed), rounding)
        truth = compute(measure(batch))
        for tokens in (1024, 4096, 16384):
            stats = compute(measure(thinned(batch, tokens, seed)))
            for name in names:
                scale = truth["se/kl_k1"] if name == "kl_k1" else truth[name]
                errors.setdefault((rounding, tokens, name), []).append((stats[name] - truth[name]) / scale)
    for (rounding, tokens, name), values in errors.items():
        if name == names[0]:
            table.add_column(f"{tokens:,}\n{rounding:g} nats", justify="right")
        found[name].append(f"{np.sqrt(np.mean(np.square(values))):.2%}")
    for name, cells in found.items():
        table.add_row(name, *cells)
    table.caption = "columns: tokens scored, rounding of the own head. kl_k1: relative to its standard error"
    return table


# ---- cost ----------------------------------------------------------------------------------------------------------


def wide_model(folder: Path) -> str:
    """A random Qwen3 of hidden size 1,024, two layers and a vocabulary of 151,936, with the tiny model's tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(runs.tiny())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16,
            num_key_value_heads=8, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        ))  # fmt: skip
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=2.0 / 1024**0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def of_cost(args: argparse.Namespace) -> Table:
    title = (
        f"GRPO, {'fp32' if args.fp32 else 'bf16'}, hidden 1,024, vocabulary 151,936, 2 layers; {args.steps} steps, "
        f"medians of the last {args.steps - 2}"
    )
    columns = ("cost_budget", "step, s", "cost/seconds, s", "cost/share", "coverage", *MEANS)
    table = Table(*columns, title=title)
    with tempfile.TemporaryDirectory() as folder, runs.shared_engine(**({"dtype": "float32"} if args.fp32 else {})):
        model, full = wide_model(Path(folder) / "model"), None
        for budget in (1.0, args.budget):
            callback = ParityCallback(action="log", cost_budget=budget, cost_min_tokens=args.least)
            trainer = runs.make_trainer(
                model, [callback], max_steps=args.steps, per_device_train_batch_size=8, learning_rate=1e-6,
                max_completion_length=args.length, output_dir=str(Path(folder) / str(budget)), bf16=not args.fp32,
            )  # fmt: skip
            trainer.train()
            windows = [v.stats for v in callback.verdicts if v.stats][2:]
            full = full or windows

            def middle(name: str, windows: Any = windows) -> float:
                return statistics.median(w[name] for w in windows)

            errors = (max(abs(w[name] / f[name] - 1.0) for w, f in zip(windows, full, strict=True)) for name in MEANS)
            step = statistics.median(w["cost/seconds"] / w["cost/share"] for w in windows)
            table.add_row(f"{budget:g}", f"{step:.2f}", f"{middle('cost/seconds'):.3f}", f"{middle('cost/share'):.2%}",
                          f"{middle('cost/coverage'):.1%}", *(f"{x:.2%}" for x in errors))  # fmt: skip
            del trainer
    table.caption = f"statistics: largest difference of a window from that of budget 1; cost_min_tokens {args.least}"
    return table


# ---- halts ---------------------------------------------------------------------------------------------------------


def late(drill: Any, stack: contextlib.ExitStack) -> Any:
    """Breaks the run from a step on."""
    from transformers import TrainerCallback

    class Late(TrainerCallback):
        trainer: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == BREAK:
                stack.enter_context(drill.patch(self.trainer, drill.strengths[-1]))

    return Late()


def of_halts(args: argparse.Namespace) -> Table:
    import drills
    from transformers import AutoTokenizer

    columns = ("drill", "cost_budget", "coverage before", "windows to the halt", "named")
    table = Table(*columns, title="drills from a step on")
    model = runs.tiny()
    setting = drills.Setting(0.7, AutoTokenizer.from_pretrained(model))
    with runs.shared_engine():
        for drill in drills.pick(list(args.drills), drills.DRILLS):
            for budget in (1.0, args.budget):
                with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
                    callback = ParityCallback(action="stop", cost_budget=budget, cost_min_tokens=LEAST)
                    breaking = late(drill, stack)
                    arguments = drill.run_args(drill.strengths[-1], setting, False)
                    breaking.trainer = runs.make_trainer(
                        model, [breaking, callback], max_steps=BREAK + 10, output_dir=folder, **arguments
                    )
                    breaking.trainer.train()
                    verdicts = list(callback.verdicts)
                before = statistics.median(v.stats["cost/coverage"] for v in verdicts[1:BREAK] if v.stats)
                halted = verdicts[-1].step - BREAK if verdicts[-1].halted else "-"
                cause = callback.diagnosis.cause if callback.diagnosis else "-"
                table.add_row(drill.name, f"{budget:g}", f"{before:.0%}", str(halted), cause)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"statistics": of_statistics, "cost": of_cost, "halts": of_halts}
    parser.add_argument("--only", choices=parts, nargs="+", default=list(parts))
    parser.add_argument("--budget", type=float, default=0.005)
    parser.add_argument("--windows", type=int, default=10, help="of statistics")
    parser.add_argument("--steps", type=int, default=12, help="of a run of cost")
    parser.add_argument("--fp32", action="store_true", help="both sides of cost in fp32, not bf16")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion of cost")
    parser.add_argument("--least", type=int, default=16, help="cost_min_tokens of cost")
    parser.add_argument("--drills", nargs="+", default=DRILLS)
    args = parser.parse_args()
    runs.quiet()
    console = Console(width=160, highlight=False)
    for name in args.only:
        console.print(parts[name](args))
    console.print(lines(describe(), limits()))


if __name__ == "__main__":
    main()
