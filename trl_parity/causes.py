"""The causes of a drift by identifier: what each is, what it does to training, and the setting that mends it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAUSES", "Cause"]


@dataclass(frozen=True, slots=True)
class Cause:
    """What people are told of a cause."""

    what: str
    harm: str
    fix: str


CAUSES: dict[str, Cause] = {
    "raw_logprobs": Cause(
        "The engine reports log-probs from before temperature, truncation and penalties.",
        "Ratios compare two different laws: the importance weights are wrong at every token the policy is unsure of.",
        'logprobs_mode="processed_logprobs" on the engine (vllm serve ... --logprobs-mode processed_logprobs).',
    ),
    "temperature": Cause(
        "The engine samples at another temperature (or logit scale, or soft cap) than the loss reckons with.",
        "The trainer learns from a flatter or sharper policy than its own; ratios drift where the policy is unsure.",
        "one temperature: GRPOConfig(temperature=...), and nothing in generation_kwargs or on the engine's side; one "
        "logit scale and soft cap (final_logit_softcapping) in both models.",
    ),
    "truncated_sampling": Cause(
        "The engine samples from a truncated vocabulary and renormalizes; the loss uses the whole of it.",
        "Every sampled token looks less likely to the trainer than it was: ratios are below 1 on average.",
        "top_p=1.0, top_k=0, min_p=None in GRPOConfig and none on the engine's side; "
        'ParityConfig(truncation="replay") only where the loss renormalizes over the kept tokens as well.',
    ),
    "penalties": Cause(
        "The engine penalizes repeated tokens; the loss does not.",
        "Repeated tokens look more likely to the trainer than they were, new ones less, more so later in a sequence.",
        "repetition_penalty=1.0 in GRPOConfig, presence_penalty=0 and frequency_penalty=0 in generation_kwargs; on a "
        "server --generation-config vllm, so that the model's own defaults are not used.",
    ),
    "constrained_decoding": Cause(
        "The engine forbids, forces or favours some tokens; the loss does not know.",
        "The probability of what was ruled out is missing from the ratios, at the constrained positions.",
        "take logit_bias, bad_words, allowed_token_ids, min_tokens or structured outputs out of generation_kwargs, or "
        "mask the tokens they force from the loss.",
    ),
    "token_misalignment": Cause(
        "Log-probs and tokens do not belong together: other ids, another context, or entries moved between tokens.",
        "Ratios compare unrelated numbers; the loss is noise where they do.",
        "token in, token out: hand the engine's own prompt ids, completion ids and log-probs to the trainer as they "
        "are, never re-tokenized, padded or shifted in between.",
    ),
    "nonfinite_logprobs": Cause(
        "Some log-probs are NaN, None or infinite.",
        "TRL sets their ratio to 1 in silence; the share grows as entropy collapses.",
        "look at parity/entropy/relative: raise the entropy (higher temperature, beta > 0, lower learning rate) or "
        "resume from before the collapse; check the engine's logits for overflow.",
    ),
    "stale_weights": Cause(
        "The engine still holds older weights: the last sync did not arrive.",
        "Batches come from an older policy while the loss takes them for its own.",
        "repair the weight sync (trainer.vllm_generation.sync_weights must run before each generation and reach the "
        "engine); callback.diagnose(heal=True) delivers the weights once.",
    ),
    "partial_sync": Cause(
        "Some tensors of the engine are not the trainer's: they never arrive, or not as they were sent.",
        "The engine is a mixture of policies, which no checkpoint ever was.",
        "map the names of the tensors listed here to the engine's (vLLM's load_weights must write each of them), and "
        "let nothing change them on the way.",
    ),
    "stale_prefix_cache": Cause(
        "The engine reuses keys and values that were computed under older weights.",
        "Prompts are read with an older policy's eyes: every token after a cached prefix is drawn from a mixture.",
        "check what reset_prefix_cache() returns after each sync (False: blocks were held; "
        "reset_prefix_cache(reset_running_requests=True)), or enable_prefix_caching=False.",
    ),
    "stale_encoder_cache": Cause(
        "The engine reuses features of pictures that were computed under older weights.",
        "A picture seen before is read with an older vision tower: all tokens after it are drawn from a mixture.",
        "trl_parity.trainers.pictures.encode_pictures_anew(trainer) before trainer.train(), which empties vLLM's "
        "encoder cache after each sync (llm.llm_engine.reset_encoder_cache()): TRL empties the prefix cache alone. Or "
        "freeze the vision tower and its projector.",
    ),
    "in_flight_update": Cause(
        "The weights changed while sequences were being generated.",
        "A sequence begins under one policy and ends under another.",
        "drain the engine before a sync, or keep the weight version of each token and correct for it.",
    ),
    "engine_state": Cause(
        "The engine's weights are the trainer's, but what it derived from them or keeps beside them is not.",
        "Every batch comes from a policy that no weights describe, and the next sync does not mend it.",
        "find what wrote to the parts listed here: a sync into weights that were packed at load, a table or scale "
        "that sleep, wake or a patch changed. Build the engine anew (a restart), and deliver weights by a way that "
        "finishes the load (vLLM's process_weights_after_loading), or turn packing off.",
    ),
    "moe_routing": Cause(
        "The two sides take other experts for the same hidden states.",
        "Tokens near a router's border are computed by other experts on one side, and whole nats apart.",
        "one router on both sides: its precision (fp32 logits in both), normalization, groups and correction bias, "
        "and no draw at random in training mode.",
    ),
    "head_precision": Cause(
        "One side rounds its logits (lm_head in half precision), the other does not.",
        "Errors grow with the size of the logits; likely tokens are hit most.",
        'hf_overrides={"head_dtype": "float32"} on the engine and cast_lm_head_to_fp32=True in GRPOConfig.',
    ),
    "dtype_gap": Cause(
        "The trainer's weights are finer than the engine's: small updates vanish when they are rounded.",
        "The engine lags behind updates below its rounding step (phantom clipping).",
        "one dtype on both sides: bf16=True with model_init_kwargs={'dtype': 'bfloat16'}, or an engine in float32.",
    ),
    "kv_cache_precision": Cause(
        "The engine's KV cache (or its weights) is quantized.",
        "A dense error on every token after the first, far above rounding.",
        'kv_cache_dtype="auto" (and no quantization) on the engine, or calibrated scales.',
    ),
    "engine_numerics": Cause(
        "The engine disagrees with itself: batch composition, decode against prefill, chunking or kernels.",
        "The reported log-probs depend on what else was in the batch.",
        "VLLM_BATCH_INVARIANT=1 where supported, enforce_eager=True, enable_chunked_prefill=False.",
    ),
    "trainer_numerics": Cause(
        "The trainer disagrees with itself: layers left in training mode, or the shape of the batch.",
        "old_per_token_logps are noise: ratios leave the clip range before anything was learned.",
        "disable_dropout=True in GRPOConfig (and attention_dropout=0), one batch shape for scoring and loss.",
    ),
    "model_definition": Cause(
        "The two sides run different models on the same weights: positions, rope, window, scale, padding, or what is "
        "done to logits.",
        "The gap is there from the first step and does not go away with a sync.",
        "one config on both sides: compare the engine's hf_config (hf_overrides, max_model_len) with the trainer's "
        "model.config, field by field.",
    ),
    "duplicate_rollouts": Cause(
        "Completions of one prompt are one draw, handed out several times.",
        "Their rewards are equal, so advantages and gradients are 0 in a group, while every statistic of drift is "
        "fine; where seeds repeat over batches, the same few draws are learned from again and again.",
        "take seed out of generation_kwargs (TRL sends each completion as a request of its own, and all get that one "
        "seed), or give each request another.",
    ),
    "correction_weights": Cause(
        "TRL's own correction takes sequences out of the loss, or their weight.",
        "What is not weighed is not learned from: long answers first, since log-ratios of sequences grow with length.",
        'vllm_importance_sampling_mode="token_truncate", which weighs tokens one by one; finer log-probs on both '
        "sides (fp32 heads, one dtype) where sequences are to be weighed whole.",
    ),
    "reference_drift": Cause(
        "The reference of the KL term is not the model that training began with.",
        "The penalty pulls the policy towards a model that nobody chose, further away with each update.",
        "beta=0, or a base that nothing writes to: model_init_kwargs={'dtype': 'float32'} with bf16=True, "
        "init_lora_weights=True, and no adapter left merged.",
    ),
    "truncation_accounting": Cause(
        "Answers that ended by themselves count as cut off, and are masked from the loss.",
        "What the policy ends well is not learned from: it learns from those that run on until the limit, or nothing.",
        "mask_truncated_completions=False; or end by tokens alone (stop_token_ids) and name them to TRL: "
        "trainer.eos_token_ids += [...] before trainer.train().",
    ),
    "unknown": Cause(
        "Nothing that was tried explains at least half of the drift.",
        "The two sides are not the same policy, for a reason not found.",
        "look at the incident's evidence and worst tokens; action='log' lets the run go on meanwhile.",
    ),
}
