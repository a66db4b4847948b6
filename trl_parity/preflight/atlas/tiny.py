"""A tiny random model of each causal language model class that transformers has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["VOCABULARY", "classes", "tiny_models"]

VOCABULARY = 96

_MOST_PARAMETERS = 20_000_000

_STD = 0.1  # of the matrices: layers, and the head, matter

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "first_k_dense_replace": 1, "ffn_dim": 128, "word_embed_proj_dim": 128, "embedding_size": 128,
    "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_ffn_dim": 128, "encoder_ffn_dim": 128, "d_model": 128, "state_size": 8, "num_heads": 4, "n_groups": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8, "sliding_window": 16, "rotary_dim": 16,
}  # fmt: skip

# also where the class leaves it open, to be told by the checkpoint
_OPEN = ("head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")

_BASE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip

# what is left as the class has it, one after the other, until it can be built and run
_LEFT = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
    tuple(name for name in _SMALL if name not in _BASE),
    tuple(name for name in _SMALL if name not in (*_BASE, "num_key_value_heads")),
)


def classes() -> Iterator[tuple[str, type, type]]:
    """Model type, model class and config class of every causal language model that transformers has."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as KNOWN

    seen = set()
    for config_kind in KNOWN:
        kinds = KNOWN[config_kind]
        for kind in kinds if isinstance(kinds, tuple | list) else (kinds,):
            if inspect.isclass(kind) and (config_kind.model_type, kind) not in seen:  # some are listed twice
                seen.add((config_kind.model_type, kind))
                yield config_kind.model_type, kind, config_kind


def tiny_models(kind: type, config_kind: type) -> Iterator[Any]:
    """Tiny models of a class in fp32 and eval mode, by other numbers each; the error where one can't be built."""
    for left in _LEFT:
        try:
            yield _built(kind, _config(config_kind, left))
        except Exception as e:
            yield e


def _config(kind: type, left: tuple[str, ...]) -> Any:
    """A config of this class made of small numbers, and so that of its text model."""
    default = kind()
    text = default.get_text_config(decoder=True)
    if any(getattr(default, name, None) is text for name in default.sub_configs):
        return kind(text_config=_small(text, left))
    return kind(**_small(default, left))


def _small(config: Any, left: tuple[str, ...]) -> dict[str, Any]:
    """The small numbers that it has under these names, and a layer of each of two kinds where it lists them."""
    found = {}
    for name, value in _SMALL.items():
        try:
            old = getattr(config, name, None)
        except Exception:  # one that differs by layer
            continue
        open_ = hasattr(config, name) and old is None and (name in _OPEN or name.endswith("_token_id"))
        if name not in left and (isinstance(old, int) or open_):
            found[name] = value
    kinds = getattr(config, "layer_types", None)
    two = [*dict.fromkeys(kinds)][:2] if isinstance(kinds, list) else []
    return found | ({"layer_types": two} if len(two) > 1 else {})


def _built(kind: type, config: Any) -> Any:
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters, whatever is made small here")
    torch.manual_seed(0)
    model = kind(config).float().eval()
    for path, p in model.named_parameters():
        if p.ndim >= 2 and "norm" not in path:
            torch.nn.init.normal_(p, std=_STD)
    return model
