"""Make a reference data set: a transformers model in a stated dtype answers prompts, greedily and with fixed seeds.
Each row has token ids, log-probs of the taken and of the most likely tokens, and entropy; manifest.json says who made
it with what. The same command gives the same bytes; after a kill it goes on where it was. Prompts are drawn over the
tokenizer's own vocabulary, or come from a JSONL file ("prompt": text or chat messages, or "prompt_ids")."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..config import fields
from ..errors import ConfigError
from ..lines import progress_bar

SHORT = "make a reference data set from a transformers model"

EXAMPLES = """examples:
  trl-parity baseline --model Qwen/Qwen3-0.6B --output baselines/qwen3
  trl-parity baseline --model runs/mine --output baselines/mine --prompts prompts.jsonl --dtype bfloat16
  trl-parity baseline --model M --output DIR --num-prompts 10000 --seeds 0 1 --batch-size 64
  accelerate launch --main_process_port 0 --multi_gpu -m trl_parity baseline --model M --output DIR  # a process a GPU
  torchrun --nproc_per_node 4 -m trl_parity baseline --model M --output DIR --device cpu

exit codes: 0 made, or already there; 2 it can't be made, as where the directory holds another one"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from ..preflight.baseline.settings import Generation

    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of the model")
    add("--revision", help="of the model on the hub")
    add("--output", required=True, metavar="DIR", help="where the data set goes, or goes on")
    add("--prompts", metavar="FILE", help="JSONL of prompts (default: drawn over the vocabulary)")
    add("--num-prompts", type=int, metavar="N", help="prompts (default: 1000; of a file: all)")
    add("--max-prompt-tokens", type=int, metavar="N", help="default: 1024, or what the context leaves if that is less")
    add("--boundaries", type=int, nargs="*", default=[16], metavar="N", help="lengths at whose multiples an engine "
        "changes what it does: KV block size, max_num_batched_tokens (default: 16)")  # fmt: skip
    add("--prompt-seed", type=int, default=0, metavar="SEED", help="of the drawn prompts (default: 0)")
    add("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32", help="default: float32")
    fields.add_arguments(parser, Generation)
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from pathlib import Path

    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from ..preflight.baseline.baseline import load_tokenizer, model_folder, model_sha256, tokenizer_sha256
    from ..preflight.baseline.generate import make_baseline
    from ..preflight.baseline.settings import Generation
    from ..preflight.baseline.sources import DrawnPrompts, FilePrompts, Source
    from ..preflight.prompts.cases import Vocabulary

    generation = fields.from_arguments(Generation, options)
    state = PartialState(cpu=options.device == "cpu")
    device = state.device if options.device == "auto" else torch.device(options.device)
    sha256 = model_sha256(options.model, options.revision)  # first: where there is no model, it says so
    folder = model_folder(options.model, options.revision)
    tokenizer = load_tokenizer(folder)
    disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{options.model} can't be loaded ({e}). Expected a causal language model.") from e
    limit = _prompt_limit(options, model.config.get_text_config())
    source: Source
    if options.prompts is not None:
        source = FilePrompts(Path(options.prompts), tokenizer, limit, options.num_prompts)
    else:
        vocabulary = Vocabulary.of(tokenizer, size=model.get_input_embeddings().weight.shape[0])
        count = 1000 if options.num_prompts is None else options.num_prompts
        source = DrawnPrompts(vocabulary, count, options.prompt_seed, limit, tuple(options.boundaries))
    identity = {
        "model_sha256": sha256,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "dtype": options.dtype,
        "attention": model.config._attn_implementation,
        "device": device.type,
    }
    with _progress(state.is_main_process) as progress:
        baseline = make_baseline(
            options.output, model.to(device), source, generation, identity,
            name=options.model, state=state, progress=progress,
        )  # fmt: skip
    if baseline is not None:
        shards = baseline.manifest["shards"]
        size = sum(shard["bytes"] for shard in shards)
        print(f"{options.output}: {len(baseline):,} rows of {source.count:,} prompts in {len(shards)} shards, "
              f"{size / 2**20:.1f} MiB")  # fmt: skip
    state.wait_for_everyone()
    return 0


def _prompt_limit(options: argparse.Namespace, config: Any) -> int:
    context = getattr(config, "max_position_embeddings", None)
    room = None if context is None else context - options.max_new_tokens
    asked = options.max_prompt_tokens
    limit = min(1024, room or 1024) if asked is None else asked
    if limit < 1 or (room is not None and limit > room):
        raise ConfigError(
            f"prompts of {limit} tokens and {options.max_new_tokens} new ones; the model's context is {context}. "
            "Expected both to fit: lower --max-new-tokens or --max-prompt-tokens."
        )
    return limit


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[int, int, int, int], None]]:
    """A bar on a terminal, else a plain line now and then; the numbers are make_baseline's."""
    if not shown:
        yield lambda *numbers: None
        return
    start = last = time.monotonic()
    if not sys.stderr.isatty():

        def line(done: int, total: int, answers: int, tokens: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 10 or done == total:
                last = now
                rate = tokens / max(1e-9, now - start)
                print(f"baseline: {done}/{total} shards, {answers:,} answers here, {rate:,.0f} tokens/s",
                      file=sys.stderr, flush=True)  # fmt: skip

        yield line
        return
    with progress_bar("shards", kept=True) as update:

        def draw(done: int, total: int, answers: int, tokens: int) -> None:
            rate = tokens / max(1e-9, time.monotonic() - start)
            update(done, total, more=f"{answers:,} answers here, {rate:,.0f} tokens/s")

        yield draw
