"""Engines of their own process: settings that only an engine's construction decides, and many ranks."""

import json

import pytest
from support import ROOT, warm
from support.models import save_tiny_model
from support.processes import PATH, environment, python, run_on_two_ranks

RAW = """
import sys
from pathlib import Path
from support.trainers import digit_reward, grpo_args, prompts
import trl.generation.vllm_generation as generation
real = generation.LLM
generation.LLM = lambda **kwargs: real(**(kwargs | {"logprobs_mode": "raw_logprobs"}))
from trl import GRPOTrainer
from trl_parity import ParityCallback
model, out = sys.argv[1:]
callback = ParityCallback()
trainer = GRPOTrainer(model=model, args=grpo_args(Path(out), max_steps=20, learning_rate=1e-5),
                      reward_funcs=digit_reward, train_dataset=prompts(), callbacks=[callback])
trainer.train()
print("STATUSES", *[str(v.status) for v in callback.verdicts])
stats = callback.verdicts[-1].stats
assert stats["honesty_low"] > 1.0, dict(stats)
"""


@pytest.mark.engine
def test_raw_logprobs_halt_from_the_first_window_on(tmp_path):
    done = python(RAW, save_tiny_model(tmp_path / "model"), tmp_path / "out")
    assert "STATUSES BREACH BREACH HALT" in done.stdout, done.stderr[-3000:]
    assert "not those of the law that was sampled" in done.stderr
    # and it was said before the first update, from the engine's own settings
    assert "the engine returns raw_logprobs" in done.stderr


LATE = """
import sys
from pathlib import Path
from support.trainers import digit_reward, grpo_args, prompts
from trl import GRPOTrainer
model, out = sys.argv[1:]
trainer = GRPOTrainer(model=model, args=grpo_args(Path(out)), reward_funcs=digit_reward, train_dataset=prompts())
from trl_parity import ParityCallback
trainer.add_callback(ParityCallback())
trainer.train()
"""


@pytest.mark.engine
def test_a_callback_attached_after_the_engine_was_built_is_refused_on_a_cpu(tmp_path):
    # VLLM_PLUGINS="" keeps our plugin out, as where the package is on the path but not installed
    done = python(LATE, save_tiny_model(tmp_path / "model"), tmp_path / "out", env={"VLLM_PLUGINS": ""})
    assert done.returncode != 0
    assert "InterceptionError" in done.stderr, done.stderr[-3000:]
    assert "Create ParityCallback before the trainer" in done.stderr


RANKS = """
import os, sys
from pathlib import Path
from support.trainers import digit_reward, grpo_args, prompts
from trl import GRPOTrainer
from trl_parity import ParityCallback
model, out, kind = sys.argv[1:]
os.environ["WANDB_DIR"] = out
from accelerate import PartialState
arguments = {"truncated": {"top_p": 0.9}, "masked": {"max_steps": 3, "mask_truncated_completions": True}}.get(kind, {})
if kind == "masked":  # on rank 1 no completion may end: all are truncated, and so masked
    never = {0: -100.0, 1: -100.0}
    arguments["generation_kwargs"] = {"logit_bias": never if PartialState().process_index else {1: 4.0}}
callback = ParityCallback(truncation="ignore", rich_every_n_windows=1, action="log" if kind == "masked" else "stop")
args = grpo_args(Path(out), **({"max_steps": 20, "learning_rate": 1e-4, "per_device_train_batch_size": 8,
                                "report_to": "wandb"} | arguments))
trainer = GRPOTrainer(model=model, args=args, reward_funcs=digit_reward, train_dataset=prompts(), callbacks=[callback])
assert trainer.accelerator.num_processes == 2
rank, generation = trainer.accelerator.process_index, trainer.vllm_generation
generate = generation.generate
def now_and_then(*args, **kwargs):
    generation.top_p = 1.0 if trainer.state.global_step % 2 else 0.5
    return generate(*args, **kwargs)
if kind == "now and then" and rank == 1:
    generation.generate = now_and_then
trainer.train()
lines = [f"{v.step} {v.status} {v.streak} {v.stats.num_tokens} {v.stats['kl_k3']!r} {v.stats.get('floor/kl_k3')!r}"
         for v in callback.verdicts]
d = callback.diagnosis
lines.append("none" if d is None else f"{d.cause} {d.explained!r} {d.confidence!r} {len(d.evidence)}")
weight = sum(float(p.double().sum()) for p in trainer.model.parameters())
Path(out, f"rank{rank}.txt").write_text("\\n".join([*lines, f"{weight!r} {trainer.state.global_step}"]))
"""


def two_ranks(tmp_path, kind):
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    told = run_on_two_ranks(RANKS, tmp_path, model, out, kind, ACCELERATE_USE_CPU="true")
    first, second = ((out / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second  # verdicts, statistics to the last digit, weights
    return out, first.splitlines()[:-2], first.splitlines()[-2], told


@pytest.mark.engine
def test_two_ranks_reach_the_same_verdicts_and_stop_together(tmp_path):
    out, lines, found, told = two_ranks(tmp_path, "truncated")
    assert [line.split()[1] for line in lines] == ["BREACH", "BREACH", "HALT"]
    assert lines[0].split()[3] == str(16 * 24)  # tokens of both ranks
    assert len((out / "parity" / "metrics.jsonl").read_text().splitlines()) == 3  # rank 0 alone writes
    assert told.count("HALT at step 3") == 1
    assert found.split()[0] == "truncated_sampling"  # named alike, from the residuals of both ranks
    # of the episode's first breach, and of the halt
    assert sorted(d.name for d in (out / "parity" / "incidents").iterdir()) == ["step-1", "step-3"]


@pytest.mark.engine
def test_a_rank_that_is_sick_in_every_second_window_halts_both_and_is_named(tmp_path):
    out, lines, _, told = two_ranks(tmp_path, "now and then")
    assert [line.split()[1] for line in lines] == ["BREACH", "OK", "BREACH", "OK", "HALT"]
    assert "Rank 1 drifts in 3 of the last windows" in told
    stats = json.loads((out / "parity" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (stats["replica/rank"], stats["replica/windows"]) == (1, 3)


@pytest.mark.engine
def test_a_rank_whose_batches_are_all_masked_judges_like_the_others(tmp_path):
    _, lines, _, _ = two_ranks(tmp_path, "masked")
    assert len(lines) == 3
    tokens = [int(line.split()[3]) for line in lines]
    assert all(0 < n < 8 * 24 for n in tokens)  # rank 0's alone, and only those that ended
    assert all(float(line.split()[4]) > 0 and float(line.split()[5]) > 0 for line in lines)


@pytest.mark.engine
def test_sixty_clean_batches_from_still_to_sharpening_never_halt(tmp_path):
    """The short form of benchmarks/false_alarms.py; the long one has 1,200."""
    script, out = ROOT / "benchmarks" / "false_alarms.py", tmp_path / "figures.json"
    done = warm.run([script, "--quick", "--json", out], env=environment(PYTHONPATH=PATH), timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = [status for row in json.loads(out.read_text())["rows"] for status in row["statuses"].items()]
    counts = {}
    for status, n in statuses:
        counts[status] = counts.get(status, 0) + n
    assert sum(counts.values()) == 60
    assert counts.get("HALT", 0) == counts.get("BREACH", 0) == counts.get("ERROR", 0) == 0
    assert counts.get("OK", 0) >= 54
    assert "false-WARN rate" in done.stdout
