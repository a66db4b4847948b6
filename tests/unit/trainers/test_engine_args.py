"""The way of engine arguments into TRL."""

import pytest

from trl_parity import ParityCallback, ParityConfig
from trl_parity.engine.config import (
    rl_engine_args,
)
from trl_parity.errors import ConfigError, InterceptionError
from trl_parity.trainers.engine_args import TRLEngineArguments, laid_under

pytestmark = pytest.mark.slow_unit

# ---- the way into TRL ----------------------------------------------------------------------------------------------

TRL_PASSES = {
    "model": "m", "tensor_parallel_size": 1, "gpu_memory_utilization": 0.3, "max_model_len": 64, "max_num_seqs": None,
    "enable_sleep_mode": False, "distributed_executor_backend": "external_launcher", "seed": 3,
    "max_num_batched_tokens": 4096, "logprobs_mode": "processed_logprobs", "quantization": None,
}  # fmt: skip


def test_trls_arguments_lie_under_ours_and_what_is_replaced_is_said():
    merged, changed = laid_under({"dtype": "float16", "max_model_len": 128, "seed": 10}, TRL_PASSES)
    assert merged == TRL_PASSES | {"dtype": "float16", "max_model_len": 128, "seed": 13}  # ranks still differ
    assert changed == ["max_model_len=128 replaces TRL's 64 (vllm_max_model_length)"]
    assert laid_under(rl_engine_args("rl"), TRL_PASSES)[1] == []
    merged, changed = laid_under({"kv_cache_memory_bytes": 1 << 30}, TRL_PASSES)
    assert "gpu_memory_utilization" not in merged
    assert changed == ["kv_cache_memory_bytes replaces TRL's gpu_memory_utilization=0.3"]


def test_what_trls_own_code_relies_on_is_refused():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2.*vllm_tensor_parallel_size.*enable_sleep_mode"):
        laid_under({"tensor_parallel_size": 2, "enable_sleep_mode": True}, TRL_PASSES)


def test_wrong_arguments_are_refused_before_any_trainer_is_there():
    with pytest.raises(ConfigError, match="swap_space: gone since vLLM"):
        ParityCallback(engine_args={"preset": "rl", "swap_space": 4})
    with pytest.raises(ConfigError, match="cannot read no-such-file"):
        ParityCallback(engine_args="no-such-file")
    with pytest.raises(ConfigError, match="engine_args is a int"):
        ParityConfig(engine_args=3)
    with pytest.raises(ConfigError, match="Write a dtype as text"):
        ParityConfig(engine_args={"dtype": object()})
    config = ParityConfig(engine_args='{"preset": "rl", "max_model_len": 64}')  # of a command line
    assert config.engine_source() == {"preset": "rl", "max_model_len": 64}


def test_a_trl_that_builds_its_engine_otherwise_is_told(monkeypatch):
    from trl.generation import vllm_generation

    monkeypatch.delattr(vllm_generation, "LLM")
    with pytest.raises(InterceptionError, match="engine_args can't reach it"), TRLEngineArguments("rl"):
        pass
