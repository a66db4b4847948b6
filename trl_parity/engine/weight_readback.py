"""What a colocated engine holds, in the trainer's own layout, read by running a weight sync backwards.

The trainer's tensors are handed one by one to the engine's own ``load_weights``, as TRL hands them, but no byte
reaches the engine: each write to one of its parameters is turned round, and what the engine holds there is copied
into a clone of the tensor at hand. So whatever the loader does on the way (renaming, packing q, k and v, splitting,
transposing) is undone without a name mapping of ours, and a tensor the loader takes no notice of shows as such. Where
it hands on other values of the same shape, what the engine holds is compared with the trainer's, not with them.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HeldTensor", "policy_tensors", "read_back"]

_WRAPPERS = ("_checkpoint_wrapped_module.", "modules_to_save.default.", "token_adapter.")


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """One of the trainer's tensors as the engine holds it."""

    name: str
    numel: int
    written: int  # elements the loader would have written: 0 when it takes no notice of the tensor
    differing: int  # of them, those that are not the trainer's rounded to the engine's dtype
    gap: float  # mean |trainer - engine| over what would have been written
    values: (
        torch.Tensor | None
    )  # the engine's, in the trainer's layout and dtype; None: equal, or not all could be read


class PolicyTensor(NamedTuple):
    """One of the policy's weights."""

    name: str  # as the engine knows it
    tensor: torch.Tensor  # whole, adapters merged in
    parameter: torch.nn.Parameter  # the model's own, perhaps a shard, without adapters
    trained: bool  # updates move it
    adapted: bool = False  # an adapter makes another tensor of the parameter


def policy_tensors(model: torch.nn.Module) -> Iterator[PolicyTensor]:
    """All the policy's weights, adapters merged in as PEFT merges them; nothing of the model is written.

    Names are those the engine knows: without PEFT's and checkpointing's prefixes. Gathering a sharded parameter is a
    collective; of a sharded layer only LoRA is merged. Raises ValueError for shards that can't be gathered one by one.
    """
    tuners: dict[str, Any] = {}
    if adapted := hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        tuners = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    merged: tuple[str, dict[str, torch.Tensor]] = ("", {})  # of one layer at a time
    for name, parameter in model.named_parameters():
        if adapted and ("original_module" in name or _of_adapters(name, str(model.prefix))):
            continue
        owner, _, leaf = name.partition(".base_layer.")
        layer = tuners.get(owner) if leaf else None
        tuned = layer is not None and not layer.disable_adapters
        if not tuned:
            whole, trained = _whole(parameter).detach(), parameter.requires_grad
        elif _is_shard(parameter):
            whole, trained, tuned = *_with_lora(layer, leaf, parameter), False
        else:
            if merged[0] != owner:
                merged = owner, _merged(layer)
            whole = merged[1][leaf.replace("base_layer.", "")].detach()
            # most adapters leave the bias as it is: that it is alike tells of no sync
            tuned = not leaf.endswith("bias") or parameter.requires_grad or not torch.equal(whole, parameter)
            trained = tuned
        if adapted:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        for part in _WRAPPERS:
            name = name.replace(part, "")
        yield PolicyTensor(name, whole, parameter, trained, tuned)


class LoraTensor(NamedTuple):
    """A linear layer's weight with plain LoRA on it."""

    name: str  # as the engine knows it
    layer: Any  # PEFT's
    parameter: torch.nn.Parameter  # (out, in), without adapters
    adapters: tuple[str, ...]

    @property
    def factors(self) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """(r, in), (out, r), scale of each adapter, as they are now."""
        layer = self.layer
        return [(layer.lora_A[n].weight, layer.lora_B[n].weight, float(layer.scaling[n])) for n in self.adapters]

    @property
    def in_place(self) -> bool:
        """Whether these adapters still make the weight from this parameter, and no merge has been left in it."""
        layer = self.layer
        same = layer.get_base_layer()._parameters.get("weight") is self.parameter
        active = tuple(n for n in layer.active_adapters if n in layer.lora_A)
        return same and active == self.adapters and not layer.merged and not layer.disable_adapters

    def elements(self, at: torch.Tensor) -> torch.Tensor:
        """Of the merged weight, at flat indices; rounded as a merge in place does."""
        row, column = at // self.parameter.shape[1], at % self.parameter.shape[1]
        values = self.parameter.detach().flatten()[at].float()
        for a, b, scale in self.factors:
            values = values + scale * (b.detach()[row].float() * a.detach()[:, column].T.float()).sum(1)
        return values.to(self.parameter.dtype)


def lora_tensors(policy: Any) -> list[LoraTensor]:
    """The weights of a PEFT model that plain LoRA adapts (no DoRA, no transposed layers); others are left out."""
    from peft.tuners.lora import Linear

    found = []
    for name, layer in policy.named_modules():
        # a subclass has quantized weights under it, of which no element can be taken
        plain = type(layer) is Linear and not layer.fan_in_fan_out and not getattr(layer, "lora_variant", None)
        base = layer.get_base_layer() if plain else None
        if base is None or _is_shard(base.weight):
            continue
        adapters = tuple(n for n in layer.active_adapters if n in layer.lora_A)
        name = f"{name.removeprefix('base_model.model.')}.weight"
        for part in _WRAPPERS:
            name = name.replace(part, "")
        if adapters and any(layer.lora_B[n].weight.requires_grad for n in adapters):
            found.append(LoraTensor(name, layer, base.weight, adapters))
    return found


def _of_adapters(name: str, prefix: str) -> bool:
    """Whether a parameter is an adapter's own."""
    return prefix in name or any(part.startswith(("ia3_", "trainable_tokens_")) for part in name.split("."))


def _merged(layer: Any) -> dict[str, torch.Tensor]:
    """The parameters under an adapter as PEFT's own merge makes them, on a copy of the layer without its hooks."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    hooks = [v for m in layer.modules() for k, v in vars(m).items() if k.endswith("_hooks") and isinstance(v, dict)]
    twin = copy.deepcopy(layer, {id(held): OrderedDict() for held in hooks})
    with torch.no_grad():
        for module in list(twin.modules()):
            if isinstance(module, BaseTunerLayer) and not module.disable_adapters and not module.merged:
                module.merge()
    base = twin.get_base_layer()
    return dict(base.named_parameters())


def _with_lora(layer: Any, leaf: str, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, bool]:
    whole, trained = _whole(parameter).detach(), parameter.requires_grad
    for adapter in layer.active_adapters if leaf == "weight" else ():
        if hasattr(layer, "lora_A") and adapter in layer.lora_A:
            whole, trained = whole + layer.get_delta_weight(adapter).detach().to(whole.dtype), True
    return whole, trained


def _is_shard(parameter: Any) -> bool:
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_status")


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_status"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.clone()
    if parameter.ndim == 1 and hasattr(parameter, "_is_flat_param"):
        raise ValueError("FSDP1's flat parameters can't be compared tensor by tensor. Use FSDP2.")
    return parameter


def read_back(
    load_weights: Callable[[Any], Any], engine_model: torch.nn.Module, named: Iterable[tuple[str, torch.Tensor]]
) -> list[HeldTensor]:
    """The engine's side of each of these tensors. Writes nothing to the engine, whatever its loader does.

    ``load_weights``: the engine model's, as a sync calls it.
    """
    held = []
    owned = {t.untyped_storage().data_ptr() for t in (*engine_model.parameters(), *engine_model.buffers())}
    for name, tensor in named:
        mirror = tensor.detach().clone()
        with _Backwards(owned, mirror) as seen:
            load_weights([(name, mirror)])
        values = mirror if seen.differing and seen.mirrored == mirror.numel() else None
        gap = seen.gap / seen.written if seen.written else 0.0
        held.append(HeldTensor(name, mirror.numel(), seen.written, seen.differing, gap, values))
    return held


class _Backwards(TorchDispatchMode):
    """Inside: a copy into one of the ``owned`` storages flows the other way, any other write to them is refused."""

    def __init__(self, owned: set[int], mirror: torch.Tensor):
        super().__init__()
        self._owned, self._whole, self._mirror = owned, mirror, mirror.untyped_storage().data_ptr()
        self.written = self.differing = self.mirrored = 0
        self.gap = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        writes = func._schema.is_mutable and func._schema.arguments[0].is_write
        if target is None or not writes or target.untyped_storage().data_ptr() not in self._owned:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            source = args[1]
            if self._is_other(source):
                source = self._whole
            ours = source.to(target.device, target.dtype).expand_as(target)
            self.written += target.numel()
            self.differing += int((ours != target).sum())
            self.gap += float((source.to(target.device).float() - target.float()).abs().sum())
            if source.untyped_storage().data_ptr() == self._mirror and source.shape == target.shape:
                source.copy_(target)
                self.mirrored += target.numel()
        elif func is torch.ops.aten.fill_.Scalar and target.numel() == 1:  # longer fills are padding
            self.written += 1
            self.differing += int(target != args[1])
        return target

    def _is_other(self, source: torch.Tensor) -> bool:
        """Whether the loader made other values of the tensor (rounded, scaled), not a copy or another order."""
        if source.untyped_storage().data_ptr() == self._mirror or source.shape != self._whole.shape:
            return False
        (a, b), (c, d) = (
            (float(x.double().abs().sum()), float(x.double().square().sum()))
            for x in (source, self._whole.to(source.dtype))
        )
        return not (math.isclose(a, c, rel_tol=1e-6) and math.isclose(b, d, rel_tol=1e-6))
