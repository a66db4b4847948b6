"""Whole GRPO runs on two gloo ranks: the trainer's weights in shards (FSDP2), the engine's (tensor parallel)."""

import pytest
from support.sharded_runs import run

pytestmark = pytest.mark.engine

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_under_fsdp2_a_run_is_clean_until_a_fault_and_learns_nothing_from_what_is_condemned(tmp_path, lora):
    told = run(tmp_path, [4, 5], FSDP2, lora=lora, parity={"action": "skip_update", "consecutive": 1}, trainer={})
    assert told["sharded_by"] == "DistributedType.FSDP"
    assert told["statuses"] == ["OK"] * 3 + ["HALT"] * 2 + ["OK"] * 4
    assert told["changed"] == [True, True, False, False, True, True, True, True]
    assert (told["steps"], told["skipped"], told["cause"]) == (9, 2, "temperature")


def test_with_one_engine_over_two_ranks_a_run_is_clean_until_a_fault_and_named(tmp_path):
    told = run(tmp_path, [4, 5, 6, 7, 8, 9], {}, parity={}, trainer={"vllm_tensor_parallel_size": 2})
    assert told["statuses"] == ["OK"] * 3 + ["BREACH"] * 2 + ["HALT"]
    assert (told["steps"], told["cause"]) == (6, "temperature")
