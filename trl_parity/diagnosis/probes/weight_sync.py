"""Probes of the engine's weights against the trainer's."""

from __future__ import annotations

import functools

import torch

from ...engine.base import in_process
from ...engine.weight_readback import PolicyTensor, policy_tensors, read_back
from ..counterfactual import Scene, World
from .base import Candidate, NotPossible, Probe, dtype_name, probe, require_engine, with_variant

__all__ = ["WEIGHTS"]

_FP8 = 256  # values at most that an 8-bit number has

_ARRIVED = 20  # elements that would differ, had a tensor not arrived, from which on "none does" means it did


def engine_weights(scene: Scene, world: World) -> Candidate | None:
    """The trainer scores with the weights the engine holds, read tensor by tensor."""
    require_engine(scene)
    if not in_process(scene.engine):
        raise NotPossible("a server does not hand out its weights")
    named = list(policy_tensors(scene.model))
    model = scene.engine.model
    held = read_back(model.load_weights, model, ((t.name, t.tensor) for t in named))
    deaf = {h.name for h in held if not h.written}  # to the loader as it is now; the class's own may know them
    known = read_back(
        functools.partial(type(model).load_weights, model),
        model,
        ((t.name, t.tensor) for t in named if t.name in deaf),
    )
    held = [h for h in held if h.written] + known
    by_name = {t.name: t for t in named}
    trained = [h for h in held if by_name[h.name].trained]
    differing = [h for h in held if h.differing]
    ignored = [h for h in trained if h.name in deaf]
    scene.engine_values = {h.name: _swap(by_name[h.name], h.values) for h in differing if h.values is not None}
    if not differing:
        if ignored:
            scene.notes["ignored"] = [h.name for h in ignored]
        return None
    wide = [h for h in differing if h.numel >= 1024] or differing
    rate = sum(h.differing for h in wide) / sum(h.written for h in wide)
    arrived = [h for h in trained if h.written and not h.differing and 0.25 * rate * h.numel >= _ARRIVED]
    partial = bool(arrived) or 0 < len(ignored) < len(trained)
    missing = [*ignored, *(h for h in differing if h.name not in deaf)]
    words = f"{len(differing)} of {len(held)} tensors are not the trainer's in the engine's {_dtype(scene)}"
    coarse = all(_is_coarse(h.values, by_name[h.name].tensor) for h in wide)
    if coarse:
        words += f" but rounded to {_FP8} values at most"
    if arrived:
        words += f", {len(arrived)} arrived"
    if ignored:
        words += f", {len(ignored)} are ignored by its load_weights"
    if partial and not coarse:
        words += ": " + ", ".join(h.name for h in missing[:8]) + (" …" if len(missing) > 8 else "")
    if scene.sharded or len(scene.engine_values) < len(differing):
        raise NotPossible(f"{words}; the policy's weights can't be swapped here to see what that does")
    return Candidate(
        world=with_variant(world, weights="engine"),
        cause="kv_cache_precision" if coarse else "partial_sync" if partial else "stale_weights",
        finding=words,
        details={
            "tensors": {h.name: {"differing": h.differing / max(1, h.written), "gap": h.gap} for h in differing},
            "ignored": [h.name for h in ignored],
            "arrived": len(arrived),
        },
    )


def _is_coarse(held: torch.Tensor | None, ours: torch.Tensor) -> bool:
    """Whether the engine's side has no more values than 8 bits hold, where the trainer's has many more."""
    if held is None:
        return False
    some, all_ = (x.flatten()[: 16 * _FP8].unique().numel() for x in (held, ours))
    return some <= _FP8 < all_ // 2


def _swap(ours: PolicyTensor, held: torch.Tensor) -> tuple[torch.nn.Parameter, torch.Tensor]:
    """What a parameter has to be for the policy to hold what the engine does: adapters go on being added to it."""
    if ours.parameter.shape != held.shape:  # a shard, which is not swapped
        return ours.parameter, held
    return ours.parameter, held - (ours.tensor - ours.parameter.detach())


def rounded_weights(scene: Scene, world: World) -> Candidate | None:
    """The trainer scores with its own weights rounded to the engine's dtype."""
    require_engine(scene)
    if scene.sharded:
        raise NotPossible("the policy is sharded: its weights can't be swapped here")
    dtype = scene.engine.dtype if scene.engine is not None else torch.bfloat16
    finer = [p for p in scene.model.parameters() if p.is_floating_point() and _bits(p.dtype) > _bits(dtype)]
    if not finer:
        return None
    return Candidate(
        world=with_variant(world, weights="rounded"),
        finding=f"{len(finer)} tensors are {dtype_name(finer[0].dtype)} here and {dtype_name(dtype)} in the engine",
    )


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _dtype(scene: Scene) -> str:
    return "dtype" if scene.engine is None else dtype_name(scene.engine.dtype)


WEIGHTS: tuple[Probe, ...] = (
    probe("engine's weights", "stale_weights", "weights", engine_weights,
           "the engine holds other weights", "with the weights it holds, the trainer agrees"),
    probe("rounded weights", "dtype_gap", "weights", rounded_weights,
           "the trainer's weights are finer than the engine's", "rounded to its dtype, they agree"),
)  # fmt: skip
