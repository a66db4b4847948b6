"""A model in another world: other tensors, another config, other rounding. Each undone at a block's end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = [
    "config_differences",
    "eval_mode",
    "largest_dropout",
    "own_random_numbers",
    "rebuilt",
    "rounding_noise",
    "swapped",
    "without_adapters",
]


def largest_dropout(model: Any) -> float:
    """The largest dropout of a layer in training mode: modules of torch, and the attention of transformers."""
    largest = 0.0
    for module in model.modules():
        if not module.training:
            continue
        if isinstance(module, torch.nn.Dropout):
            largest = max(largest, module.p)
        elif isinstance(p := getattr(module, "attention_dropout", 0.0), float):
            largest = max(largest, p)
    return largest


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
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """PEFT's layers compute what is under their adapters inside the block; nothing of gradients is touched."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m._disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every layer in eval mode inside the block, each back as it was after it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def rounding_noise(backbone: torch.nn.Module, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Round what every module of ``backbone`` takes in and puts out to ``dtype``, with a random last digit.

    The random numbers come from generators of their own.
    """
    half_ulp = torch.finfo(dtype).eps / 2
    generators: dict[torch.device, torch.Generator] = {}
    # a tensor handed on unchanged by the next module must not be rounded twice; held, so that no id is reused
    done: dict[int, torch.Tensor] = {}

    def noisy(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or id(x) in done:
            return x
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        e = torch.rand(x.shape, dtype=torch.float32, device=x.device, generator=generators[x.device])
        e.mul_(2.0).sub_(1.0).mul_(half_ulp).add_(1.0)
        y = e.mul_(x).to(dtype).to(x.dtype)
        if len(done) > 8:
            done.pop(next(iter(done)))
        done[id(y)] = y
        return y

    def before(module: Any, args: Any) -> Any:
        return (noisy(args[0]), *args[1:]) if args else None

    def after(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (noisy(output[0]), *output[1:])
        return noisy(output)

    handles = []
    for module in backbone.modules():
        leaf = next(module.children(), None) is None
        if leaf:
            handles.append(module.register_forward_pre_hook(before))
        if module is not backbone:
            handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """The random state of torch (CPU and this process's CUDA device), numpy and ``random`` is as before afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
