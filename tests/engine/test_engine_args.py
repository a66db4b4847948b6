"""Engine arguments on a real engine that TRL builds with them."""

import json
import logging

import pytest
from support.models import save_tiny_model
from support.trainers import digit_reward, grpo_args

from trl_parity import ParityCallback
from trl_parity.errors import ConfigError
from trl_parity.trainers.engine_args import TRLEngineArguments

# ---- a real engine -------------------------------------------------------------------------------------------------

PROMPT = "the same words for everyone, longer than a block, and then a sum, which is "


ASKED = {
    "preset": "rl", "dtype": "float32", "hf_overrides": {"head_dtype": "bfloat16"}, "enable_prefix_caching": True,
    "block_size": 32, "max_num_seqs": 8, "seed": 7, "disable_log_stats": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_trainer(model_dir, output_dir, callback, **args):
    from datasets import Dataset
    from trl import GRPOTrainer

    data = Dataset.from_list([{"prompt": f"{PROMPT}{i % 10}+{i // 10}="} for i in range(64)])
    return GRPOTrainer(
        model=str(model_dir), args=grpo_args(output_dir, **({"max_steps": 2} | args)), reward_funcs=digit_reward,
        train_dataset=data, callbacks=[callback],
    )  # fmt: skip


def windows(output_dir):
    return [json.loads(line) for line in (output_dir / "parity" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cached_run(model_dir, tmp_path_factory):
    """A run whose engine was built as asked, prefix caching on. vLLM's own statistics are on, to compare with."""
    output = tmp_path_factory.mktemp("run")
    callback = ParityCallback(engine_args=ASKED, floor_tokens=0, diagnose="never", action="log")
    told, ours = [], logging.getLogger("trl_parity")
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())
    ours.addHandler(listener)
    try:
        trainer = make_trainer(model_dir, output, callback)
        trainer.train()
    finally:
        ours.removeHandler(listener)
    return trainer, output, told


@pytest.mark.engine
def test_what_was_asked_is_what_the_engine_of_the_trainer_runs_with(cached_run):
    import torch
    import vllm
    from trl.generation import vllm_generation

    trainer, _, told = cached_run
    config = trainer.vllm_generation.llm.llm_engine.vllm_config
    assert (config.model_config.dtype, config.model_config.head_dtype) == (torch.float32, torch.bfloat16)
    assert (config.cache_config.enable_prefix_caching, config.cache_config.block_size) == (True, 32)
    assert (config.scheduler_config.async_scheduling, config.scheduler_config.max_num_seqs) == (False, 8)
    assert (config.model_config.seed, config.model_config.generation_config) == (7, "vllm")
    assert config.model_config.max_model_len == 256  # TRL's, where nothing was asked
    assert vllm_generation.LLM is vllm.LLM  # undone
    assert any("cast_lm_head_to_fp32 is False" in text for text in told)  # what belongs to it on TRL's side
    assert any("max_num_seqs=8 replaces TRL's 16" in text for text in told)


@pytest.mark.engine
def test_prefix_cache_hits_and_kv_usage_are_vllms_own_counts_by_window(cached_run):
    trainer, output, _ = cached_run
    rows, llm = windows(output), trainer.vllm_generation.llm
    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    hits, queries = counted["vllm:prefix_cache_hits"], counted["vllm:prefix_cache_queries"]
    rates = [row["engine/prefix_cache_hit_rate"] for row in rows]
    assert sum(rates) / len(rates) == pytest.approx(hits / queries)  # windows of as many prompt tokens each
    assert all(0.3 < rate < 1 for rate in rates)  # 64 of 79 tokens are shared, but for the first sequences
    # by counting blocks: at most 8 sequences of 79 to 103 tokens, of which two blocks are shared
    cache = llm.llm_engine.vllm_config.cache_config
    for row in rows:
        assert 3 <= row["engine/kv_cache_usage"] * (cache.num_gpu_blocks - 1) <= 8 * 4
    logged = [row for row in trainer.state.log_history if "parity/engine/kv_cache_usage" in row]
    assert len(logged) == len(rows)


@pytest.mark.engine
def test_an_engine_that_runs_otherwise_is_refused_at_the_first_step(cached_run, model_dir, tmp_path):
    from trl.generation import vllm_generation

    trainer, real = cached_run[0], vllm_generation.LLM
    vllm_generation.LLM = lambda **kwargs: trainer.vllm_generation.llm  # something that builds its own
    try:
        callback = ParityCallback(engine_args={"preset": "rl", "max_num_seqs": 16})
        other = make_trainer(model_dir, tmp_path, callback)
        before = [p.detach().clone() for p in other.model.parameters()]
        with pytest.raises(ConfigError) as refused:
            other.train()
        late = ParityCallback(engine_args="rl")
        added = make_trainer(model_dir, tmp_path, ParityCallback())
        added.callback_handler.callbacks = [c for c in added.callback_handler.callbacks if type(c) is not type(late)]
        added.add_callback(late)
        with pytest.raises(ConfigError, match="built without engine_args"):
            added.train()
    finally:
        vllm_generation.LLM = real
    for words in (
        "dtype: asked 'bfloat16', runs with 'float32'", "enable_prefix_caching: asked False, runs with True",
        "hf_overrides.head_dtype: asked 'float32', runs with 'bfloat16'", "max_num_seqs: asked 16, runs with 8",
    ):  # fmt: skip
        assert words in str(refused.value)
    assert all((p == b).all() for p, b in zip(other.model.parameters(), before, strict=True))


@pytest.mark.engine
def test_what_trl_decides_is_refused_before_the_engine_is_built_and_nothing_is_left_behind(model_dir, tmp_path):
    import vllm
    from trl.generation import vllm_generation

    with pytest.raises(ConfigError, match="vllm_tensor_parallel_size"):
        make_trainer(model_dir, tmp_path, ParityCallback(engine_args={"preset": "rl", "tensor_parallel_size": 2}))
    assert vllm_generation.LLM is vllm.LLM


@pytest.mark.engine
def test_without_a_callback_and_with_the_prefix_cache_off_there_is_no_rate(cached_run, model_dir, tmp_path):
    callback = ParityCallback(floor_tokens=0, diagnose="never", action="log")
    with TRLEngineArguments({"preset": "rl", "block_size": 32}) as asked:
        trainer = make_trainer(model_dir, tmp_path, callback, max_steps=1, cast_lm_head_to_fp32=True)
    config = trainer.vllm_generation.llm.llm_engine.vllm_config
    assert asked.built["enable_prefix_caching"] is False
    assert config.cache_config.enable_prefix_caching is False
    assert str(config.model_config.head_dtype) == "torch.float32"
    trainer.train()
    [row] = windows(tmp_path)
    assert row["engine/prefix_cache_hit_rate"] is None
    assert row["engine/kv_cache_usage"] > 0
