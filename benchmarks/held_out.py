"""Faults and architectures that no drill has: halted, and named for what they are? One process an architecture.

    python benchmarks/held_out.py                                  # all, 20 to 40 minutes on two cores
    python benchmarks/held_out.py --only Llama Phi3 --json held_out.json

Random tiny models of transformers, real TRL, one real vLLM engine each; six windows a run, at the callback's defaults.
A fault too faint for six windows is no miss of the diagnosis: it is listed apart. Confidence is worth something if of
the causes named with 90 % or more, 90 % are right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import ROOT, make_trainer, quiet, shared_engine

sys.path.insert(0, str(ROOT / "recipes" / "drill"))
import patches

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Phi3": {},
    "Mistral": {"sliding_window": 16},
    "Granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
                "logits_scaling": 0.5},
    "Cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "Gemma3Text": {"sliding_window": 16, "query_pre_attn_scalar": 32},
}  # fmt: skip
UNBROKEN: dict[str, dict[str, Any]] = {  # without what some FAULTS break; for clean runs (false_alarms.py)
    "GPT2": {"num_key_value_heads": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "Gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 32, "final_logit_softcapping": 4.0,
               "tie_word_embeddings": True},
}  # fmt: skip


def model_of(name: str, folder: Path) -> str:
    """A random model whose layers and positions matter, and its tokenizer."""
    import tiny_model
    import torch
    import transformers

    tokenizer = tiny_model.make_tokenizer()
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    shape = SHAPE | (ARCHITECTURES | UNBROKEN)[name] | ids
    config = getattr(transformers, f"{name}Config")(**shape, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(10.0 if "embed" in path else 4.0)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- faults -------------------------------------------------------------------------------------------------------


# the cause to be named, what is broken, how much, and the learning rate
FAULTS: dict[str, tuple[str, patches.Patch, Any, float]] = {
    "clean": ("", lambda trainer, _: contextlib.nullcontext(), None, 1e-5),
    "syncs lost": ("stale_weights", patches.lose_sync, None, 1e-3),
    "layer 0 never arrives": ("partial_sync", patches.lose_tensors, "layers.0", 1e-3),
    "o_proj x 1.3": ("partial_sync", patches.touch_tensors("o_proj", lambda x, by: by * x), 1.3, 1e-5),
    "embeddings one on": ("partial_sync", patches.touch_tensors("embed", lambda x, n: x.roll(n, 0)), 1, 1e-5),
    "temperature 1": ("temperature", patches.hidden("temperature"), 1.0, 1e-5),
    "logits x 1.2": ("temperature", patches.touch_logits(patches.scale), 1.2, 1e-5),
    "soft cap 2": ("temperature", patches.touch_logits(patches.soft_capped), 2.0, 1e-5),
    "top_k 5": ("truncated_sampling", patches.hidden("top_k"), 5, 1e-5),
    "presence_penalty .8": ("penalties", patches.hidden("presence_penalty"), 0.8, 1e-5),
    "min_tokens 12": ("constrained_decoding", patches.hidden("min_tokens"), 12, 1e-5),
    "bias -1 to 1": ("constrained_decoding", patches.touch_logits(patches.tilted), 1.0, 1e-5),
    "logits in fp8": ("head_precision", patches.touch_logits(patches.rounded), "float8_e4m3fn", 1e-5),
    "noise of .1": ("engine_numerics", patches.noisy, 0.1, 1e-5),
    "rotary table from 20 on": ("engine_state", patches.other_table, 20, 1e-5),
    "engine's norm eps .3": ("engine_state", patches.numbers("engine", "variance_epsilon"), 0.3, 1e-5),
    "trainer's norm eps .3": ("model_definition", patches.numbers("trainer", "variance_epsilon"), 0.3, 1e-5),
    "trainer's dropout .1": ("trainer_numerics", patches.dropout, 0.1, 1e-5),
    "own law x 1.2": ("model_definition", patches.own_law, 1.2, 1e-5),
    "prompts cut": ("token_misalignment", patches.short_prompts, 1, 1e-5),
}  # fmt: skip


def run(name: str) -> None:
    """All faults on one architecture; a line of JSON each."""
    from trl_parity import ParityCallback

    quiet()
    with tempfile.TemporaryDirectory() as folder, shared_engine():
        model = model_of(name, Path(folder))
        for fault, (cause, patch, strength, rate) in FAULTS.items():
            callback = ParityCallback()
            trainer = make_trainer(model, [callback], max_steps=6, learning_rate=rate)
            with patch(trainer, strength):
                trainer.train()
            found = callback.diagnosis
            row = {
                "architecture": name, "fault": fault, "cause": cause,
                "windows": "".join(str(v.status)[0] for v in callback.verdicts),
                "named": None if found is None else found.cause,
                "confidence": None if found is None else found.confidence,
            }  # fmt: skip
            print(json.dumps(row), flush=True)


def told(row: dict[str, Any]) -> str:
    """right, wrong, unknown, or faint: nothing breached, so nothing was asked."""
    if row["named"] is None:
        return "right" if not row["cause"] else "faint"
    if row["named"] == "unknown":
        return "unknown"
    return "right" if row["named"] == row["cause"] else f"{row['named']} ({row['confidence']:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="keep the rows here")
    parser.add_argument("--run", choices=ARCHITECTURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run)
        return
    rows: list[dict[str, Any]] = []
    for name in options.only:
        print(name, file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, __file__, "--run", name], stdout=subprocess.PIPE, text=True, check=True)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"architecture"')]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print("| fault | cause | " + " | ".join(options.only) + " |")
    print("|---|---|" + "---|" * len(options.only))
    for fault, (cause, *_) in FAULTS.items():
        cells = [told(row) for name in options.only for row in rows
                 if (row["architecture"], row["fault"]) == (name, fault)]  # fmt: skip
        print(f"| {fault} | {f'`{cause}`' if cause else 'none'} | " + " | ".join(cells) + " |")
    faulty = [row for row in rows if row["cause"]]
    named = [row for row in faulty if row["named"] not in (None, "unknown")]
    sure = [row for row in named if row["confidence"] >= 0.9]
    right = [row for row in named if row["named"] == row["cause"]]
    print(f"\n{len(faulty)} faults: {sum('H' in row['windows'] for row in faulty)} halted within six windows, "
          f"{len(right)} named rightly, {len(named) - len(right)} wrongly, "
          f"{sum(row['named'] == 'unknown' for row in faulty)} unknown, {sum(row['named'] is None for row in faulty)} "
          f"too faint to breach.")  # fmt: skip
    print(f"Of {len(sure)} named with 90 % confidence or more, {sum(row in right for row in sure)} are right.")
    clean = [row for row in rows if not row["cause"]]
    print(f"{len(clean)} clean runs: {sum(set(row['windows']) != {'O'} for row in clean)} not OK in every window.")


if __name__ == "__main__":
    main()
