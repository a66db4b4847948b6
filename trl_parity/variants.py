"""A model in another world: other tensors, another config, a coarser key-value cache. Each undone at a block's end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .engine.live import own_random_numbers

__all__ = ["config_differences", "rebuilt", "rounded_cache", "swapped"]


_NOT_THE_MODEL = {
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "head_dtype",
    "_attn_implementation", "_attn_implementation_internal", "return_dict", "output_attentions",
    "output_hidden_states", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    "is_encoder_decoder", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def config_differences(ours: Any, theirs: Any) -> dict[str, list[Any]]:
    """What two transformers configs say of the model's function and not alike: name to [ours, theirs]."""
    one, other = ({k: v for k, v in c.to_dict().items() if k not in _NOT_THE_MODEL} for c in (ours, theirs))
    return {k: [one.get(k), other.get(k)] for k in one.keys() | other.keys() if one.get(k) != other.get(k)}


def rebuilt(own: Any, hf_config: Any) -> Any:
    """The class of ``own``, a causal language model, on another config of its kind; parameters are shared."""
    from accelerate import init_empty_weights

    config = type(own.config).from_dict(hf_config.to_dict())
    config._attn_implementation = own.config._attn_implementation
    with own_random_numbers(), init_empty_weights(include_buffers=False):
        model = type(own)(config)
    for name, parameter in own.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
    model.tie_weights()
    device = next(own.parameters()).device
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


@contextmanager
def swapped(values: Mapping[torch.nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Parameters point at other data inside the block."""
    own = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data


@contextmanager
def rounded_cache(backbone: torch.nn.Module, dtype: torch.dtype, truncated: bool) -> Iterator[None]:
    """Attention reads keys and values rounded to ``dtype``, as from a cache of that dtype with scale 1."""
    from transformers import DynamicCache

    largest = torch.finfo(dtype).max

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if truncated:
            return (x.half().view(torch.int16) & ~0xFF).view(torch.half).to(x.dtype)
        return x.clamp(-largest, largest).to(dtype).to(x.dtype)

    class Rounding(DynamicCache):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"past_key_values": Rounding(), "use_cache": True}

    handle = backbone.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
