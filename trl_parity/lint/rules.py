"""Known traps in the settings: what was seen, what it does, what mends it. Pure: plain facts in, findings out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..causes import CAUSES
from ..records import SamplingSettings

__all__ = ["Facts", "Finding", "lint"]

_NEUTRAL = SamplingSettings()

_TRUNCATION = ("top_k", "top_p", "min_p")

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Settings of both sides. None: not known, as much of a server is."""

    sampling: SamplingSettings | None
    trainer_temperature: float | None
    replayed: bool  # truncation="replay": the verdict leaves the engine's truncation and penalties out
    trainer_dtype: str | None = None  # of the weights
    compute_dtype: str | None = None  # of the forward, after mixed precision
    trainer_head_fp32: bool = False
    dropout: float = 0.0  # the largest in a layer that is in training mode while the policy is scored
    masks_sequences: str | None = None  # TRL's importance-sampling mode, when it drops what drifts
    logprobs_mode: str | None = None
    engine_dtype: str | None = None
    engine_head_dtype: str | None = None
    kv_cache_dtype: str | None = None
    quantization: str | None = None
    prefix_caching: bool | None = None
    engine_defaults: tuple[str, ...] = ()  # sampling settings a server takes over from the model's generation_config
    has_logprobs: bool = True  # the trainer asks the engine for log-probs
    checkpoint_dtype: str | None = None  # of the model's files
    seed: int | None = None  # of each request
    group_requests: bool = True  # a request for each completion (colocated); False: one for a group (a server)
    ends: tuple[str, ...] = ()  # what ends an answer, other than EOS and its length
    masks_truncated: bool = False  # mask_truncated_completions
    thinking_token_budget: int | None = None
    weighs_sequences: str | None = None  # TRL's importance-sampling mode, when it weighs answers by all their tokens
    max_completion_length: int | None = None
    keeps_pictures: bool = False  # features of pictures, over a sync that moves what makes them
    teacher_served: bool = False  # a teacher's log-probs come from a server
    merges_adapter: bool = False  # PEFT's, into the weights, for each sync
    tied_adapter: str | None = None  # what unties a tied head on one side: target_modules or modules_to_save
    model_type: str | None = None
    absolute_positions: bool = False  # counted over the padding where a call brings no position_ids
    draws: tuple[str, ...] = ()  # what draws at random in training mode and is no dropout
    refused: tuple[str, str] | None = None  # the engine's architecture, and what it won't take by its synced name


@dataclass(frozen=True, slots=True)
class Finding:
    """One trap. ``severity``: ``error`` (the numbers will be wrong), ``warning`` (they may be), ``note``."""

    severity: str
    cause: str  # the identifier of the cause it leads to
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.text} Fix: {self.fix}"


def lint(f: Facts) -> Iterator[Finding]:
    """Traps in these settings, worst first within their kind."""
    for check in _CHECKS:
        yield from check(f)


def _reported(f: Facts) -> Iterator[Finding]:
    """What the engine reports: log-probs, and of which law."""
    s = f.sampling
    if not f.has_logprobs:
        yield Finding(
            "error",
            "unknown",
            "the trainer asks the engine for no log-probs (RLOOTrainer does not by itself): there is nothing to "
            "compare, and nothing corrects a mismatch.",
            "trainer.vllm_generation.logprobs = 0 before trainer.train().",
        )
    if f.logprobs_mode not in (None, "processed_logprobs") and (s is None or _processes(s)):
        of = "sampling" if s is None else f"temperature {s.temperature:g}, truncation, penalties and masks"
        yield Finding(
            "error",
            "raw_logprobs",
            f"the engine returns {f.logprobs_mode}: log-probs from before {of}, while the loss uses them as those of "
            "the law sampled from.",
            'logprobs_mode="processed_logprobs" (server: --logprobs-mode processed_logprobs).',
        )


def _others(f: Facts) -> Iterator[Finding]:
    """What is learned from a teacher's server, and what an engine keeps of pictures."""
    if f.teacher_served and f.trainer_temperature not in (None, 1.0):
        yield Finding(
            "error",
            "temperature",
            f"the loss divides the student's logits by temperature {f.trainer_temperature:g}; the teacher's log-probs "
            "come from a vLLM server, whose prompt log-probs are of temperature 1 whatever is asked for: the student "
            "is taught another law than its own.",
            "temperature=1.0, or a teacher that is loaded beside the student.",
        )
    if f.keeps_pictures:
        yield Finding(
            "warning",
            "stale_encoder_cache",
            "the vision tower is trained, vLLM keeps features of pictures from request to request, and TRL's weight "
            "sync empties the prefix cache alone: a picture that comes again is read with older weights.",
            "trl_parity.trainers.pictures.encode_pictures_anew(trainer) before trainer.train(), or freeze the tower "
            "and its projector.",
        )


def _dropout(f: Facts) -> Iterator[Finding]:
    if f.dropout > 0:
        yield Finding(
            "error",
            "trainer_numerics",
            f"the trainer scores with dropout {f.dropout:g} switched on: two passes over one batch disagree.",
            "disable_dropout=True in the trainer's arguments.",
        )


def _quantization(f: Facts) -> Iterator[Finding]:
    if f.quantization is not None:
        yield Finding(
            "warning",
            "kv_cache_precision",
            f"the engine's weights are quantized ({f.quantization}).",
            "an engine in the trainer's dtype, or expect an excess over the floor.",
        )
    if f.kv_cache_dtype is not None and f.kv_cache_dtype.startswith("fp8"):
        yield Finding(
            "warning",
            "kv_cache_precision",
            f"the engine's KV cache is {f.kv_cache_dtype}.",
            'kv_cache_dtype="auto", or calibrated scales.',
        )


def _heads(f: Facts) -> Iterator[Finding]:
    if f.engine_head_dtype is not None and f.engine_head_dtype != "float32":
        sides = (
            "both heads are" if not f.trainer_head_fp32 and f.compute_dtype != "float32" else "the engine's head is"
        )
        yield Finding(
            "note",
            "head_precision",
            f"{sides} {f.engine_head_dtype}: logits near 30 are rounded by up to 0.06 there.",
            'hf_overrides={"head_dtype": "float32"} on the engine and cast_lm_head_to_fp32=True on the trainer.',
        )
    half = f.compute_dtype in ("bfloat16", "float16")
    if f.engine_head_dtype == "float32" != f.engine_dtype and half and not f.trainer_head_fp32:
        yield Finding(
            "note",
            "head_precision",
            f"the engine's head is float32, the trainer's {f.compute_dtype}: on one side alone it can make the "
            "mismatch worse.",
            "cast_lm_head_to_fp32=True in the trainer's arguments.",
        )


def _finer_updates(f: Facts) -> Iterator[Finding]:
    if f.trainer_dtype == "float32" and f.engine_dtype not in (None, "float32") and f.compute_dtype == "float32":
        yield Finding(
            "note",
            "dtype_gap",
            f"the trainer computes in float32, the engine in {f.engine_dtype}: updates smaller than its rounding "
            "never reach it.",
            "one dtype for both (bf16=True, or an engine in float32).",
        )


def _served(f: Facts) -> Iterator[Finding]:
    """What the engine does of its own accord: a model's defaults, cached prefixes."""
    if f.engine_defaults:
        yield Finding(
            "warning",
            "truncated_sampling",
            f"the server takes defaults from the model's generation_config ({', '.join(f.engine_defaults)}) for what "
            "a request leaves open.",
            "vllm serve ... --generation-config vllm.",
        )
    if f.prefix_caching:
        yield Finding(
            "note",
            "stale_prefix_cache",
            "the engine caches prefixes, and nobody reads what reset_prefix_cache() returns after a sync: False means "
            "that keys and values of the old weights stay.",
            "enable_prefix_caching=False, or watch for drift after a sync (parity/excess/*).",
        )


def _to_know(f: Facts) -> Iterator[Finding]:
    """What is no mistake, and surprises."""
    if f.trainer_dtype == "float32" and f.checkpoint_dtype in ("bfloat16", "float16"):
        yield Finding(
            "note",
            "dtype_gap",
            f"the checkpoint is {f.checkpoint_dtype} but the trainer's weights are float32 (TRL's default).",
            f'model_init_kwargs={{"dtype": "{f.checkpoint_dtype}"}} if memory matters; float32 masters with bf16=True '
            "are fine.",
        )
    if f.masks_sequences is not None:
        yield Finding(
            "note",
            "unknown",
            f"vllm_importance_sampling_mode={f.masks_sequences!r} drops what drifts most from the loss, and TRL's own "
            "ratio metrics are taken after it: read parity/ratio/* instead.",
            "nothing to mend; know it.",
        )


def _processes(sampling: SamplingSettings) -> bool:
    """Whether the law sampled from is another than the model's at temperature 1."""
    masked = set(sampling.unreplayed) - {"structured_outputs"}  # whose mask raw log-probs have as well
    return sampling.temperature not in (0.0, 1.0) or sampling.truncates or sampling.penalizes or bool(masked)


def _requests(f: Facts) -> Iterator[Finding]:
    """Traps in what the engine is asked for."""
    s = f.sampling
    if s is None:
        return
    if f.trainer_temperature not in (None, s.temperature):
        yield Finding(
            "error",
            "temperature",
            f"the engine samples at temperature {s.temperature:g} but the loss divides logits by "
            f"{f.trainer_temperature:g}.",
            "one temperature, set in the trainer's arguments and nowhere else.",
        )
    how = (
        "it is replayed on the trainer's side and reported as parity/truncation/*, but the loss itself uses the whole "
        "distribution (see parity/own_head/*), and the verdict leaves that out."
        if f.replayed
        else "the loss does not, so it counts as drift, and halts the run where it is large enough."
    )
    severity = "warning" if f.replayed else "error"
    for there, cause, names in (
        (s.truncates, "truncated_sampling", _TRUNCATION),
        (s.penalizes, "penalties", _PENALTIES),
    ):
        if there:
            fix = ", ".join(f"{n}={getattr(_NEUTRAL, n):g}" for n in names)
            said = f"the engine changes its distribution ({_changed(s, names)}): {how}"
            yield Finding(severity, cause, said, f"{fix} in the requests.")
    if s.unreplayed:
        yield Finding(
            "warning",
            "constrained_decoding",
            f"the requests set {', '.join(s.unreplayed)}, which changes the law sampled from and is not replayed on "
            "the trainer's side: expect drift where it applies.",
            "drop it, or mask the tokens it forces.",
        )
    if "structured_outputs" in s.unreplayed and f.logprobs_mode not in (None, "processed_logprobs"):
        yield Finding(
            "warning",
            "constrained_decoding",
            f"the engine returns {f.logprobs_mode}, but with structured outputs these are not the model's own: vLLM "
            "writes the grammar's mask into the logits before it copies them.",
            'logprobs_mode="processed_logprobs", and no structured outputs, or the tokens they force masked.',
        )


def _correction(f: Facts) -> Iterator[Finding]:
    """What TRL's importance weights make of a truncated law."""
    s = f.sampling
    if s is None or not s.truncates or f.weighs_sequences is None:
        return
    size = ""
    if s.top_p < 1.0 and f.max_completion_length is not None:
        size = f" (top_p alone: down to {s.top_p**f.max_completion_length:.1g} at {f.max_completion_length} tokens)"
    yield Finding(
        "error",
        "correction_weights",
        f"the engine truncates ({_changed(s, _TRUNCATION)}) and vllm_importance_sampling_mode={f.weighs_sequences!r} "
        f"multiplies the loss of an answer by the mass kept at each of its tokens{size}: long answers are not learned "
        "from.",
        'top_p=1, top_k=0, min_p=0, or vllm_importance_sampling_mode="token_truncate".',
    )


def _answers(f: Facts) -> Iterator[Finding]:
    """What makes answers alike, ends them or writes into them."""
    if f.seed is not None:
        how = (
            "TRL asks for each completion of a group by itself, so all of a group are the same, advantages and "
            "gradients are 0, and of the drift metrics only parity/entropy/drift can show it."
            if f.group_requests
            else "the completions of a group differ, but each prompt and each step draws with the same random numbers."
        )
        severity = "error" if f.group_requests else "warning"
        fix = "no seed in generation_kwargs; the engine has its own."
        yield Finding(severity, "duplicate_rollouts", f"each request carries seed={f.seed}: {how}", fix)
    if f.ends and f.masks_truncated:
        yield Finding(
            "error",
            "truncation_accounting",
            f"answers end by {', '.join(f.ends)}, and mask_truncated_completions masks what doesn't end in EOS: "
            "answers that ended so count as cut off and are not learned from.",
            CAUSES["truncation_accounting"].fix,
        )
    if f.thinking_token_budget is not None:
        yield Finding(
            "error",
            "constrained_decoding",
            f"thinking_token_budget={f.thinking_token_budget} writes the end of thinking into answers by force: the "
            "engine reports log-prob 0 for tokens that the policy did not choose, and the loss learns them.",
            "no thinking_token_budget in generation_kwargs; max_completion_length bounds the answer, a reward the "
            "thinking.",
        )


def _model(f: Facts) -> Iterator[Finding]:
    """What comes with the model."""
    if f.refused is not None:
        architecture, part = f.refused
        yield Finding(
            "error",
            "partial_sync",
            f"vLLM's {architecture} doesn't know its {part} by the name that transformers 5 gives it and TRL delivers "
            "it by: the first weight sync fails, or leaves it as it was without a word.",
            'vllm_model_impl="transformers" (server: --model-impl transformers), where vLLM takes the model so.',
        )
    if f.absolute_positions:
        yield Finding(
            "warning",
            "model_definition",
            f"{f.model_type} counts positions from the first column, padding included, unless a call brings "
            "position_ids, and TRL's brings none: prompts shorter than the longest of their batch are scored at other "
            "positions than the engine's.",
            'before trainer.train(): trainer.model.register_forward_pre_hook(lambda m, a, k: (a, k | {"position_ids": '
            '(k["attention_mask"].cumsum(-1) - 1).clamp(min=0)}), with_kwargs=True); or prompts of one length.',
        )
    if f.draws:
        set_to_0 = [draw.split("=")[0] for draw in f.draws if "=" in draw]
        fixes = []
        if "experts" in f.draws:
            fixes.append(
                "routers that stay in eval mode, before trainer.train(): for m in [m for m in trainer.model.modules() "
                'if type(m).__name__ == "PhimoeTopKRouter"]: m.eval(); m.train = lambda mode=True: None'
            )
        if set_to_0:
            fixes.append(f"{' and '.join(set_to_0)} = 0 in the model's config (model_init_kwargs)")
        yield Finding(
            "error",
            "trainer_numerics" if all("layerdrop" in draw for draw in f.draws) else "moe_routing",
            f"{f.model_type} draws at random in training mode ({', '.join(f.draws)}), in which TRL scores: two passes "
            "over one batch disagree, and disable_dropout does not reach it.",
            "; ".join(fixes) + ".",
        )


def _adapter(f: Facts) -> Iterator[Finding]:
    """What merging an adapter for the engine does."""
    if f.tied_adapter == "modules_to_save":
        yield Finding(
            "error",
            "partial_sync",
            "modules_to_save holds one end of a tied embedding: the trainer has two matrices from then on, the engine "
            "one. vLLM refuses lm_head in the sync; embed_tokens becomes the engine's head as well, and not the "
            "trainer's.",
            'peft_config=LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True, ...) for the trainer '
            "(TRL's ModelConfig can't say it), or neither of the two.",
        )
    if f.tied_adapter == "target_modules":
        yield Finding(
            "error",
            "partial_sync",
            "an adapter sits on a tied embedding: merging it for the engine writes into the one matrix that both ends "
            "share (with ensure_weight_tying: twice), so the engine gets another model than the trainer's.",
            'embed_tokens and lm_head out of target_modules; LoraConfig(modules_to_save=["embed_tokens"], '
            "ensure_weight_tying=True, ...) trains them as one.",
        )
    if f.merges_adapter and f.trainer_dtype in ("bfloat16", "float16"):
        yield Finding(
            "warning",
            "reference_drift",
            f"the adapter is merged into {f.trainer_dtype} weights and taken out again at each sync: rounding moves "
            "the frozen base, and with it the policy and the reference of the KL term.",
            'model_init_kwargs={"dtype": "float32"} with bf16=True: the forward stays in bf16.',
        )


def _changed(sampling: SamplingSettings, names: tuple[str, ...]) -> str:
    return ", ".join(f"{n}={getattr(sampling, n):g}" for n in names if getattr(sampling, n) != getattr(_NEUTRAL, n))


_CHECKS = (
    _reported, _requests, _correction, _others, _answers, _dropout, _model, _adapter, _quantization, _heads,
    _finer_updates, _served, _to_know,
)  # fmt: skip
