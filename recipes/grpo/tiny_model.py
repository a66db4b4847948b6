"""A tiny policy for the CPU recipe: created, trained for some twenty seconds, cached.

    python recipes/grpo/tiny_model.py [--dir .cache/trl-parity]

Qwen3 architecture (vLLM serves it like the large ones), one token a character. Its demonstrations disagree about
the order: some sort upwards, some downwards. So the policy learns how to sort but does what the task wants only
some of the time, which gives GRPO a reward to raise within a few dozen steps. The free words before the answer are
drawn at random, so the policy keeps an entropy in which drift shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

try:
    from . import task
except ImportError:  # run as a script, or imported from one
    import task

DEFAULT_CACHE = Path(".cache/trl-parity")
PAD, EOS = "<pad>", "<eos>"
MAX_POSITIONS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class TinySpec:
    """What the weights depend on, beside the source of this file and of ``task.py``."""

    seed: int = 0
    steps: int = 180
    batch_size: int = 32
    learning_rate: float = 5e-3
    upwards: float = 0.4  # share of the demonstrations that sort upwards, which is what the reward wants
    answer_weight: float = 3.0  # of a token of the answer in the loss; a free word's token has 1
    min_words: int = 2
    max_words: int = 4
    hidden_size: int = 128
    layers: int = 2
    head_dim: int = 32  # vLLM's CPU attention takes 32, 64, 80, 96, 112, 128 and a few more


def cache_name(spec: TinySpec) -> str:
    """The folder's name: a hash of the spec and of the code that turns it into weights."""
    digest = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode())
    for source in (__file__, task.__file__):
        digest.update(Path(source).read_bytes())
    return f"tiny-{digest.hexdigest()[:12]}"


def build(directory: str | os.PathLike | None = None, seed: int = 0, *, spec: TinySpec | None = None) -> Path:
    """The folder of the trained tiny model under ``directory``; trains it first if it is not there.

    Two processes may race: each trains in a folder of its own, the first to finish gives it its name.
    """
    spec = spec or TinySpec(seed=seed)
    root = Path(directory) if directory is not None else DEFAULT_CACHE
    target = root.resolve() / cache_name(spec)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{target.name}.building-", dir=target.parent))
    try:
        tokenizer = make_tokenizer()
        with _one_thread():
            model = train(spec, tokenizer)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"tiny model: saved in {target}", flush=True)
    return target


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: the sums then run in one order, whatever the number of cores, and so small a model
    waits longer for a second thread than it computes when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_tokenizer():
    """One token a character, no merges, no added spaces: decoding gives back exactly what was encoded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set("".join(task.WORDS) + task.DIGITS + " =:sort"))
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=PAD,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def demonstration(item: str, rng: random.Random, spec: TinySpec) -> str:
    """Some free words, then an answer, sorted upwards or downwards."""
    words = " ".join(rng.choices(task.WORDS, k=rng.randint(spec.min_words, spec.max_words)))
    answer = task.expected_answer(item)
    return f"{words} = {answer if rng.random() < spec.upwards else answer[::-1]}"


def _new_model(spec: TinySpec, vocabulary_size: int, pad_id: int, eos_id: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = spec.hidden_size // spec.head_dim
    config = Qwen3Config(
        vocab_size=vocabulary_size,
        hidden_size=spec.hidden_size,
        intermediate_size=3 * spec.hidden_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=spec.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=eos_id,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = Qwen3ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)  # the norms
    return model


def train(spec: TinySpec, tokenizer):
    """Plain supervised training on the CPU, on the tokens of the completion, its end token included."""
    model = _new_model(spec, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    print(
        f"tiny model: training {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters "
        f"for {spec.steps} steps",
        flush=True,
    )
    rng = random.Random(f"demonstrations-{spec.seed}")
    source = task.items(spec.seed, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.98))
    start = time.perf_counter()
    model.train()
    for step in range(1, spec.steps + 1):
        warmup, left = min(1.0, step / 30), 1 - step / (spec.steps + 1)
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * warmup * max(0.05, left)
        input_ids, weights = _batch([next(source) for _ in range(spec.batch_size)], rng, spec, tokenizer)
        logits = model(input_ids=input_ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
        )
        loss = torch.dot(losses, weights[:, 1:].flatten()) / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == spec.steps:
            print(
                f"tiny model: step {step}/{spec.steps}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return model.eval()


def _batch(chosen: list[str], rng: random.Random, spec: TinySpec, tokenizer):
    """Right-padded ids and their loss weights (0: prompt and padding), each of shape (batch, longest)."""
    prompts = [tokenizer(task.text_prompt(item))["input_ids"] for item in chosen]
    completions = [tokenizer(demonstration(item, rng, spec) + EOS)["input_ids"] for item in chosen]
    marker = tokenizer.convert_tokens_to_ids("=")
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    input_ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
    weights = torch.zeros(len(chosen), longest)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        weights[row, len(prompt) : end] = 1.0
        weights[row, len(prompt) + completion.index(marker) : end] = spec.answer_weight
    return input_ids, weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=DEFAULT_CACHE, help="where the model is cached")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another model")
    arguments = parser.parse_args()
    print(build(arguments.dir, arguments.seed))
