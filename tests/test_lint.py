"""Traps named from plain facts; the facts themselves are read from real engines in test_grpo.py and test_engine.py."""

import pytest

from trl_parity.lint import Facts, lint
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
        ({"min_p": 0.1}, {"replayed": False}, "truncated_sampling", "warning", "counts as drift"),
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
    ],
)  # fmt: skip
def test_each_trap_is_named_with_what_mends_it(sampling, settings, cause, severity, words):
    findings = found(sampling, **settings)
    assert findings[cause].severity == severity
    assert words in str(findings[cause])


def test_raw_logprobs_at_temperature_1_without_processing_are_no_trap():
    assert "raw_logprobs" not in found(logprobs_mode="raw_logprobs")
