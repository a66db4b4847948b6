"""Known traps in the settings, reported before the first update: what was seen, what it does, what mends it.

``facts`` reads the live engine and trainer (not what somebody passed); ``lint`` judges plain facts and is pure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .records import SamplingSettings

if TYPE_CHECKING:
    from .taps import Capture

__all__ = ["UNREPLAYED", "Facts", "Finding", "configured_facts", "facts", "largest_dropout", "lint", "tell_traps"]

logger = logging.getLogger(__name__)

# request settings that change the law the engine samples from and are not replayed on the trainer's logits
UNREPLAYED = ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "structured_outputs", "logits_processors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Settings of both sides. None: not known, as much of a server is."""

    sampling: SamplingSettings | None
    trainer_temperature: float | None
    replayed: bool  # the engine's truncation and penalties are replayed on the trainer's side
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
        of = "sampling" if s is None else f"temperature {s.temperature:g}, truncation and penalties"
        yield Finding(
            "error",
            "raw_logprobs",
            f"the engine returns {f.logprobs_mode}: log-probs from before {of}, while the loss uses them as those of "
            "the law sampled from.",
            'logprobs_mode="processed_logprobs" (server: --logprobs-mode processed_logprobs).',
        )
    if s is not None:
        yield from _requests(f, s)
    if f.dropout > 0:
        yield Finding(
            "error",
            "trainer_numerics",
            f"the trainer scores with dropout {f.dropout:g} switched on: two passes over one batch disagree.",
            "disable_dropout=True in the trainer's arguments.",
        )
    if f.quantization is not None:
        yield Finding(
            "warning", "kv_cache_precision", f"the engine's weights are quantized ({f.quantization}).",
            "an engine in the trainer's dtype, or expect an excess over the floor.",
        )  # fmt: skip
    if f.kv_cache_dtype is not None and f.kv_cache_dtype.startswith("fp8"):
        yield Finding(
            "warning", "kv_cache_precision", f"the engine's KV cache is {f.kv_cache_dtype}.",
            'kv_cache_dtype="auto", or calibrated scales.',
        )  # fmt: skip
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
    if f.trainer_dtype == "float32" and f.engine_dtype not in (None, "float32") and f.compute_dtype == "float32":
        yield Finding(
            "note",
            "dtype_gap",
            f"the trainer computes in float32, the engine in {f.engine_dtype}: updates smaller than its rounding "
            "never reach it.",
            "one dtype for both (bf16=True, or an engine in float32).",
        )
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
    return sampling.temperature not in (0.0, 1.0) or sampling.truncates or sampling.penalizes


def _requests(f: Facts, s: SamplingSettings) -> Iterator[Finding]:
    """Traps in what the engine is asked for."""
    if f.trainer_temperature not in (None, s.temperature):
        yield Finding(
            "error",
            "temperature",
            f"the engine samples at temperature {s.temperature:g} but the loss divides logits by "
            f"{f.trainer_temperature:g}.",
            "one temperature, set in the trainer's arguments and nowhere else.",
        )
    if s.truncates or s.penalizes:
        how = (
            "it is replayed on the trainer's side and reported as parity/truncation/*, but the loss itself uses the "
            "whole distribution (see parity/own_head/*)."
            if f.replayed
            else "it is not replayed (truncation='ignore'), so it counts as drift."
        )
        cause = "truncated_sampling" if s.truncates else "penalties"
        fix = "top_p=1, top_k=0, min_p=0" if s.truncates else "repetition_penalty=1, presence_penalty=0"
        yield Finding("warning", cause, f"the engine changes its distribution ({_changed(s)}): {how}", f"{fix}.")
    if s.unreplayed:
        yield Finding(
            "warning",
            "constrained_decoding",
            f"the requests set {', '.join(s.unreplayed)}, which changes the law sampled from and is not replayed on "
            "the trainer's side: expect drift where it applies.",
            "drop it, or mask the tokens it forces.",
        )


def _changed(sampling: SamplingSettings) -> str:
    neutral = SamplingSettings()
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return ", ".join(f"{n}={getattr(sampling, n):g}" for n in names if getattr(sampling, n) != getattr(neutral, n))


def facts(capture: Capture, replayed: bool, server_timeout: float = 60.0) -> Facts:
    """The facts of a run, from its first batch's capture. ``server_timeout``: seconds for a server to answer."""
    from .engine.server import reachable
    from .floor import compute_dtype

    args = capture.trainer.args  # a trainer without the correction, or a head of its own, has no such argument
    engine = reachable(capture.generation, server_timeout)
    weights = next(p.dtype for p in capture.policy.parameters() if p.is_floating_point())
    corrects = getattr(args, "vllm_importance_sampling_correction", False)
    mode = args.vllm_importance_sampling_mode if corrects else None
    return Facts(
        sampling=capture.sampling,
        trainer_temperature=capture.temperature,
        replayed=replayed,
        trainer_dtype=_name(weights),
        compute_dtype=_name(compute_dtype(capture)),
        trainer_head_fp32=getattr(args, "cast_lm_head_to_fp32", False),
        dropout=largest_dropout(capture.policy),
        has_logprobs=getattr(capture.generation, "logprobs", 0) is not None,
        masks_sequences=mode if mode is not None and mode.endswith("_mask") else None,
        **({} if engine is None else engine.settings()),
    )


def tell_traps(capture: Capture, replayed: bool, timeout: float) -> None:
    """Log what is found in the settings of the live engine and trainer."""
    try:
        for finding in lint(facts(capture, replayed, timeout)):
            logger.log(logging.INFO if finding.severity == "note" else logging.WARNING, "%s", finding)
    except Exception as e:  # no measurement: a server of another vLLM, say; the run goes on
        logger.warning("the settings could not be checked: %s: %s", type(e).__name__, e)


def configured_facts(values: Mapping[str, Any], *, serve: str | None = None, trainer: str = "grpo") -> Facts:
    """The facts a run will have, from settings alone: TRL's (GRPOConfig, ModelConfig) and trl-parity's by name.

    ``serve``: the line the server is started with, ``vllm serve MODEL --logprobs-mode ...``. What can't be known
    before the engine runs is None. The checkpoint's config is read where it lies on this machine.
    """
    extra = dict(values.get("generation_kwargs") or {})
    constrained = ("structured_outputs",) if values.get("vllm_structured_outputs_regex") else ()
    init = dict(values.get("model_init_kwargs") or {})
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    set_to = {n: extra.get(n, values.get(n)) for n in (*names, "presence_penalty", "frequency_penalty")}
    sampling = SamplingSettings(
        **{n: v for n, v in set_to.items() if v is not None},
        unreplayed=tuple(n for n in UNREPLAYED if n in constrained or extra.get(n)),
    )
    checkpoint = _checkpoint(values.get("model_name_or_path"))
    dtype = str(values.get("dtype") or init.get("dtype") or "float32").removeprefix("torch.")
    half = None if values.get("fp16") else values.get("bf16", True) is not False
    weights = checkpoint.get("dtype") if dtype == "auto" else dtype
    mode = values.get("vllm_importance_sampling_mode", "sequence_mask")
    masks = values.get("vllm_importance_sampling_correction", True) and str(mode).endswith("_mask")
    if serve is not None or values.get("vllm_mode") == "server":
        engine = _served(serve, checkpoint)
    else:  # colocated: TRL sets the log-prob mode, and nothing else of these
        own = _engine_dtype("auto", checkpoint)
        engine = {"logprobs_mode": "processed_logprobs", "engine_dtype": own, "engine_head_dtype": own}
        engine["prefix_caching"] = True
    return Facts(
        sampling=sampling,
        trainer_temperature=float(values.get("temperature", 1.0)),
        replayed=values.get("truncation", "replay") == "replay",
        trainer_dtype=weights,
        compute_dtype="float16" if half is None else "bfloat16" if half else weights,
        trainer_head_fp32=bool(values.get("cast_lm_head_to_fp32")),
        dropout=0.0 if values.get("disable_dropout") else checkpoint.get("dropout", 0.0),
        masks_sequences=str(mode) if masks else None,
        has_logprobs=trainer != "rloo",
        checkpoint_dtype=checkpoint.get("dtype"),
        **engine,
    )


def _checkpoint(model: Any) -> dict[str, Any]:
    """dtype, dropout and sampling defaults of a model's files; empty where they are not on this machine."""
    from transformers import AutoConfig, GenerationConfig

    found: dict[str, Any] = {}
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
        found["dtype"] = None if config.dtype is None else _name(config.dtype)
        rates = [v for k, v in config.to_dict().items() if k.endswith(("dropout", "pdrop")) and isinstance(v, float)]
        found["dropout"] = max(rates, default=0.0)
        defaults = GenerationConfig.from_pretrained(model, local_files_only=True)
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        told = {
            n: v for n in neutral if (v := getattr(defaults, n, None)) not in (None, neutral[n], 50 * (n == "top_k"))
        }
        found["defaults"] = tuple(f"{n}={v:g}" for n, v in told.items())
    except (OSError, ValueError, TypeError):
        pass
    return found


def _engine_dtype(asked: str, checkpoint: Mapping[str, Any]) -> str | None:
    """vLLM's ``auto``: the checkpoint's, but half precision where that is float32."""
    own = checkpoint.get("dtype")
    return asked if asked != "auto" else "bfloat16" if own == "float32" else own


def _served(serve: str | None, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's facts from the line a server is started with; nothing without it."""
    if serve is None:
        return {}
    import argparse
    import json
    import shlex

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, default in (
        ("--logprobs-mode", "raw_logprobs"), ("--dtype", "auto"), ("--kv-cache-dtype", "auto"),
        ("--quantization", None), ("--hf-overrides", "{}"), ("--generation-config", "auto"),
    ):  # fmt: skip
        parser.add_argument(flag, default=default)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    found, _ = parser.parse_known_args(shlex.split(serve))
    dtype = _engine_dtype(found.dtype, checkpoint)
    return {
        "logprobs_mode": found.logprobs_mode,
        "engine_dtype": dtype,
        "engine_head_dtype": json.loads(found.hf_overrides).get("head_dtype", dtype),
        "kv_cache_dtype": found.kv_cache_dtype,
        "quantization": found.quantization,
        "prefix_caching": found.enable_prefix_caching,
        "engine_defaults": checkpoint.get("defaults", ()) if found.generation_config != "vllm" else (),
    }


def largest_dropout(model: Any) -> float:
    """The largest dropout of a layer in training mode: modules of torch, and the attention of transformers."""
    import torch

    largest = 0.0
    for module in model.modules():
        if not module.training:
            continue
        if isinstance(module, torch.nn.Dropout):
            largest = max(largest, module.p)
        elif isinstance(p := getattr(module, "attention_dropout", 0.0), float):
            largest = max(largest, p)
    return largest


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
