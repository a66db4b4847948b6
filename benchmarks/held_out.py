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
from collections.abc import Callable, Iterator
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
    "Gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "Gemma3Text": {"sliding_window": 16, "query_pre_attn_scalar": 32},
}  # fmt: skip


def model_of(name: str, folder: Path) -> str:
    """A random model whose layers and positions matter, and its tokenizer."""
    import tiny_model
    import torch
    import transformers

    tokenizer = tiny_model.make_tokenizer()
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{name}Config")(**SHAPE | ARCHITECTURES[name] | ids, vocab_size=len(tokenizer))
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


def engine_tensors(part: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """After each sync, tensors of that name are changed inside the engine."""

    def patch(trainer: Any) -> Any:
        generation = trainer.vllm_generation
        real = generation.sync_weights

        def sync() -> None:
            real()
            for name, tensor in patches.engine_model(trainer).named_parameters():
                if part in name:
                    tensor.data.copy_(change(tensor.data))

        return patches.swapped(generation, "sync_weights", sync)

    return patch


def every(owner: str, attribute: str, value: Any) -> Callable[[Any], Any]:
    """A number of all modules of one side that have it: ``trainer`` or ``engine``."""

    @contextlib.contextmanager
    def patch(trainer: Any) -> Iterator[None]:
        model = trainer.model if owner == "trainer" else patches.engine_model(trainer)
        with contextlib.ExitStack() as stack:
            for module in model.modules():
                if attribute in vars(module):
                    stack.enter_context(patches.swapped(module, attribute, value))
            yield

    return patch


def short_prompts(trainer: Any) -> Any:
    """The engine reads prompts without their first token."""
    generation = trainer.vllm_generation
    real = generation.generate

    def generate(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        _, *rest = real([list(ids)[1:] for ids in prompts], *args, **kwargs)
        return prompts, *rest

    return patches.swapped(generation, "generate", generate)


def logits(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda trainer: patches.touch_logits(lambda z, _: change(z))(trainer, None)


def hidden(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda trainer: patches.hidden(name)(trainer, value)


def soft_capped(z: Any) -> Any:
    return 2.0 * (z / 2.0).tanh()


def in_eight_bits(z: Any) -> Any:
    import torch

    return z.to(torch.float8_e4m3fn).to(z.dtype)


def biased(z: Any) -> Any:
    import torch

    return z + torch.linspace(-1.0, 1.0, z.shape[-1])


class Noise:
    """Another one at each call, from random numbers of its own."""

    def __init__(self) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, z: Any) -> Any:
        import torch

        return z + 0.1 * torch.randn(z.shape, generator=self.generator)


FAULTS: dict[str, tuple[str, Callable[[Any], Any], float]] = {
    "clean": ("", lambda trainer: contextlib.nullcontext(), 1e-5),
    "syncs lost": ("stale_weights", lambda t: patches.lose_sync(t, None), 1e-3),
    "layer 0 never arrives": ("partial_sync", lambda t: patches.lose_tensors(t, "layers.0"), 1e-3),
    "o_proj x 1.3": ("partial_sync", engine_tensors("o_proj", lambda x: 1.3 * x), 1e-5),
    "embeddings one place on": ("partial_sync", engine_tensors("embed_tokens", lambda x: x.roll(1, 0)), 1e-5),
    "temperature 1": ("temperature", hidden("temperature", 1.0), 1e-5),
    "logits x 1.2": ("temperature", logits(lambda z: 1.2 * z), 1e-5),
    "soft cap 2": ("temperature", logits(soft_capped), 1e-5),
    "top_k 5": ("truncated_sampling", hidden("top_k", 5), 1e-5),
    "presence_penalty .8": ("penalties", hidden("presence_penalty", 0.8), 1e-5),
    "min_tokens 12": ("constrained_decoding", hidden("min_tokens", 12), 1e-5),
    "bias -1 to 1": ("constrained_decoding", logits(biased), 1e-5),
    "logits in fp8": ("head_precision", logits(in_eight_bits), 1e-5),
    "noise of .1": ("engine_numerics", lambda t: logits(Noise())(t), 1e-5),
    "rotary table from 20 on": ("engine_state", lambda t: patches.other_table(t, 20), 1e-5),
    "engine's norm eps .3": ("engine_state", every("engine", "variance_epsilon", 0.3), 1e-5),
    "trainer's norm eps .3": ("model_definition", every("trainer", "variance_epsilon", 0.3), 1e-5),
    "trainer's dropout .1": ("trainer_numerics", every("trainer", "attention_dropout", 0.1), 1e-5),
    "prompts cut": ("token_misalignment", short_prompts, 1e-5),
}


def run(name: str) -> None:
    """All faults on one architecture; a line of JSON each."""
    from trl_parity import ParityCallback

    quiet()
    with tempfile.TemporaryDirectory() as folder, shared_engine():
        model = model_of(name, Path(folder))
        for fault, (cause, patch, rate) in FAULTS.items():
            callback = ParityCallback()
            trainer = make_trainer(model, [callback], max_steps=6, learning_rate=rate)
            with patch(trainer):
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
    for fault, (cause, _, _) in FAULTS.items():
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
