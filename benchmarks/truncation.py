"""What it costs to replay the engine's truncation and penalties on top of the head, by setting.

    python benchmarks/truncation.py                              # 512 tokens x 151,936 vocabulary x 1,024 hidden, bf16
    python benchmarks/truncation.py --tokens 1024 --std 5 --json truncation.json

A Qwen3 of one layer with random weights makes a pass over the tokens, and CompletionScorer's own account is the time,
the head included. ``--std`` is the spread of its logits: the smaller, the flatter the law and the more tokens are
kept. "x head" is the median ratio within a round, "more than 64" the share of tokens whose kept set does not end
within the 64 most likely: they are looked at again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import describe, lines, quartiles
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_parity.records import SamplingSettings
from trl_parity.scoring.head import DEFAULT_CHUNK_BYTES, score_tokens
from trl_parity.scoring.head_spec import Head
from trl_parity.scoring.sampling import replay_top
from trl_parity.scoring.scorer import CompletionScorer

SETTINGS = {
    "no truncation": SamplingSettings(),
    "top_p 0.95": SamplingSettings(top_p=0.95),
    "top_p 0.7": SamplingSettings(top_p=0.7),
    "top_k 20": SamplingSettings(top_k=20),
    "top_k 50, top_p 0.95": SamplingSettings(top_k=50, top_p=0.95),
    "min_p 0.05": SamplingSettings(min_p=0.05),
    "repetition_penalty 1.1": SamplingSettings(repetition_penalty=1.1),  # every token by whole rows of logits
}
PROMPT = 8


def score(model: Any, ids: torch.Tensor, sampling: SamplingSettings) -> tuple[float, Any]:
    """Seconds inside the scorer, and the scores."""
    scorer = CompletionScorer(
        model, ids.shape[1] - PROMPT, temperature=1.0, sampling=sampling, replay_sampling=True,
        chunk_bytes=DEFAULT_CHUNK_BYTES,
    )  # fmt: skip
    with torch.no_grad(), scorer:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1)
    return scorer.seconds, scorer.scores()


def too_few(model: Any, ids: torch.Tensor, sampling: SamplingSettings) -> float:
    """The share of tokens for which the 64 most likely do not tell the kept set."""
    with torch.no_grad():
        states = model.model(input_ids=ids).last_hidden_state[0, PROMPT - 1 : -1]
    top = torch.empty(len(states), 64, device=states.device)
    scores = score_tokens(states, ids[0, PROMPT:], Head(weight=model.lm_head.weight), top=top)
    known = replay_top(top, scores.logprobs, sampling, model.config.vocab_size)[1]
    return 1.0 - known.double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--std", type=float, default=7.0, help="of the logits (default 7)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="write every number here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
        initializer_range=options.std / options.hidden**0.5,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).to(options.device).eval()
    ids = torch.randint(0, options.vocab, (1, PROMPT + options.tokens), device=options.device)
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    entropy = score(model, ids, SamplingSettings())[1].entropy.mean().item()
    for _ in range(options.repeats):
        for name, sampling in SETTINGS.items():
            times[name].append(score(model, ids, sampling)[0])
    shape = f"{options.tokens:,} tokens x {options.vocab:,} x {options.hidden:,}"
    table = Table(title=f"{shape}, bf16; mean entropy {entropy:.1f} nats")
    for column in ("", "median s", "quartiles", "x head", "more than 64"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows = []
    for name, sampling in SETTINGS.items():
        low, middle, high = quartiles(times[name])
        ratio = quartiles([own / head for own, head in zip(times[name], times["no truncation"], strict=True)])[1]
        share = too_few(model, ids, sampling) if sampling.truncates else None
        table.add_row(name, f"{middle:.3g}", f"{low:.3g}-{high:.3g}", f"{ratio:.2f}",
                      "-" if share is None else f"{share:.1%}")  # fmt: skip
        rows.append({"setting": name, "seconds": times[name], "x head": ratio, "more than 64": share})
    about = describe(options.device)
    console = Console(width=100, highlight=False)
    console.print(table)
    console.print(lines(about))
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "shape": shape, "entropy": entropy, "rows": rows}))


if __name__ == "__main__":
    main()
