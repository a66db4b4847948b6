"""From a model to its LM head: whole weights, the architecture's constants, and what PEFT has put around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import InterceptionError
from .head_spec import Head
from .perturb import eval_mode

__all__ = ["backbone_of", "causal_lm", "materialized_head"]


def causal_lm(model: Any) -> Any:
    """The model that owns backbone and head, without PEFT around it (its adapters stay active inside)."""
    # asked of the class: a module that lacks an attribute is slow to say so
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


def backbone_of(model: Any) -> Any:
    """The module of a causal language model whose output are the hidden states that its head takes.

    Its ``base_model``; where the class has another name there than the module (Llama4ForCausalLM, Mllama), the model
    that is its child. Raises InterceptionError where there is none.
    """
    lm = causal_lm(model)
    if lm.base_model is not lm:
        return lm.base_model
    inner = next((child for child in lm.children() if hasattr(child, "base_model")), None)
    if inner is None:
        raise InterceptionError(
            f"{type(lm).__name__} has no model inside that gives hidden states: its base_model_prefix is "
            f"{lm.base_model_prefix!r} and none of {', '.join(name for name, _ in lm.named_children())} is a "
            "transformers model. Expected one, with the LM head beside it."
        )
    return inner


def _logit_scale(config: Any) -> float:
    """What the architecture multiplies logits by, before any soft cap (transformers' config names)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


_constants: WeakKeyDictionary[Any, tuple[float, float | None, int]] = WeakKeyDictionary()


def _logit_constants(lm: Any) -> tuple[float, float | None, int]:
    """Logit scale, soft cap, vocabulary size; read once a model (a config's attribute look-ups are slow)."""
    if lm not in _constants:
        config = lm.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        _constants[lm] = (_logit_scale(config), None if softcap is None else float(softcap), int(config.vocab_size))
    return _constants[lm]


@contextmanager
def materialized_head(
    model: torch.nn.Module, temperature: float, logits_dtype: torch.dtype | None = None
) -> Iterator[Head]:
    """The head of ``model`` with whole weights, for the duration of the block.

    Sharded weights are gathered: FSDP2 DTensors and DeepSpeed ZeRO-3 parameters. A collective there: every rank must
    enter. Plain LoRA on the head is added as a low-rank term with the active adapters' scaling; a head that is more
    than a matrix (DoRA, VeRA, OFT, IA3, a module of the model's own) makes the logits itself, in fp32.

    Raises ValueError for a model without a head, InterceptionError where such a head can't be used in fp32.
    """
    lm = causal_lm(model)
    scale, softcap, vocab_size = _logit_constants(lm)
    module = lm.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"{type(lm).__name__} has no output embeddings. Expected a causal language model with an lm_head."
        )
    module = _in_use(module)
    adapters = _plain_lora(module)
    tensors: dict[str, Any] = (
        {} if adapters is not None else dict(chain(module.named_parameters(), module.named_buffers()))
    )
    low_rank = [
        (module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]) for name in adapters or ()
    ]
    params = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    params += [p for a, b, _ in low_rank for p in (a, b)]
    if tensors and any(hasattr(p, "full_tensor") or hasattr(p, "ds_status") for p in tensors.values()):
        raise _unusable(module, "its weights are spread over ranks")
    with _zero3_gathered(params):

        def whole(p: Any) -> Any:
            return p.full_tensor() if hasattr(p, "full_tensor") else p

        bias = getattr(module, "bias", None)
        weight = whole(module.weight)
        yield Head(
            weight=weight,
            bias=None if bias is None else whole(bias),
            temperature=temperature,
            logit_scale=scale,
            softcap=softcap,
            vocab_size=min(vocab_size, weight.shape[0]),
            low_rank=tuple((whole(a), whole(b), float(s)) for a, b, s in low_rank),
            logits_dtype=logits_dtype,
            module=_in_fp32(module, tensors) if tensors else None,
        )


def _in_use(module: Any) -> Any:
    """What PEFT's wrappers send hidden states through: a trained copy, or the base where adapters are off."""
    while True:
        if "modules_to_save" in module._modules:
            names = [] if module.disable_adapters else module.active_adapters
            saved = module.modules_to_save
            module = saved[names[0]] if names and all(name in saved for name in names) else module.original_module
        elif "base_layer" in module._modules and (module.disable_adapters or module.merged):
            module = module.base_layer
        else:
            return module


def _plain_lora(module: Any) -> list[str] | None:
    """The adapters of a head that is a matrix and low-rank terms; None: it is more than that."""
    forward = torch.nn.Linear.forward
    if type(module).forward is forward:
        return []
    if not (type(module).__module__.startswith("peft.tuners.lora") and type(module.base_layer).forward is forward):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    variants = {*getattr(module, "lora_variant", ()), *(n for n, on in module.use_dora.items() if on)}
    plain = all(type(module.lora_A[n]).forward is forward and module.lora_B[n].bias is None for n in names)
    return names if plain and not variants.intersection(names) else None


def _in_fp32(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden states (n, H) to the module's own logits (n, V), everything in fp32 and without dropout."""
    exact = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        try:
            with eval_mode(module):
                return torch.func.functional_call(module, exact, (hidden.float(),))
        except Exception as e:
            raise _unusable(module, f"{type(e).__name__}: {e}") from e

    return logits


def _unusable(module: Any, why: str) -> InterceptionError:
    return InterceptionError(
        f"the LM head is a {type(module).__module__}.{type(module).__qualname__}, which is more than a matrix, and "
        f"its logits can't be had in fp32 ({why}). Expected a linear layer, alone or with plain LoRA. Leave lm_head "
        "out of the adapter's target_modules."
    )


def _zero3_gathered(params: list[Any]) -> AbstractContextManager[Any]:
    sharded = {id(p): p for p in params if hasattr(p, "ds_status") and p.ds_status.name != "AVAILABLE"}
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(sharded.values()))
