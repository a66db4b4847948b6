"""`trl-parity check` of this checkout and of another one, run by run on one machine: seconds, and the same verdicts.

    git worktree add ../before v0.6.0
    python benchmarks/check_speed.py --before ../before                      # the recipe's tiny model, eager
    python benchmarks/check_speed.py --before ../before --compiled           # the engine compiled, as by default
    python benchmarks/check_speed.py --before ../before --model smollm2      # `pip install gguf`; half an hour
    python benchmarks/check_speed.py --before ../before --model smollm2-shape --rounds 1

Each run is the whole command in a process of its own, from its start to its end, imports included; the two builds take
turns, and which is first changes from round to round. ``smollm2-shape`` is a random Llama of SmolLM2-135M's shape: the
same work, for a machine that has neither the model nor a network. A stage's seconds are those between two lines of
progress. Exit code 1 where a row's verdict is another in the two builds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from machine import describe, lines
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("before", "now")
SMOLLM2 = ["--set", "max_model_len=1024", "--max-length", "128"]


def smollm2_shape(folder: Path) -> Path:
    """A random model of SmolLM2-135M's shape with a tokenizer of as many words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return folder
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "?", *(f"w{i}" for i in range(49149))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="?")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True, eos_token_id=1,
        pad_token_id=0, bos_token_id=None, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def model_folder(name: str) -> tuple[Path, list[str]]:
    """The model's folder, and what else the command is told of it."""
    if name == "tiny":
        import runs

        return Path(runs.tiny()), ["--set", "enable_prefix_caching=true"]
    if name == "smollm2":
        import smollm2

        return smollm2.build(), SMOLLM2
    if name == "smollm2-shape":
        return smollm2_shape(ROOT / ".cache" / "trl-parity" / name), SMOLLM2
    return Path(name), []


def run(root: Path, arguments: list[str]) -> dict[str, Any]:
    """One check by the build in ``root``: seconds, CPU seconds, seconds of each stage, what it found."""
    command = [sys.executable, "-m", "trl_parity", "check", *arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    if environment.pop("PYTHONDONTWRITEBYTECODE", None):  # compiled once, as wherever Python may write
        environment["PYTHONPYCACHEPREFIX"] = str(ROOT / ".cache" / "pycache")
    start = last = time.perf_counter()
    stages: dict[str, float] = defaultdict(float)
    stage = "imports"
    with subprocess.Popen(
        command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        said = []
        for line in child.stderr:
            said.append(line)
            if line.startswith("trl-parity: "):
                now = time.perf_counter()
                stages[stage] += now - last
                last, stage = now, " ".join(w for w in line.split()[1:] if not w[0].isdigit()).split(" about")[0]
        out = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    stages[stage] += time.perf_counter() - last
    if not out.startswith("{"):
        raise SystemExit(f"{root}: exit {child.returncode}\n{''.join(said)[-3000:]}")
    return {
        "seconds": seconds,
        "cpu": used.ru_utime + used.ru_stime,
        "stages": dict(stages),
        "found": json.loads(out),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="checkout of the other build")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2, smollm2-shape, or a folder")
    parser.add_argument("--compiled", action="store_true", help="do not set enforce_eager")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("arguments", nargs="*", help="more of the command's, after --")
    options = parser.parse_args()
    folder, more = model_folder(options.model)
    eager = [] if options.compiled else ["--set", "enforce_eager=true"]
    told = ["--model", str(folder), "--config", "rl", "--set", "dtype=float32", *eager, *more, *options.arguments]
    roots = dict(zip(NAMES, (options.before.resolve(), ROOT), strict=True))
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for number in range(options.rounds):
        for name in NAMES if number % 2 == 0 else reversed(NAMES):
            made[name].append(run(roots[name], told))
            one = made[name][-1]
            print(f"{name}: {one['seconds']:.1f} s, {one['cpu']:.1f} s of CPU, {one['found']['outcome']}", flush=True)
    console = Console(width=120)
    table = Table(title=f"trl-parity check {' '.join(told)}")
    for column in ("", "before", "now", "before / now", "of each round"):
        table.add_column(column, justify="left" if not column else "right")
    for what, value in (("seconds", "seconds"), ("CPU seconds", "cpu")):
        values = {name: [one[value] for one in made[name]] for name in NAMES}
        ratios = [a / b for a, b in zip(values["before"], values["now"], strict=True)]
        middles = [statistics.median(values[name]) for name in NAMES]
        each = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(what, *(f"{x:.1f}" for x in middles), f"{statistics.median(ratios):.2f}", each)
    names = list(dict.fromkeys(stage for name in NAMES for one in made[name] for stage in one["stages"]))
    for stage in names:
        middles = [statistics.median(one["stages"].get(stage, 0.0) for one in made[name]) for name in NAMES]
        table.add_row(f"  {stage}", *(f"{x:.1f}" for x in middles), "", "")
    console.print(table)
    verdicts = [{r["id"]: r["verdict"] for r in made[name][0]["found"]["rows"]} for name in NAMES]
    differing = sorted(
        id for id in verdicts[0].keys() | verdicts[1].keys() if verdicts[0].get(id) != verdicts[1].get(id)
    )
    for id in differing:
        print(f"{id}: {verdicts[0].get(id)} before, {verdicts[1].get(id)} now")
    trials = [len(made[name][0]["found"]["trials"]) for name in NAMES]
    print(f"{len(verdicts[1])} rows, {len(differing)} of another verdict; trials: {trials[0]} before, {trials[1]} now")
    print(", ".join(f"{name} {made[name][0]['found']['trl_parity']} ({roots[name].name})" for name in NAMES))
    print(lines(describe()))
    if options.json:
        options.json.write_text(json.dumps({"told": told, "machine": describe(), "runs": made}, indent=1))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
