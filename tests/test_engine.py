"""Engines of their own process: settings that only an engine's construction decides, and many ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import environment, run_on_two_ranks, save_tiny_model

HERE = Path(__file__).parent


def python(code, *args, env=None, timeout=420):
    """Run code in a fresh interpreter with the tests' helpers on its path."""
    command = [sys.executable, "-c", code, *map(str, args)]
    env = environment(PYTHONPATH=str(HERE), **(env or {}))
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)


RAW = """
import sys
from pathlib import Path
from support import digit_reward, grpo_args, prompts
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
from support import digit_reward, grpo_args, prompts
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


PLUGIN = """
from vllm.plugins import load_general_plugins
load_general_plugins()
import torch
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
for dtype in (torch.float32, torch.bfloat16):
    layer = torch.nn.Linear(64, 64, bias=False, dtype=dtype)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    x = torch.randn(8, 64, dtype=dtype)
    layer.weight.data.fill_(0.5)  # what a weight sync does
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), x @ torch.full((64, 64), 0.5, dtype=dtype))
print("LIVE")
"""


def test_the_vllm_plugin_keeps_live_weights_in_every_engine_process():
    done = python(PLUGIN)
    assert "LIVE" in done.stdout, done.stderr[-3000:]


def reduce_on(rank, world, directory):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29617", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    from accelerate import Accelerator
    from test_metrics import random_batch

    from trl_parity.collectives import gather_rows
    from trl_parity.metrics.reduction import reduce_sums
    from trl_parity.metrics.statistics import measure
    from trl_parity.metrics.sums import MismatchSums

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    sums = MismatchSums.zeros()
    for i in range(rank):  # rank 0 has nothing, the others more and more
        sums.add_(
            measure(
                random_batch(torch.Generator().manual_seed(i), 3 * rank, 5, 0.1), first_sequence=rank * 100 + i * 30
            )
        )
    reduced = reduce_sums(sums, accelerator)
    rows = gather_rows([{"rank": rank}] * rank)
    torch.save((sums, reduced, rows), f"{directory}/{rank}.pt")


def test_ranks_hold_the_same_sums_after_the_reduction(tmp_path):
    from trl_parity.metrics.statistics import compute
    from trl_parity.metrics.sums import MismatchSums

    world = 3
    torch.multiprocessing.spawn(reduce_on, args=(world, str(tmp_path)), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world)]
    expected = MismatchSums.zeros()
    for own, _, _ in results:
        expected.add_(own)
    for _, reduced, rows in results:
        torch.testing.assert_close(reduced.additive, expected.additive)
        assert torch.equal(reduced.additive, results[0][1].additive)  # to the last bit: one verdict everywhere
        assert torch.equal(reduced.maxima, expected.maxima)
        assert [row["rank"] for row in rows] == [1, 2, 2]
    assert compute(results[0][1])["kl_k3"] == compute(results[2][1])["kl_k3"] > 0


RANKS = """
import os, sys
from pathlib import Path
from support import digit_reward, grpo_args, prompts
from trl import GRPOTrainer
from trl_parity import ParityCallback
model, out, kind = sys.argv[1:]
os.environ["WANDB_DIR"] = out
from accelerate import PartialState
arguments = {"top_p": 0.9} if kind == "truncated" else {"max_steps": 3, "mask_truncated_completions": True}
if kind == "masked":  # on rank 1 no completion may end: all are truncated, and so masked
    never = {0: -100.0, 1: -100.0}
    arguments["generation_kwargs"] = {"logit_bias": never if PartialState().process_index else {1: 4.0}}
callback = ParityCallback(truncation="ignore", rich_every_n_windows=1, action="log" if kind == "masked" else "stop")
args = grpo_args(Path(out), **({"max_steps": 20, "learning_rate": 1e-4, "per_device_train_batch_size": 8,
                                "report_to": "wandb"} | arguments))
trainer = GRPOTrainer(model=model, args=args, reward_funcs=digit_reward, train_dataset=prompts(), callbacks=[callback])
assert trainer.accelerator.num_processes == 2
trainer.train()
rank = trainer.accelerator.process_index
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
    assert [d.name for d in (out / "parity" / "incidents").iterdir()] == ["step-3"]


@pytest.mark.engine
def test_a_rank_whose_batches_are_all_masked_judges_like_the_others(tmp_path):
    _, lines, _, _ = two_ranks(tmp_path, "masked")
    assert len(lines) == 3
    tokens = [int(line.split()[3]) for line in lines]
    assert all(0 < n < 8 * 24 for n in tokens)  # rank 0's alone, and only those that ended
    assert all(float(line.split()[4]) > 0 and float(line.split()[5]) > 0 for line in lines)


def sharded_head_on(rank, world, directory, port):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    import trl_parity.scoring.scorer
    from trl_parity.records import SamplingSettings
    from trl_parity.scoring.scorer import CompletionScorer

    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, 40, (3 + rank, 12), generator=generator)  # uneven shards
    attention = torch.ones_like(ids)
    if rank == 1:
        attention[:, -5:] = 0  # nothing to compare on this rank

    def score(passes=1):
        settings = SamplingSettings()
        scorer = CompletionScorer(
            model, 5, temperature=0.7, sampling=settings, replay_sampling=False, chunk_bytes=1 << 20
        )
        with torch.no_grad(), scorer:
            for _ in range(passes):
                model(input_ids=ids, attention_mask=attention)
        return scorer

    expected = score().scores()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(score().scores(), expected)
    assert type(model.lm_head.weight).__name__ == "DTensor"

    # a failure on one rank alone, in the first of two passes: the others must not wait for it
    real, calls = trl_parity.scoring.scorer.score_tokens, []

    def failing(*args, **kwargs):
        calls.append(1)
        if rank == 0 and len(calls) == 1:
            raise RuntimeError("out of memory on rank 0")
        return real(*args, **kwargs)

    trl_parity.scoring.scorer.score_tokens = failing
    scorer = score(passes=2)
    assert (scorer.error is not None) == (rank == 0)
    assert len(calls) == (1 if rank == 0 else 2)
    dist.barrier()
    dist.destroy_process_group()


def test_a_sharded_head_is_scored_right_and_without_a_deadlock(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    torch.multiprocessing.spawn(sharded_head_on, args=(2, str(model), 29620), nprocs=2)


ZERO3 = """
import sys
import deepspeed
import torch
from transformers import AutoModelForCausalLM
from trl_parity.scoring.scorer import CompletionScorer
from trl_parity.records import SamplingSettings

deepspeed.init_distributed("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.randint(2, 40, (3, 12), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))


def score(forward):
    scorer = CompletionScorer(
        model, 5, temperature=0.7, sampling=SamplingSettings(), replay_sampling=False, chunk_bytes=1 << 20
    )
    with torch.no_grad(), scorer:
        forward(input_ids=ids, attention_mask=torch.ones_like(ids))
    return scorer.scores()


expected = score(model)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    },
)
assert model.lm_head.weight.numel() == 0, "the head is not sharded"
torch.testing.assert_close(score(engine), expected)
assert model.lm_head.weight.numel() == 0, "the head was left gathered"
"""


def test_a_zero3_head_is_gathered_and_let_go(tmp_path):
    pytest.importorskip("deepspeed", reason="not in the lock: its CPU build needs a compiler and its own build step")
    run_on_two_ranks(ZERO3, tmp_path, save_tiny_model(tmp_path / "model"), DS_ACCELERATOR="cpu")


def test_a_window_costs_less_than_64_kib_of_reduction_whatever_its_tokens():
    from trl_parity.judging.noise_floor import SOURCES
    from trl_parity.metrics.sums import MismatchSums

    window, floor = MismatchSums.zeros(), MismatchSums.zeros(bootstrap_samples=2)
    size = sum(8 * (x.additive.numel() + x.maxima.numel()) for x in (window, *[floor] * len(SOURCES)))
    assert size <= 64 << 10  # with the noise floor measured in the same window


@pytest.mark.engine
def test_sixty_clean_batches_from_still_to_sharpening_never_halt(tmp_path):
    """The short form of benchmarks/false_alarms.py; the long one has 1,200."""
    import json

    script, out = HERE.parent / "benchmarks" / "false_alarms.py", tmp_path / "figures.json"
    command = [sys.executable, str(script), "--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = [status for row in json.loads(out.read_text())["rows"] for status in row["statuses"].items()]
    counts = {}
    for status, n in statuses:
        counts[status] = counts.get(status, 0) + n
    assert sum(counts.values()) == 60
    assert counts.get("HALT", 0) == counts.get("BREACH", 0) == counts.get("ERROR", 0) == 0
    assert counts.get("OK", 0) >= 54
    assert "false-WARN rate" in done.stdout
