"""Engine arguments: checked against the vLLM that is installed, and on a real engine that TRL builds with them."""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from support import ROOT

from trl_parity import ParityConfig
from trl_parity.cli import main
from trl_parity.engine.argument_schema import arguments, environment
from trl_parity.engine.config import (
    PRESETS,
    load_engine_args,
    problems,
    read_engine_config,
    rl_engine_args,
    serve_line,
)
from trl_parity.engine.conflicts import conflicts
from trl_parity.engine.removed_arguments import RETIRED
from trl_parity.errors import ConfigError
from trl_parity.lint.facts import rl_traps

pytestmark = pytest.mark.slow_unit

# ---- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_file_and_each_argument_has_a_reason_and_a_cost(preset):
    file = ROOT / "configs" / PRESETS[preset]
    assert rl_engine_args(preset) == load_engine_args(file)
    config = read_engine_config(preset)
    assert config == read_engine_config(file).__class__(preset, config.engine, config.trainer, config.reasons)
    for name in config.engine:
        assert "Cost:" in config.reasons[name], name
        assert len(config.reasons[name].split("Cost:")[0]) > 10, name


def test_the_rl_preset_settles_all_that_v1_changed_at_once():
    args, trainer = rl_engine_args("rl"), read_engine_config("rl").trainer
    assert args["logprobs_mode"] == "processed_logprobs"
    assert args["hf_overrides"] == {"head_dtype": "float32"}
    assert trainer == {"bf16": True, "cast_lm_head_to_fp32": True}  # the same head and dtype on the other side
    pinned = {"dtype", "kv_cache_dtype", "seed", "enable_prefix_caching", "async_scheduling", "generation_config"}
    assert pinned <= args.keys()
    assert args["generation_config"] == "vllm"
    assert rl_traps(args, trainer) == []
    raw = {trap.cause for trap in rl_traps(rl_engine_args("throughput"), None)}
    assert {"raw_logprobs", "truncated_sampling", "stale_prefix_cache"} <= raw
    one_sided = rl_traps(args, {})
    assert [(trap.severity, trap.cause) for trap in one_sided] == [("note", "head_precision")]
    assert "cast_lm_head_to_fp32" in one_sided[0].fix


def test_overrides_are_laid_over_key_by_key_and_none_leaves_it_to_vllm():
    args = rl_engine_args("rl", max_model_len=64, dtype=None, hf_overrides={"max_position_embeddings": 64})
    assert (args["max_model_len"], "dtype" in args) == (64, False)
    assert args["hf_overrides"] == {"head_dtype": "float32", "max_position_embeddings": 64}
    assert rl_engine_args("rl")["hf_overrides"] == {"head_dtype": "float32"}  # and the preset is as it was


def test_a_file_may_start_from_a_preset(tmp_path):
    (file := tmp_path / "mine.yaml").write_text("preset: rl\ndtype: float16\ntrainer: {fp16: true, bf16: false}\n")
    config = read_engine_config(file)
    assert config.engine == rl_engine_args("rl") | {"dtype": "float16"}
    assert config.trainer == {"bf16": False, "fp16": True, "cast_lm_head_to_fp32": True}
    with pytest.raises(ConfigError, match="did you mean 'long_context'"):
        read_engine_config({"preset": "long-context"})


@pytest.mark.parametrize(
    ("content", "words"),
    [("- a\n", "holds a list"), ("a: [", "not valid YAML"), ("trainer: 3\n", "trainer is 3"), (None, "cannot read")],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, words):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_engine_args(file)
    with pytest.raises(ConfigError, match=r"did you mean 'throughput'.*rl, throughput"):
        rl_engine_args("troughput")


def test_an_installed_wheel_has_the_presets(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("trl_parity", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        for name in PRESETS.values():
            assert files.read(f"trl_parity/engine/presets/{name}").decode() == (ROOT / "configs" / name).read_text()


# ---- against the installed vLLM ------------------------------------------------------------------------------------


def said(**args):
    return {problem.names[0]: problem.text for problem in problems(args)}


def test_all_problems_are_told_at_once(tmp_path):
    (file := tmp_path / "old.yaml").write_text(
        "use_v2_block_manager: true\nswap_space: 4\nmaxmodel_len: 64\ndtype: bf16\ngpu_memory_utilization: 1.5\n"
        "max_num_seqs: 64\nmax_num_batched_tokens: 32\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_engine_args(file)
    text = str(refused.value)
    assert text.count("\n  - ") == 6
    for words in (
        "use_v2_block_manager: gone since vLLM 0.6.4",
        "swap_space: gone since vLLM 0.18.0. V1 never swaps",
        "https://github.com/vllm-project/vllm/issues/36216",
        "maxmodel_len: no engine argument of this vLLM (did you mean 'max_model_len'?)",
        "dtype: is 'bf16'. Expected 'auto', 'half', 'float16', 'bfloat16', 'float' or 'float32'",
        "gpu_memory_utilization: is 1.5. Expected less than or equal to 1",
        "max_num_batched_tokens, max_num_seqs: 64 sequences",
    ):
        assert words in text
    assert str(file) in text


@pytest.mark.parametrize("name", RETIRED)
def test_what_vllm_once_took_is_refused_with_what_replaced_it_and_since_when(name):
    assert name not in arguments()  # else this entry is wrong for the vLLM these tests run with
    assert name not in environment()
    text = said(**{name: 1})[name]
    assert text.startswith(f"gone since vLLM {RETIRED[name].since}. {RETIRED[name].instead}")
    assert RETIRED[name].since.count(".") == 2


def test_what_is_not_the_engines_is_sent_where_it_belongs():
    text = said(temperature=0.7, port=8000, VLLM_BATCH_INVARIANT=1, vllm_max_model_length=64, **{"max-model-len": 64})
    assert "setting of each request" in text["temperature"]
    assert "`vllm serve`" in text["port"]
    assert "environment variable" in text["VLLM_BATCH_INVARIANT"]
    assert "did you mean 'max_model_len'" in text["vllm_max_model_length"]
    assert "did you mean 'max_model_len'" in text["max-model-len"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_num_seqs": "64"}, "valid integer"),
        ({"seed": True}, "valid integer"),
        ({"enable_prefix_caching": "yes"}, "valid boolean"),
        ({"max_model_len": "4k"}, "valid integer"),
        ({"max_logprobs": -2}, "greater than or equal to -1"),
        ({"gpu_memory_utilization": 0}, "greater than 0"),
        ({"kv_cache_dtype": "fp9"}, "'fp8_e5m2'"),
        ({"logprobs_mode": "processed"}, "'processed_logprobs'"),
        ({"attention_backend": "FLASH_ATTENTION"}, "TRITON_ATTN"),
        ({"compilation_config": {"levl": 3}}, "no 'levl' in it"),
        ({"weight_transfer_config": {"backnd": "nccl"}}, "no 'backnd' in it"),
        ({"block_size": 0}, "greater than 0"),
        ({"hf_overrides": 3}, "object|dictionary"),
        ({"quantization": 8}, "valid string"),
    ],
)
def test_wrong_types_and_ranges_are_refused(args, words):
    [(name, text)] = said(**args).items()
    assert [name] == list(args)
    assert text.startswith(f"is {args[name]!r}. Expected ")
    assert any(word in text for word in words.split("|")), text


def test_right_ones_are_taken_as_vllm_takes_them():
    from vllm.config import CompilationConfig

    fine = {
        "attention_backend": "flash_attn", "compilation_config": {"mode": 3, "cudagraph_mode": "NONE"},
        "limit_mm_per_prompt": {"image": 1}, "cpu_offload_params": ["q_proj"], "max_model_len": -1,
        "gpu_memory_utilization": 1, "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
        "quantization": "fp8", "cpu_offload_gb": 4, "enable_chunked_prefill": None, "chat_template": "x",
        "weight_transfer_config": {"backend": "nccl"}, "performance_mode": "throughput",
    }  # fmt: skip
    assert said(**fine) == {}
    assert said(compilation_config=3) == {}
    assert said(compilation_config=CompilationConfig(), hf_overrides=lambda config: config) == {}


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512, "max_model_len": 1024},
         ("max_num_batched_tokens", "max_model_len", "enable_chunked_prefill")),
        ({"max_num_batched_tokens": 64, "max_num_seqs": 128}, ("max_num_batched_tokens", "max_num_seqs")),
        ({"max_num_active_seqs": 9, "max_num_seqs": 8}, ("max_num_active_seqs", "max_num_seqs")),
        ({"long_prefill_token_threshold": 99, "max_model_len": 64}, ("long_prefill_token_threshold", "max_model_len")),
        ({"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.5},
         ("kv_cache_memory_bytes", "gpu_memory_utilization")),
        ({"enforce_eager": True, "cudagraph_capture_sizes": [1, 2]}, ("enforce_eager", "cudagraph_capture_sizes")),
        ({"max_lora_rank": 32}, ("enable_lora", "max_lora_rank")),
        ({"data_parallel_size": 2}, ("data_parallel_size",)),
        ({"async_scheduling": True, "speculative_config": {"method": "ngram"}},
         ("async_scheduling", "speculative_config")),
        ({"return_sampling_mask": True}, ("return_sampling_mask", "logprobs_mode")),
        ({"quantization": "fp8", "hf_overrides": {"head_dtype": "float32"}},
         ("hf_overrides.head_dtype", "quantization")),
        ({"hf_overrides": {"head_type": "float32"}}, ("hf_overrides.head_type",)),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together_are_explained(args, names):
    assert [found for found, _ in conflicts(args)] == [names]
    assert [problem.names for problem in problems(args)] == [names]
    for name in args:  # one of them gone or off, and there is none
        if name in ("hf_overrides", "max_lora_rank", "data_parallel_size", "return_sampling_mask"):
            continue
        assert list(conflicts({k: v for k, v in args.items() if k != name})) == []


@pytest.mark.parametrize(
    "args",
    [
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 512, "max_model_len": 1024, "max_num_seqs": 8},
        {"max_num_batched_tokens": 64, "max_num_seqs": 128, "max_model_len": 64},
        {"max_num_active_seqs": 9, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64},
        {"long_prefill_token_threshold": 99, "max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 8},
    ],
)
def test_what_is_called_a_conflict_vllm_itself_refuses_when_it_gets_that_far(args):
    from vllm.config import SchedulerConfig

    assert len(list(conflicts(args))) == 1
    with pytest.raises(ValueError, match=r"max_num|max_model_len"):
        SchedulerConfig.default_factory(**args)


def test_without_vllm_it_is_said_that_the_check_needs_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "vllm" else find(name, *args))
    with pytest.raises(ConfigError, match=r"none is installed.*trl-parity\[vllm\]"):
        rl_engine_args("rl")
    assert main(["engine", "rl"]) == 2
    told = capsys.readouterr().out
    assert "not checked" in told
    assert "vllm serve MODEL --logprobs-mode processed_logprobs" in told  # what needs none is there


@pytest.mark.parametrize("preset", PRESETS)
def test_vllms_own_parser_takes_the_serve_line(preset):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = rl_engine_args(preset, weight_transfer_config={"backend": "nccl"}, cudagraph_capture_sizes=[1, 2])
    line = serve_line(args, "a model's folder")
    words = shlex.split(line)
    assert words[:3] == ["vllm", "serve", "a model's folder"]
    parsed = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:]))
    assert parsed["model_tag"] == "a model's folder"
    assert parsed.pop("weight_transfer_config").backend == args.pop("weight_transfer_config")["backend"]
    assert {name: parsed[name] for name in args} == args
    assert parsed["host"] == "127.0.0.1"


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["engine"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in (
        "logprobs_mode",
        "the loss takes them for that",
        "trainer: cast_lm_head_to_fp32",
        "takes all of them",
    ):
        assert words in told
    assert main(["engine", "throughput"]) == 0  # not meant for RL: told, not refused
    assert "in RL, error" in capsys.readouterr().out
    (file := tmp_path / "mine.yaml").write_text("preset: rl\nlogprobs_mode: raw_logprobs\n")
    assert main(["engine", str(file)]) == 1  # meant for it
    capsys.readouterr()
    assert main(["engine", "rl", "--set", "swap_space=4", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["problems"][0]["arguments"] == ["swap_space"]
    assert told["arguments"]["dtype"] == "bfloat16"
    assert main(["engine", "rl", "--set", "max_model_len=64", "--serve", "--model", str(tmp_path / "none")]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"vllm serve {tmp_path / 'none'} --logprobs-mode processed_logprobs")
    assert "refuses this model" in captured.err
    assert main(["engine", "rl", "--set", "data_parallel_size=2"]) == 1  # vllm.LLM refuses it, a server does not
    assert main(["engine", "rl", "--set", "data_parallel_size=2", "--serve"]) == 0
    assert main(["engine", str(tmp_path / "nothing.yaml")]) == 2
    assert main(["engine", "--set", "x"]) == 2


def test_yaml_of_the_recipes_names_arguments_that_exist():
    for name in ("grpo_gpu.yaml", "grpo_tiny_cpu.yaml"):
        values = yaml.safe_load((ROOT / "configs" / name).read_text())
        source = ParityConfig(engine_args=values["engine_args"]).engine_source()
        config = read_engine_config(source)
        assert list(problems(config.engine)) == []
        for setting, value in config.trainer.items():
            assert values[setting] == value, (name, setting)
