"""Engine arguments that do not go together, though each is fine alone. Pure: needs no vLLM.

What vLLM itself would refuse, but only once the model is loaded, and what it takes and then ignores without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["conflicts"]

# speculative methods that vLLM's asynchronous scheduler knows (VllmConfig.__post_init__)
_ASYNC_SPECULATION = ("eagle", "mtp", "draft_model", "ngram_gpu", "dspark", "dflash")


def conflicts(args: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Arguments that contradict each other, by name, with what is wrong and what to do."""
    get = args.get
    tokens, length, seqs = get("max_num_batched_tokens"), get("max_model_len"), get("max_num_seqs")
    if get("enable_chunked_prefill") is False and tokens is not None and length is not None and tokens < length:
        yield (
            ("max_num_batched_tokens", "max_model_len", "enable_chunked_prefill"),
            f"without chunked prefill a prompt has to fit one step: {tokens} tokens a step, sequences of up to "
            f"{length}. Set max_num_batched_tokens >= {length}, or enable_chunked_prefill: true.",
        )
    if tokens is not None and seqs is not None and tokens < seqs:
        yield (
            ("max_num_batched_tokens", "max_num_seqs"),
            f"{seqs} sequences take a token each in a step of {tokens}. Set max_num_batched_tokens >= max_num_seqs.",
        )
    if (active := get("max_num_active_seqs")) is not None and seqs is not None and active > seqs:
        yield (
            ("max_num_active_seqs", "max_num_seqs"),
            f"{active} sequences admitted, room for {seqs}. Lower the first.",
        )
    if (long := get("long_prefill_token_threshold")) and length is not None and long > length:
        yield (
            ("long_prefill_token_threshold", "max_model_len"),
            f"no sequence of up to {length} tokens is longer than {long}. Lower the threshold.",
        )
    if get("kv_cache_memory_bytes") is not None and "gpu_memory_utilization" in args:
        yield (
            ("kv_cache_memory_bytes", "gpu_memory_utilization"),
            "the first sets the KV cache's size and vLLM then ignores the second. Keep one.",
        )
    if get("enforce_eager") and (given := _given(args, "cudagraph_capture_sizes", "max_cudagraph_capture_size")):
        yield (
            ("enforce_eager", *given),
            "eager mode captures no graphs, so the sizes have no effect. Drop them, or enforce_eager.",
        )
    if not get("enable_lora") and (given := _given(args, "max_loras", "max_lora_rank", "max_cpu_loras", "lora_dtype")):
        yield ("enable_lora", *given), "LoRA is off, so these have no effect. Set enable_lora: true, or drop them."
    if get("data_parallel_size", 1) > 1 and get("distributed_executor_backend") != "external_launcher":
        yield (
            ("data_parallel_size",),
            "vllm.LLM refuses several replicas in one process. Start one engine a rank (TRL's colocated engines are), "
            "or a server: trl-parity engine --serve --set data_parallel_size=N takes it there.",
        )
    yield from _with_speculation(args)
    yield from _with_logprobs(args)


def _given(args: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if args.get(name) is not None)


def _with_speculation(args: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    speculation = args.get("speculative_config") or {}
    method = str(args.get("spec_method") or speculation.get("method") or "")
    if not method and not speculation and not _given(args, "spec_model", "spec_tokens"):
        return
    if args.get("async_scheduling") and method and not method.startswith(_ASYNC_SPECULATION):
        yield (
            ("async_scheduling", "speculative_config"),
            f"asynchronous scheduling does not know speculative decoding by {method}. Set async_scheduling: false, or "
            "another method (eagle, mtp, draft_model, ngram_gpu).",
        )
    if args.get("return_sampling_mask"):
        yield (
            ("return_sampling_mask", "speculative_config"),
            "vLLM returns no sampling mask of speculated tokens. Drop one of the two.",
        )


def _with_logprobs(args: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    if args.get("return_sampling_mask") and args.get("logprobs_mode") != "processed_logprobs":
        yield (
            ("return_sampling_mask", "logprobs_mode"),
            "the mask goes with log-probs over the same tokens. Set logprobs_mode: processed_logprobs.",
        )
    overrides = args.get("hf_overrides")
    head = overrides.get("head_dtype") if isinstance(overrides, Mapping) else None
    if head is not None and args.get("quantization") is not None and head != "model":
        yield (
            ("hf_overrides.head_dtype", "quantization"),
            f"vLLM computes a head in {head} only from plain weights. Drop quantization, or leave lm_head out of it.",
        )
    if isinstance(overrides, Mapping):
        for key in overrides:
            if key != "head_dtype" and key.replace("-", "_").replace("lm_", "").lower() in _HEAD_DTYPE_SLIPS:
                yield (
                    (f"hf_overrides.{key}",),
                    "no vLLM setting; an unknown override is written into the model's config and changes nothing. "
                    "Did you mean 'head_dtype'?",
                )


_HEAD_DTYPE_SLIPS = ("head_type", "headdtype", "head_dtyp", "head_torch_dtype", "head_dtypes", "head_fp32")
