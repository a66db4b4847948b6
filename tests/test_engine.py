"""Engines of their own process: settings that only an engine's construction decides, and many ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import save_tiny_model

HERE = Path(__file__).parent


def python(code, *args, env=None, timeout=420):
    """Run code in a fresh interpreter with the tests' helpers on its path."""
    environment = os.environ | {"PYTHONPATH": str(HERE)} | (env or {})
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


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

    from trl_parity.distributed import gather_rows, reduce_sums
    from trl_parity.metrics import MismatchSums, measure

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
    from trl_parity.metrics import MismatchSums, compute

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
model, out = sys.argv[1:]
os.environ["WANDB_DIR"] = out
callback = ParityCallback(truncation="ignore", rich_every_n_windows=1)
args = grpo_args(Path(out), max_steps=20, learning_rate=1e-4, top_p=0.9, per_device_train_batch_size=8,
                 report_to="wandb")
trainer = GRPOTrainer(model=model, args=args, reward_funcs=digit_reward, train_dataset=prompts(), callbacks=[callback])
assert trainer.accelerator.num_processes == 2
trainer.train()
rank = trainer.accelerator.process_index
lines = [f"{v.step} {v.status} {v.streak} {v.stats.num_tokens} {v.stats['kl_k3']!r}" for v in callback.verdicts]
weight = sum(float(p.double().sum()) for p in trainer.model.parameters())
Path(out, f"rank{rank}.txt").write_text("\\n".join([*lines, f"{weight!r} {trainer.state.global_step}"]))
"""


@pytest.mark.engine
def test_two_ranks_reach_the_same_verdicts_and_stop_together(tmp_path):
    model, out, script = save_tiny_model(tmp_path / "model"), tmp_path / "out", tmp_path / "run.py"
    out.mkdir()
    script.write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29618"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(model), str(out)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((out / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert [line.split()[1] for line in first.splitlines()[:-1]] == ["BREACH", "BREACH", "HALT"]
    assert first.splitlines()[0].split()[3] == str(16 * 24)  # tokens of both ranks
    assert len((out / "parity" / "metrics.jsonl").read_text().splitlines()) == 3  # rank 0 alone writes
    assert done.stderr.count("HALT at step 3") == 1
