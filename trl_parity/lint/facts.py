"""The facts that lint judges, read from a live run, from a trainer's config, or from engine arguments."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..config.reading import from_json
from ..records import UNREPLAYED, SamplingSettings
from ..scoring.dtypes import dtype_name
from ..scoring.perturb import largest_dropout
from ..trainers.generation import GenerationCapture
from ..trainers.grpo import GRPOCapture
from ..trainers.pictures import keeps_pictures
from .models import adapter_facts, model_facts, tied_adapter
from .rules import Facts, Finding, lint

if TYPE_CHECKING:
    from ..trainers.capture import Capture

__all__ = ["configured_facts", "engine_facts", "facts", "live_traps", "rl_traps", "tell"]

logger = logging.getLogger(__name__)


def facts(capture: Capture, replayed: bool) -> Facts:
    """The facts of a run, from its first batch's capture."""
    args = capture.trainer.args  # a trainer without the correction, or a head of its own, has no such argument
    engine = capture.engine
    weights = next(p.dtype for p in capture.policy.parameters() if p.is_floating_point())
    corrects = getattr(args, "vllm_importance_sampling_correction", False)
    mode = args.vllm_importance_sampling_mode if corrects else None
    extra = getattr(capture.generation, "generation_kwargs", None) or {}
    model = model_facts(capture.policy.config)
    if getattr(args, "vllm_model_impl", "vllm") == "transformers" or getattr(args, "vllm_mode", None) != "colocate":
        del model["refused"]
    # other trainers pass position_ids
    model["absolute_positions"] &= isinstance(capture, (GRPOCapture, GenerationCapture))
    return Facts(
        sampling=capture.sampling,
        trainer_temperature=capture.temperature,
        replayed=replayed,
        trainer_dtype=dtype_name(weights),
        compute_dtype=dtype_name(capture.compute_dtype),
        trainer_head_fp32=getattr(args, "cast_lm_head_to_fp32", False),
        dropout=largest_dropout(capture.policy),
        has_logprobs=getattr(capture.generation, "logprobs", 0) is not None,
        masks_sequences=mode if mode is not None and mode.endswith("_mask") else None,
        weighs_sequences=_weighs_sequences(mode, getattr(args, "vllm_importance_sampling_clip_min", None)),
        max_completion_length=getattr(args, "max_completion_length", None),
        masks_truncated=getattr(args, "mask_truncated_completions", False),
        group_requests=getattr(capture.generation, "mode", None) == "colocate",
        keeps_pictures=keeps_pictures(capture),
        teacher_served=getattr(capture.trainer, "teacher_client", None) is not None,
        **_request_facts(extra, getattr(capture.trainer, "eos_token_ids", ())),
        **model,
        **({} if getattr(capture.trainer, "_lora_sync", False) else adapter_facts(capture.policy)),
        **({} if engine is None else engine.settings()),
    )


def _request_facts(extra: Mapping[str, Any], eos: Iterable[int]) -> dict[str, Any]:
    """What ``generation_kwargs`` ask for beside the law. ``eos``: the ids in which TRL looks for an answer's end."""
    ends = [name for name in ("stop", "repetition_detection") if extra.get(name)]
    if other := sorted(set(extra.get("stop_token_ids") or ()) - set(eos)):
        ends.append(f"stop_token_ids={other}")
    numbers = {name: extra.get(name) for name in ("seed", "thinking_token_budget")}
    return {"ends": tuple(ends)} | {name: None if n == -1 else n for name, n in numbers.items()}  # -1: none, to vLLM


def _weighs_sequences(mode: str | None, clip_min: float | None) -> str | None:
    """TRL's mode, where a weight is a product over an answer that nothing keeps from vanishing."""
    vanishes = mode == "sequence_mask" or (mode == "sequence_truncate" and clip_min is None)
    return mode if vanishes else None


def live_traps(capture: Capture, replayed: bool) -> list[Finding]:
    """What is found in the settings of the live engine and trainer."""
    try:
        return list(lint(facts(capture, replayed)))
    except Exception as e:  # no measurement: a server of another vLLM, say; the run goes on
        logger.warning("the settings could not be checked: %s: %s", type(e).__name__, e)
        return []


def tell(findings: Iterable[Finding]) -> None:
    """Log them."""
    for finding in findings:
        logger.log(logging.INFO if finding.severity == "note" else logging.WARNING, "%s", finding)


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
    corrects = trainer == "grpo" and values.get("vllm_importance_sampling_correction", True)  # RLOO has none
    mode = str(values.get("vllm_importance_sampling_mode", "sequence_mask")) if corrects else None
    model = {} if checkpoint.get("config") is None else model_facts(checkpoint["config"], init)
    if values.get("vllm_mode") == "server":
        native = serve is not None and re.search(r"--model-impl[= ]+transformers", serve) is None
    else:
        native = values.get("vllm_model_impl") != "transformers"
    if not native:
        model.pop("refused", None)
    if serve is not None or values.get("vllm_mode") == "server":
        engine = _served(serve, checkpoint)
    else:  # colocated: TRL sets the log-prob mode, engine_args what they like
        from ..config.parity import ParityConfig
        from ..engine.config import read_engine_config

        source = ParityConfig(engine_args=values.get("engine_args")).engine_source()
        over = {} if source is None else read_engine_config(source).engine
        engine = engine_facts({"logprobs_mode": "processed_logprobs"} | over, checkpoint)
    return Facts(
        sampling=sampling,
        trainer_temperature=float(values.get("temperature", 1.0)),
        replayed=values.get("truncation") == "replay",
        trainer_dtype=weights,
        compute_dtype="float16" if half is None else "bfloat16" if half else weights,
        trainer_head_fp32=bool(values.get("cast_lm_head_to_fp32")),
        dropout=0.0 if values.get("disable_dropout") else checkpoint.get("dropout", 0.0),
        masks_sequences=mode if mode is not None and mode.endswith("_mask") else None,
        weighs_sequences=_weighs_sequences(mode, values.get("vllm_importance_sampling_clip_min")),
        max_completion_length=values.get("max_completion_length", 512),
        masks_truncated=bool(values.get("mask_truncated_completions")),
        group_requests=values.get("vllm_mode", "colocate") == "colocate",
        teacher_served=bool(values.get("teacher_model_server_url")),
        merges_adapter=bool(values.get("use_peft")),
        tied_adapter=tied_adapter(values, checkpoint.get("tied", False)),
        **_request_facts(extra, checkpoint.get("eos", ())),
        **model,
        has_logprobs=trainer != "rloo",
        checkpoint_dtype=checkpoint.get("dtype"),
        **engine,
    )


def engine_facts(args: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of an engine from its arguments by vLLM's names, and vLLM's defaults for what they leave open."""
    dtype = _engine_dtype(dtype_name(args.get("dtype") or "auto"), checkpoint)
    overrides = args.get("hf_overrides")
    head = overrides.get("head_dtype") if isinstance(overrides, Mapping) else None
    return {
        "logprobs_mode": args.get("logprobs_mode", "raw_logprobs"),
        "engine_dtype": dtype,
        "engine_head_dtype": dtype if head in (None, "model") else dtype_name(head),
        "kv_cache_dtype": args.get("kv_cache_dtype", "auto"),
        "quantization": args.get("quantization"),
        "prefix_caching": args.get("enable_prefix_caching", True),
    }


def _checkpoint(model: Any) -> dict[str, Any]:
    """Config, dtype, dropout, EOS and sampling defaults of a model's files; nothing of those not on this machine."""
    from transformers import AutoConfig, GenerationConfig

    found: dict[str, Any] = {}
    try:
        found["config"] = AutoConfig.from_pretrained(model, local_files_only=True)
        config = found["config"].get_text_config()
        found["tied"] = bool(config.tie_word_embeddings)
        found["eos"] = _ids(config.eos_token_id)
        found["dtype"] = None if config.dtype is None else dtype_name(config.dtype)
        rates = [v for k, v in config.to_dict().items() if k.endswith(("dropout", "pdrop")) and isinstance(v, float)]
        found["dropout"] = max(rates, default=0.0)
        defaults = GenerationConfig.from_pretrained(model, local_files_only=True)
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        told = {
            n: v for n in neutral if (v := getattr(defaults, n, None)) not in (None, neutral[n], 50 * (n == "top_k"))
        }
        found["eos"] |= _ids(defaults.eos_token_id)
        found["defaults"] = tuple(f"{n}={v:g}" for n, v in told.items())
    except (OSError, ValueError, TypeError):
        pass
    return found


def _ids(given: int | list[int] | None) -> set[int]:
    return set(given) if isinstance(given, list) else set() if given is None else {given}


def _engine_dtype(asked: str, checkpoint: Mapping[str, Any]) -> str | None:
    """vLLM's ``auto``: the checkpoint's, but half precision where that is float32."""
    own = checkpoint.get("dtype")
    return asked if asked != "auto" else "bfloat16" if own == "float32" else own


def _served(serve: str | None, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's facts from the line a server is started with; nothing without it."""
    if serve is None:
        return {}
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, default in (
        ("--logprobs-mode", "raw_logprobs"), ("--dtype", "auto"), ("--kv-cache-dtype", "auto"),
        ("--quantization", None), ("--hf-overrides", "{}"), ("--generation-config", "auto"),
    ):  # fmt: skip
        parser.add_argument(flag, default=default)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    found, _ = parser.parse_known_args(shlex.split(serve))
    args = vars(found) | {"hf_overrides": from_json(found.hf_overrides, "--hf-overrides")}
    defaults = checkpoint.get("defaults", ()) if found.generation_config != "vllm" else ()
    return engine_facts(args, checkpoint) | {"engine_defaults": defaults}


def rl_traps(args: Mapping[str, Any], trainer: Mapping[str, Any] | None = None) -> list[Finding]:
    """What these arguments do to RL, by the judgement of ``lint``. Pure: needs no vLLM.

    ``trainer``: settings of TRL's config, as far as they are known.
    """
    half = None if trainer is None else "float32" if trainer.get("bf16") is False else "bfloat16"
    served = args.get("generation_config", "auto") != "vllm"
    return list(
        lint(
            Facts(
                sampling=None,
                trainer_temperature=None,
                replayed=True,
                compute_dtype=half,
                trainer_head_fp32=bool((trainer or {}).get("cast_lm_head_to_fp32")),
                engine_defaults=("as the model has them",) if served else (),
                **engine_facts(args, {}),
            )
        )
    )
