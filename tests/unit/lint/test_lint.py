"""Traps named from plain facts; the facts themselves are read from real engines in test_grpo.py and test_engine.py."""

import json

import pytest
import torch
from support import ROOT

from trl_parity.cli import main
from trl_parity.lint.facts import configured_facts
from trl_parity.lint.rules import Facts, lint
from trl_parity.records import SamplingSettings


def found(sampling=None, **kwargs):
    settings = {"trainer_temperature": 1.0, "replayed": True} | kwargs
    return {f.cause: f for f in lint(Facts(sampling=SamplingSettings(**(sampling or {})), **settings))}


HEALTHY = {
    "logprobs_mode": "processed_logprobs", "engine_dtype": "bfloat16", "engine_head_dtype": "float32",
    "kv_cache_dtype": "auto", "trainer_dtype": "bfloat16", "compute_dtype": "bfloat16", "trainer_head_fp32": True,
}  # fmt: skip


def test_healthy_settings_have_no_findings_and_unknown_ones_are_not_guessed():
    assert found(**HEALTHY) == {}
    assert found() == {}


@pytest.mark.parametrize(
    ("sampling", "settings", "cause", "severity", "words"),
    [
        ({"temperature": 0.7}, {"logprobs_mode": "raw_logprobs", "trainer_temperature": 0.7}, "raw_logprobs", "error",
         'logprobs_mode="processed_logprobs"'),
        ({"top_p": 0.9}, {"logprobs_mode": "raw_logits"}, "raw_logprobs", "error", "raw_logits"),
        ({"temperature": 0.7}, {}, "temperature", "error", "temperature 0.7 but the loss divides logits by 1"),
        ({"top_p": 0.9}, {}, "truncated_sampling", "warning", "replayed on the trainer's side"),
        ({"min_p": 0.1}, {"replayed": False}, "truncated_sampling", "error", "counts as drift"),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, {"replayed": False}, "truncated_sampling", "error", "(top_p=0.9)"),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, {"replayed": False}, "penalties", "error",
         "repetition_penalty=1, presence_penalty=0, frequency_penalty=0 in the requests"),
        ({"presence_penalty": 0.5}, {}, "penalties", "warning", "presence_penalty=0.5"),
        ({"unreplayed": ("bad_words",)}, {}, "constrained_decoding", "warning", "bad_words"),
        ({}, {"dropout": 0.1}, "trainer_numerics", "error", "disable_dropout=True"),
        ({}, {"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_precision", "warning", "fp8_e5m2"),
        ({}, {"quantization": "awq"}, "kv_cache_precision", "warning", "awq"),
        ({}, {"engine_head_dtype": "bfloat16", "compute_dtype": "bfloat16"}, "head_precision", "note",
         "cast_lm_head_to_fp32"),
        ({}, {"trainer_dtype": "float32", "compute_dtype": "float32", "engine_dtype": "bfloat16"}, "dtype_gap", "note",
         "never reach it"),
        ({}, {"masks_sequences": "sequence_mask"}, "unknown", "note", "parity/ratio"),
        ({}, {"has_logprobs": False}, "unknown", "error", "vllm_generation.logprobs = 0"),
        ({}, {"engine_defaults": ("top_k=20", "top_p=0.8")}, "truncated_sampling", "warning", "top_k=20, top_p=0.8"),
        ({}, {"prefix_caching": True}, "stale_prefix_cache", "note", "reset_prefix_cache()"),
        ({}, {"trainer_dtype": "float32", "checkpoint_dtype": "bfloat16"}, "dtype_gap", "note", "TRL's default"),
        ({"unreplayed": ("min_tokens",)}, {"logprobs_mode": "raw_logprobs"}, "raw_logprobs", "error",
         "penalties and masks"),
        ({"unreplayed": ("structured_outputs",)}, {"logprobs_mode": "raw_logprobs"}, "constrained_decoding", "warning",
         "before it copies them"),
        ({"top_p": 0.95}, {"weighs_sequences": "sequence_mask", "max_completion_length": 128}, "correction_weights",
         "error", "(top_p alone: down to 0.001 at 128 tokens)"),
        ({"top_k": 20}, {"weighs_sequences": "sequence_truncate"}, "correction_weights", "error",
         'vllm_importance_sampling_mode="token_truncate"'),
        ({}, {"seed": 0}, "duplicate_rollouts", "error", "advantages and gradients are 0"),
        ({}, {"seed": 0, "group_requests": False}, "duplicate_rollouts", "warning", "the same random numbers"),
        ({}, {"ends": ("stop",), "masks_truncated": True}, "truncation_accounting", "error", "trainer.eos_token_ids"),
        ({}, {"keeps_pictures": True}, "stale_encoder_cache", "warning", "encode_pictures_anew(trainer)"),
        ({"temperature": 0.7}, {"teacher_served": True, "trainer_temperature": 0.7}, "temperature", "error",
         "prompt log-probs are of temperature 1"),
        ({}, {"thinking_token_budget": 0}, "constrained_decoding", "error", "thinking_token_budget=0"),
        ({}, {"refused": ("MixtralForCausalLM", "experts")}, "partial_sync", "error",
         'vllm_model_impl="transformers"'),
        ({}, {"model_type": "gpt2", "absolute_positions": True}, "model_definition", "warning", "position_ids"),
        ({}, {"model_type": "phimoe", "draws": ("experts", "input_jitter_noise=0.1")}, "moe_routing", "error",
         "; input_jitter_noise = 0 in the model's config"),
        ({}, {"tied_adapter": "modules_to_save"}, "partial_sync", "error", "ensure_weight_tying=True"),
        ({}, {"tied_adapter": "target_modules"}, "partial_sync", "error", "out of target_modules"),
        ({}, {"merges_adapter": True, "trainer_dtype": "bfloat16"}, "reference_drift", "warning", "with bf16=True"),
    ],
)  # fmt: skip
def test_each_trap_is_named_with_what_mends_it(sampling, settings, cause, severity, words):
    findings = found(sampling, **settings)
    assert findings[cause].severity == severity
    assert words in str(findings[cause])


def test_raw_logprobs_at_temperature_1_without_processing_are_no_trap():
    assert "raw_logprobs" not in found(logprobs_mode="raw_logprobs")


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        ({"top_p": 0.95}, {"weighs_sequences": None}),  # a token mode, or no correction
        ({}, {"weighs_sequences": "sequence_mask"}),
        ({}, {"ends": ("stop",)}),
        ({}, {"masks_truncated": True}),
        ({}, {"teacher_served": True}),
        ({"unreplayed": ("structured_outputs",)}, {"logprobs_mode": "processed_logprobs"}),
        ({}, {"merges_adapter": True, "trainer_dtype": "float32"}),
        ({}, {"model_type": "llama"}),
    ],
)
def test_half_of_a_trap_is_none(sampling, settings):
    told = found(sampling, **settings)
    assert set(told) <= {"truncated_sampling", "constrained_decoding"}  # what truncation or a constraint is by itself
    assert "copies" not in str(told.get("constrained_decoding"))


def test_the_weight_told_of_a_truncated_answer_is_the_least_it_can_have():
    from trl_parity.scoring.sampling import kept_mask

    torch.manual_seed(0)
    logits = 2 * torch.randn(128, 50)
    kept = kept_mask(logits, SamplingSettings(top_p=0.95))
    weight = (logits.softmax(-1) * kept).sum(-1).prod().item()
    assert 0.95**128 <= weight < 0.1


# ---- before anything runs: trl-parity lint -------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A bf16 model on disk whose generation_config truncates, as many instruct models' do."""
    from transformers import GenerationConfig, GPT2Config

    folder = tmp_path / "model"
    GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, dtype="bfloat16").save_pretrained(folder)
    GenerationConfig(do_sample=True, top_k=20, top_p=0.8, temperature=0.6).save_pretrained(folder)
    return str(folder)


def test_facts_from_settings_alone(checkpoint):
    values = {"model_name_or_path": checkpoint, "temperature": 0.7, "generation_kwargs": {"top_k": 5, "min_tokens": 3}}
    f = configured_facts(values)
    assert (f.sampling.temperature, f.sampling.top_k, f.trainer_temperature) == (0.7, 5, 0.7)
    assert f.sampling.unreplayed == ("min_tokens",)
    assert (f.trainer_dtype, f.compute_dtype, f.checkpoint_dtype) == ("float32", "bfloat16", "bfloat16")
    assert (f.logprobs_mode, f.engine_dtype, f.prefix_caching) == ("processed_logprobs", "bfloat16", True)
    assert (f.dropout, f.masks_sequences, f.has_logprobs) == (0.1, "sequence_mask", True)
    off = {"disable_dropout": True, "dtype": "bfloat16", "bf16": False, "vllm_importance_sampling_correction": False}
    f = configured_facts(values | off, trainer="rloo")
    assert (f.dropout, f.trainer_dtype, f.compute_dtype) == (0.0, "bfloat16", "bfloat16")
    assert (f.masks_sequences, f.has_logprobs) == (None, False)


def test_what_requests_ask_for_beside_the_law(checkpoint):
    def facts(trainer="grpo", **values):
        return configured_facts({"model_name_or_path": checkpoint} | values, trainer=trainer)

    clean = facts(generation_kwargs={"seed": -1, "thinking_token_budget": -1, "stop": [], "stop_token_ids": [50256]})
    assert (clean.seed, clean.thinking_token_budget, clean.ends) == (None, None, ())  # -1: none; 50256: its own EOS
    asked = {"seed": 0, "thinking_token_budget": 0, "stop": "</a>", "stop_token_ids": [50256, 7]}
    f = facts(generation_kwargs=asked, mask_truncated_completions=True)
    assert (f.seed, f.thinking_token_budget, f.ends) == (0, 0, ("stop", "stop_token_ids=[7]"))
    assert f.masks_truncated
    assert (f.group_requests, facts(vllm_mode="server").group_requests) == (True, False)
    assert (f.teacher_served, facts(teacher_model_server_url="http://t").teacher_served) == (False, True)
    assert (f.weighs_sequences, f.max_completion_length) == ("sequence_mask", 512)
    for values, expected in (
        ({"vllm_importance_sampling_mode": "token_mask"}, None),
        ({"vllm_importance_sampling_mode": "sequence_truncate"}, "sequence_truncate"),
        ({"vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_min": 0.5}, None),
        ({"vllm_importance_sampling_correction": False}, None),
    ):
        assert facts(**values).weighs_sequences == expected
    rloo = facts("rloo")
    assert (rloo.weighs_sequences, rloo.masks_sequences) == (None, None)  # it has no such correction
    assert (f.model_type, f.absolute_positions, f.merges_adapter, f.tied_adapter) == ("gpt2", True, False, None)
    lora = facts(use_peft=True, lora_modules_to_save=["lm_head"])
    assert (lora.merges_adapter, lora.tied_adapter) == (True, "modules_to_save")


@pytest.mark.slow_unit
def test_trl_looks_for_an_answers_end_where_the_fix_puts_it():
    import inspect

    from trl import GRPOTrainer, RLOOTrainer

    for trainer in (GRPOTrainer, RLOOTrainer):
        source = inspect.getsource(trainer._generate_and_score_completions)
        masking = source[source.index("if self.mask_truncated_completions:") :][:400]
        assert "[*self.eos_token_ids, self._tokenizer.pad_token_id]" in masking
        assert "ids[-1] not in eos_and_pad" in masking


def test_a_clean_run_has_notes_at_most(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, num_attention_heads=2, tie_word_embeddings=True).save_pretrained(tmp_path)
    values = {"model_name_or_path": str(tmp_path), "use_vllm": True, "mask_truncated_completions": True, "bf16": True}
    assert {f.severity for f in lint(configured_facts(values))} <= {"note"}
    lora = {"use_peft": True, "lora_target_modules": "all-linear"}
    assert {f.severity for f in lint(configured_facts(values | lora))} <= {"note"}


def test_facts_of_a_server_from_the_line_that_starts_it(checkpoint):
    values = {"model_name_or_path": checkpoint, "vllm_mode": "server"}
    assert configured_facts(values).logprobs_mode is None  # nothing is guessed
    f = configured_facts(values, serve=f"vllm serve {checkpoint} --max-model-len 64")
    assert (f.logprobs_mode, f.engine_dtype, f.kv_cache_dtype) == ("raw_logprobs", "bfloat16", "auto")
    assert f.engine_defaults == ("temperature=0.6", "top_k=20", "top_p=0.8")
    line = (
        "vllm serve x --logprobs-mode processed_logprobs --dtype=float32 --generation-config vllm "
        '--no-enable-prefix-caching --hf-overrides \'{"head_dtype": "float32"}\' --kv-cache-dtype fp8'
    )
    f = configured_facts(values, serve=line)
    assert (f.logprobs_mode, f.engine_dtype, f.engine_head_dtype) == ("processed_logprobs", "float32", "float32")
    assert (f.engine_defaults, f.prefix_caching, f.kv_cache_dtype) == ((), False, "fp8")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    config = tmp_path / "run.yaml"
    config.write_text("temperature: 0.7\nuse_vllm: true\n")
    assert main(["lint", str(config)]) == 0
    assert main(["lint", str(config), "--set", "generation_kwargs={temperature: 0.9}"]) == 1
    told = capsys.readouterr().out
    assert "the engine samples at temperature 0.9 but the loss divides logits by 0.7" in " ".join(told.split())
    assert main(["lint", str(config), "--serve", "vllm serve x", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert ("error", "raw_logprobs") in {(f["severity"], f["cause"]) for f in found}
    assert main(["lint", str(tmp_path / "none.yaml")]) == 2
    config.write_text("- a list\n")
    assert main(["lint", str(config)]) == 2
    assert "Expected a mapping" in capsys.readouterr().err


def test_the_shipped_configs_have_no_error():
    for config in ("grpo_gpu.yaml", "grpo_tiny_cpu.yaml"):
        assert main(["lint", str(ROOT / "configs" / config)]) == 0


def test_lint_knows_what_engine_args_ask_for():
    values = {"model_name_or_path": "no-such-model", "cast_lm_head_to_fp32": True}
    f = configured_facts(values | {"engine_args": {"preset": "rl", "kv_cache_dtype": "fp8"}})
    assert (f.engine_dtype, f.engine_head_dtype, f.prefix_caching) == ("bfloat16", "float32", False)
    assert next((trap.severity, trap.cause) for trap in lint(f)) == ("warning", "kv_cache_precision")
    f = configured_facts(values)
    assert (f.engine_head_dtype, f.prefix_caching, f.logprobs_mode) == (None, True, "processed_logprobs")


@pytest.mark.slow_unit
@pytest.mark.parametrize("name", ["temperture", "rules.kl_k3.k", "every_n_step"])
def test_a_typo_in_set_is_refused_and_a_setting_of_each_kind_is_not(tmp_path, capsys, name):
    config = tmp_path / "config.yaml"
    config.write_text("task_length: 5\n")
    assert main(["lint", str(config), "--set", f"{name}=1"]) == 2
    told = capsys.readouterr().err
    assert f"unknown setting '{name}'" in told
    assert told.count("\n") == 1
    known = ["temperature=1.0", "every_n_steps=2", "dtype=bfloat16", "task_length=6"]
    assert main(["lint", str(config), *(word for one in known for word in ("--set", one))]) == 0
