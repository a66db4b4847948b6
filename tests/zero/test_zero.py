"""Whole GRPO runs under DeepSpeed ZeRO on two gloo ranks: `make test-deepspeed`."""

import json

import pytest
from support.sharded_runs import run

pytestmark = pytest.mark.engine


def run_under_zero(tmp_path, stage, bad, zero=None, parity=None, **trainer):
    pytest.importorskip("deepspeed", reason="make test-deepspeed has it")
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0} | (zero or {})
    config = dict.fromkeys(auto, "auto") | {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "deepspeed.json")}
    told = run(tmp_path, bad, env, parity=parity or {}, trainer=trainer)
    assert told["sharded_by"] == "DistributedType.DEEPSPEED"
    return told


@pytest.mark.parametrize("stage", [2, 3])
def test_by_default_a_run_is_clean_until_a_fault_and_stops_with_the_weights_from_before_its_halt(tmp_path, stage):
    told = run_under_zero(tmp_path, stage, [6, 7, 8, 9])
    assert told["statuses"] == ["OK"] * 5 + ["BREACH", "BREACH", "HALT"]
    assert told["changed"] == [True] * 6 + [False]  # from each step to the next: all but the condemned one
    assert (told["steps"], told["skipped"], told["cause"]) == (8, 1, "temperature")


@pytest.mark.parametrize("stage", [2, 3])
def test_skipped_updates_move_neither_weights_nor_moments_and_the_run_heals(tmp_path, stage):
    """Over two micro-batches a step, clipped, the optimizer offloaded."""
    told = run_under_zero(
        tmp_path, stage, [3, 4, 5], {"offload_optimizer": {"device": "cpu"}},
        {"action": "skip_update", "consecutive": 1}, gradient_accumulation_steps=2, max_grad_norm=0.1,
    )  # fmt: skip
    assert told["statuses"] == ["OK"] * 2 + ["HALT"] * 3 + ["OK"] * 4
    assert told["changed"] == [True, False, False, False, True, True, True, True]
    assert (told["steps"], told["skipped"], told["cause"]) == (9, 3, "temperature")
