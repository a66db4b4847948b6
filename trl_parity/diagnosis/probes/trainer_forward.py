"""Probes that score the tokens in another forward pass of the policy."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...engine.base import in_process
from ...scoring.perturb import FP8_CACHES, config_differences, largest_dropout
from ..counterfactual import FEW, Scene, World
from .base import Candidate, NotPossible, Probe, mean, number, probe, redone, require_engine, with_variant

__all__ = ["PASSES"]


def repeat(scene: Scene, world: World) -> Candidate | None:
    """The trainer again, every layer in eval mode."""
    if world.variant is not None:
        return None
    again = redone(world)
    gap = scene.log_probs(again) - scene.as_scored
    gap = gap[torch.isfinite(gap)].abs()
    dropped = largest_dropout(scene.model)
    return Candidate(
        world=again,
        finding=f"a second pass in eval mode differs by {number(gap)} nats on average"
        + (f"; dropout {dropped:g} is on while the policy is scored" if dropped else ""),
        details={"dropout": dropped},
    )


def alone(scene: Scene, world: World) -> Candidate | None:
    """One sequence at a time, padded as before."""
    return _few(scene, world, "single", "in a pass of its own")


def unpadded(scene: Scene, world: World) -> Candidate | None:
    """One sequence at a time, without padding."""
    return _few(scene, world, "unpadded", "alone, its positions from 0, no padding")


def _few(scene: Scene, world: World, batch: str, words: str) -> Candidate:
    some = scene.row < FEW
    other = with_variant(world, batch=batch, few=True)
    return Candidate(
        world=replace(other, kept=world.kept & some),
        over=some,
        finding=f"{min(FEW, scene.sequences)} sequences, each {words}",
    )


def engine_config(scene: Scene, world: World) -> Candidate | None:
    """The trainer's weights in a model built anew from the engine's config."""
    require_engine(scene)
    if not in_process(scene.engine):
        raise NotPossible("a server does not tell the config of the model it built")
    if scene.sharded or hasattr(scene.model, "peft_config"):
        raise NotPossible("the policy is sharded or has adapters: no second model is built on its weights")
    changed = config_differences(scene.model.config, scene.engine.hf_config)
    words = ", ".join(f"{k}: trainer {a}, engine {b}" for k, (a, b) in sorted(changed.items()))
    return Candidate(
        world=with_variant(world, model="engine_config"),
        finding=f"configs differ in {words}"
        if changed
        else "both sides have one config, which the live trainer model does not follow if this explains the drift",
        details={"config": {k: [str(a), str(b)] for k, (a, b) in changed.items()}},
    )


def kv_cache(scene: Scene, world: World) -> Candidate | None:
    """The trainer attends to keys and values rounded as in the engine's cache."""
    require_engine(scene)
    if scene.engine is None:
        raise NotPossible("the engine's settings are not at hand on this rank, or the server does not tell them")
    name = scene.engine.settings()["kv_cache_dtype"]
    dtypes = FP8_CACHES | {"bfloat16": "bfloat16", "float16": "float16"}
    if name not in dtypes:
        return None
    dtype = getattr(torch, dtypes[name])
    ways = [False, True] if dtype == torch.float8_e5m2 else [False]
    worlds = [with_variant(world, kv_dtype=dtype, kv_truncated=way) for way in ways]
    best = min(worlds, key=lambda w: mean(scene, w))
    moved = float((scene.log_probs(best) - scene.log_probs(redone(world))).abs().mean())
    scene.notes["cache_moved"] = moved
    return Candidate(
        world=best,
        finding=f"kv_cache_dtype of the live engine is {name}; rounded alike, the trainer moves by {moved:.3g} nats",
        details={"kv_cache_dtype": name, "moved": moved},
    )


PASSES: tuple[Probe, ...] = (
    probe("repeat", "trainer_numerics", "repeat", repeat,
           "the trainer disagrees with itself", "a second pass, every layer in eval mode, agrees with the engine"),
    probe("alone", "trainer_numerics", "singles", alone,
           "the trainer's numbers depend on the batch", "one sequence at a time, it agrees"),
    probe("unpadded", "model_definition", "singles", unpadded,
           "padding or positions differ", "unpadded and alone, the trainer agrees"),
    probe("engine's config", "model_definition", "forward", engine_config,
           "the two sides run different models on one set of weights",
           "a model built from the engine's config on the trainer's weights agrees"),
    probe("cache precision", "kv_cache_precision", "forward", kv_cache,
           "the engine's KV cache is quantized", "with keys and values rounded alike, the trainer agrees"),
)  # fmt: skip
