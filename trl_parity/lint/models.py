"""What a model brings with it: traps that its config, its architecture or its adapter set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["adapter_facts", "model_facts", "tied_adapter"]

# learned (or fixed, absolute) positions, counted from the first column where a call brings no position_ids: of the
# decoders in transformers 5.17, those whose log-probs change with left padding and do not once position_ids are given
_ABSOLUTE_POSITIONS = {"biogpt", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "xglm", "xlm"}

# draws of a forward in training mode that are no torch.nn.Dropout: names in a config, set where they draw
_RANDOM_SETTINGS = ("input_jitter_noise", "router_jitter_noise", "moe_jitter_eps", "layerdrop", "decoder_layerdrop")

# router_jitter_noise is no noise here but the width of the mask that its sparse mixer draws from
_DRAWS_EXPERTS = {"phimoe"}

# by the architecture that vLLM 0.31 serves: what its load_weights knows by the hub's name alone, while TRL delivers it
# by the one that transformers 5 gives it
_HUB_NAMES = {
    "AXK1ForCausalLM": "experts",
    "DeepseekV2ForCausalLM": "experts",
    "DeepseekV3ForCausalLM": "experts",
    "Ernie4_5_MoeForCausalLM": "router's bias",
    "GPTNeoXForCausalLM": "head",
    "GraniteMoeHybridForCausalLM": "experts",
    "HrmTextForCausalLM": "attention",
    "HYV3ForCausalLM": "experts",
    "LagunaForCausalLM": "shared experts",
    "Lfm2MoeForCausalLM": "experts",  # left out without an error
    "MiniMaxM2ForCausalLM": "experts",
    "MixtralForCausalLM": "experts",
    "PhiMoEForCausalLM": "experts",
}

# of an input or output embedding, by its last part
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def model_facts(config: Any, over: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """By the names of ``Facts``, from a transformers config and what is laid over it."""
    text = config.get_text_config()
    kind, own = text.model_type, text.to_dict()
    values = own | (own.get("ffn_config") or {}) | dict(over or {})
    draws = [f"{name}={value:g}" for name in _RANDOM_SETTINGS if (value := values.get(name))]
    if kind in _DRAWS_EXPERTS:
        draws = ["experts", *(d for d in draws if not d.startswith("router"))]
    refused = next(((name, _HUB_NAMES[name]) for name in config.architectures or () if name in _HUB_NAMES), None)
    if refused is not None and refused[1] == "head" and text.tie_word_embeddings:
        refused = None  # a tied head is not delivered
    return {
        "model_type": kind,
        "absolute_positions": kind in _ABSOLUTE_POSITIONS,
        "draws": tuple(draws),
        "refused": refused,
    }


def adapter_facts(policy: Any) -> dict[str, Any]:
    """By the names of ``Facts``, from a live policy whose adapter is merged for the engine; nothing without one."""
    if not hasattr(policy, "get_base_model"):
        return {}
    base = policy.get_base_model()
    found: dict[str, Any] = {"merges_adapter": True}
    if base.config.get_text_config().tie_word_embeddings:
        embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
        copied = any(hasattr(module, "modules_to_save") for module in embeddings)
        adapted = any(hasattr(module, "base_layer") for module in embeddings)
        once = any(getattr(settings, "ensure_weight_tying", False) for settings in policy.peft_config.values())
        found["tied_adapter"] = _how_tied(copied, adapted, once)
    return found


def tied_adapter(values: Mapping[str, Any], tied: bool) -> str | None:
    """As ``adapter_facts``, from settings of TRL's ModelConfig, which leaves ``ensure_weight_tying`` off."""
    if not (tied and values.get("use_peft")):
        return None
    targets, saved = (values.get(f"lora_{name}") or () for name in ("target_modules", "modules_to_save"))
    return _how_tied(_an_embedding(saved), _an_embedding(targets), once=False)


def _an_embedding(names: str | Sequence[str]) -> bool:
    """Whether PEFT finds one under these names: a list of last parts, or a pattern of whole names."""
    if not isinstance(names, str):
        return any(name.split(".")[-1] in _EMBEDDINGS for name in names)
    try:
        return any(re.fullmatch(names, prefix + name) for name in _EMBEDDINGS for prefix in ("", "model."))
    except re.error as e:
        raise ValueError(f"{names!r} is no pattern: {e}") from e


def _how_tied(copied: bool, adapted: bool, once: bool) -> str | None:
    """``target_modules`` or ``modules_to_save``, where that unties the two sides; None where it doesn't."""
    return "target_modules" if adapted else "modules_to_save" if copied and not once else None
