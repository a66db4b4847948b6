"""Engine arguments that vLLM once took: since when they are gone, what stands in their place, and where vLLM says so.

Asked only for a name that the installed vLLM does not take, so an entry can't refuse what works.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RETIRED", "Retired"]


@dataclass(frozen=True, slots=True)
class Retired:
    """``since``: the first version without it, or where it does nothing. ``change``: vLLM's issue or pull request."""

    since: str
    instead: str
    change: int

    def __str__(self) -> str:
        where = f"https://github.com/vllm-project/vllm/issues/{self.change}"
        return f"gone since vLLM {self.since}. {self.instead} ({where})"


_SPECULATIVE = Retired("0.8.3", "Now a key of speculative_config: {method: ..., num_speculative_tokens: ...}.", 15466)

_MULTI_STEP = Retired("0.10.1", "Multi-step scheduling was V0's; now async_scheduling overlaps the steps.", 22779)

_GUIDED = Retired("0.11.0", "Now structured_outputs_config: {backend: ...}.", 22772)

_ROPE = Retired("0.12.0", "Now hf_overrides: {rope_parameters: {rope_type: ..., rope_theta: ...}}.", 28006)

_PARTIAL = Retired("0.27.0", "Only V0's scheduler had it; long_prefill_token_threshold bounds long prompts.", 49244)

_PROMPT_ADAPTER = Retired("0.10.0", "Prompt adapters are gone; LoRA adapters are enable_lora.", 20588)

_BEAM = Retired("0.6.3", "A request's, never the engine's: LLM.beam_search(..., BeamSearchParams(...)).", 6226)

RETIRED: dict[str, Retired] = {
    "use_v2_block_manager": Retired(
        "0.6.4", "The second block manager is the only one: leave it out, nothing else changes.", 8704
    ),
    "swap_space": Retired(
        "0.18.0",
        "V1 never swaps: it preempts by recomputing. Leave it out; kv_offloading_size keeps KV blocks in CPU memory.",
        36216,
    ),
    "preemption_mode": Retired("0.11.0", "V1 always preempts by recomputing: leave it out.", 25334),
    "scheduler_delay_factor": Retired("0.11.0", "V1's scheduler does not wait: leave it out.", 25334),
    "disable_async_output_proc": Retired(
        "0.11.0", "Output processing is not V0's any more; what is left to choose is async_scheduling.", 25334
    ),
    "num_scheduler_steps": _MULTI_STEP,
    "multi_step_stream_outputs": Retired("0.10.1", "stream_interval says how often tokens are sent.", 22779),
    "num_lookahead_slots": Retired("0.12.0", "speculative_config.num_speculative_tokens decides.", 29000),
    "max_seq_len_to_capture": Retired(
        "0.11.0",
        "Graphs are captured by batch size, not by length: max_cudagraph_capture_size, or cudagraph_capture_sizes.",
        25543,
    ),
    "cuda_graph_sizes": Retired("0.11.1", "Renamed cudagraph_capture_sizes.", 26016),
    "guided_decoding_backend": _GUIDED,
    "guided_decoding": _GUIDED,
    "guided_decoding_disable_fallback": _GUIDED,
    "guided_decoding_disable_any_whitespace": _GUIDED,
    "guided_decoding_disable_additional_properties": _GUIDED,
    "speculative_model": _SPECULATIVE,
    "num_speculative_tokens": _SPECULATIVE,
    "speculative_max_model_len": _SPECULATIVE,
    "speculative_draft_tensor_parallel_size": _SPECULATIVE,
    "ngram_prompt_lookup_max": _SPECULATIVE,
    "ngram_prompt_lookup_min": _SPECULATIVE,
    "spec_decoding_acceptance_method": _SPECULATIVE,
    "disable_logprobs_during_spec_decoding": _SPECULATIVE,
    "rope_scaling": _ROPE,
    "rope_theta": _ROPE,
    "worker_use_ray": Retired("0.7.0", "Now distributed_executor_backend: ray.", 5944),
    "engine_use_ray": Retired("0.7.0", "Now distributed_executor_backend: ray.", 5944),
    "task": Retired("0.13.0", "Now runner: generate | pooling, and convert.", 21470),
    "device": Retired("0.10.0", "It had no effect: the installed vLLM is built for one platform.", 21349),
    "use_beam_search": _BEAM,
    "best_of": Retired(
        "0.12.0", "A request's, never the engine's: sample n completions and choose by their log-probs.", 29090
    ),
    "disable_log_requests": Retired(
        "0.12.0", "Requests are not logged unless `vllm serve` is given --enable-log-requests.", 29402
    ),
    "calculate_kv_scales": Retired(
        "0.28.0", "Scales come from the checkpoint, else they are 1.0: calibrate it, or no fp8 KV cache.", 49389
    ),
    "max_num_partial_prefills": _PARTIAL,
    "max_long_partial_prefills": _PARTIAL,
    "enable_prompt_adapter": _PROMPT_ADAPTER,
    "max_prompt_adapters": _PROMPT_ADAPTER,
    "max_prompt_adapter_token": _PROMPT_ADAPTER,
    "VLLM_USE_V1": Retired("0.12.0", "An environment variable; V1 is the only engine.", 28204),
}
