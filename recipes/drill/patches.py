"""Small, reversible breaks of a live trainer and its engine. Each stands for a bug of real stacks."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

Patch = Callable[[Any, Any], contextlib.AbstractContextManager[None]]  # (trainer, strength)


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside the block."""
    own = name in vars(owner)
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, real)
        else:
            delattr(owner, name)


def engine_model(trainer: Any) -> Any:
    """The engine's copy of the policy."""
    return trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model


# ---- what the engine samples from ---------------------------------------------------------------------------------


def hidden(name: str) -> Patch:
    """Every request gets ``SamplingParams.<name> = strength`` after TRL has made it.

    In life: a server lays the model's generation_config.json over requests that do not set the field.
    """

    def patch(trainer: Any, strength: Any) -> Any:
        llm = trainer.vllm_generation.llm
        real = llm.generate

        def generate(prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Any:
            if sampling_params is not None:
                sampling_params = sampling_params.clone()
                setattr(sampling_params, name, strength)
            return real(prompts, sampling_params=sampling_params, **kwargs)

        return swapped(llm, "generate", generate)

    return patch


def touch_logits(change: Callable[[Any, Any], Any]) -> Patch:
    """A patch of the logits the engine computes, before anything is done to them."""

    def patch(trainer: Any, strength: Any) -> Any:
        model = engine_model(trainer)
        real = model.compute_logits
        return swapped(model, "compute_logits", lambda *a, **k: change(real(*a, **k), strength))

    return patch


def scale(logits: Any, factor: float) -> Any:
    """In life: a logit_scale (Cohere, Granite) or a muP multiplier that one side applies twice or not at all."""
    return logits * factor


def rounded(logits: Any, dtype: str) -> Any:
    """In life: a model in float32 whose lm_head is left in half precision to save its memory."""
    import torch

    return logits.to(getattr(torch, dtype)).to(logits.dtype)


# ---- what is handed over ------------------------------------------------------------------------------------------


def touch_logprobs(change: Callable[[list, Any, random.Random], list]) -> Patch:
    """A patch of what the engine hands over: per sequence, its list of one-element log-prob lists."""

    def patch(trainer: Any, strength: Any) -> Any:
        generation, rng = trainer.vllm_generation, random.Random(0)
        real = generation.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            prompts, completions, logprobs, ids = real(*args, **kwargs)
            return prompts, completions, [change(row, strength, rng) for row in logprobs], ids

        return swapped(generation, "generate", generate)

    return patch


def shift(row: list, share: float, rng: random.Random) -> list:
    """Log-probs one place late, in a share of sequences. In life: an off-by-one where a stop token is cut or added."""
    return [row[0], *row[:-1]] if rng.random() < share else row


def spoil(row: list, share: float, rng: random.Random) -> list:
    """NaN in a share of tokens. In life: logits that overflow, a token outside the top log-probs a server returns."""
    return [[math.nan] if rng.random() < share else value for value in row]


def extra_bos(trainer: Any, count: int) -> Any:
    """The engine reads ``count`` tokens before each prompt that the trainer never sees.

    In life: a chat template writes a BOS and the tokenizer in front of the engine adds one more.
    """
    generation, tokenizer = trainer.vllm_generation, trainer.processing_class
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    real = generation.generate

    def generate(prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        longer = [[token] * count + list(ids) for ids in prompts]
        _, *rest = real(longer, *args, **kwargs)
        return prompts, *rest

    return swapped(generation, "generate", generate)


# ---- what weights the engine holds --------------------------------------------------------------------------------


def lose_sync(trainer: Any, _: Any) -> Any:
    """The first sync arrives, later ones are lost. In life: an update whose error is caught, a dead NCCL group."""
    generation, arrived = trainer.vllm_generation, False
    real = generation.sync_weights

    def sync() -> None:
        nonlocal arrived
        if not arrived:
            real()
        arrived = True

    return swapped(generation, "sync_weights", sync)


def lose_tensors(trainer: Any, part: str) -> Any:
    """Tensors whose name has ``part`` in it never reach the engine again after the first sync.

    In life: names that the engine's loader does not know (a wrapper's prefix, a fused layer) are passed over.
    """
    model = engine_model(trainer)
    real = model.load_weights
    left = len(list(trainer.model.named_parameters()))  # of the first sync: one call a tensor

    def load(weights: Any) -> Any:
        nonlocal left
        left -= 1
        return real((name, tensor) for name, tensor in weights if left >= 0 or part not in name)

    return swapped(model, "load_weights", load)


@contextlib.contextmanager
def keep_cache(trainer: Any, _: Any) -> Iterator[None]:
    """The engine can't reset its prefix cache (blocks are held), and says so in a bool that nobody reads."""
    llm = trainer.vllm_generation.llm
    llm.reset_prefix_cache()  # nothing left of a run before
    with swapped(llm, "reset_prefix_cache", lambda *a, **k: False):
        yield


@contextlib.contextmanager
def update_in_flight(trainer: Any, _: Any) -> Iterator[None]:
    """After the first sync, weights arrive when half of a batch's tokens are generated.

    In life: asynchronous training pushes weights into an engine that is not drained.
    """
    generation = trainer.vllm_generation
    engine = generation.llm.llm_engine
    sync, generate, step = generation.sync_weights, generation.generate, engine.step
    syncs, due, steps, half = 0, False, 0, math.inf

    def postpone() -> None:
        nonlocal syncs, due
        syncs += 1
        if syncs == 1:
            sync()
        else:
            due = True

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps, due
        steps += 1
        if due and steps > half:
            due = False
            sync()
        return step(*args, **kwargs)

    def batch(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps, half
        steps = 0
        out = generate(*args, **kwargs)
        lengths = [len(ids) for ids in out[1]]
        half = sum(lengths) / len(lengths) / 2  # one token a step of each sequence
        return out

    with (
        swapped(generation, "sync_weights", postpone),
        swapped(generation, "generate", batch),
        swapped(engine, "step", counted),
    ):
        yield


# ---- what the engine keeps beside its weights ---------------------------------------------------------------------


@contextlib.contextmanager
def other_table(trainer: Any, position: int) -> Iterator[None]:
    """From a position on, the engine's rotary table is that of the position before.

    In life: a table built for fewer positions and filled up, or one that sleep and wake did not bring back whole.
    """
    tables = {m.cos_sin_cache.data_ptr(): m.cos_sin_cache for m in engine_model(trainer).modules()
              if hasattr(m, "cos_sin_cache")}  # fmt: skip
    before = {key: table.clone() for key, table in tables.items()}
    for table in tables.values():
        table[position:] = table[position - 1 : -1].clone()
    try:
        yield
    finally:
        for key, table in tables.items():
            table.copy_(before[key])


@contextlib.contextmanager
def other_scale(trainer: Any, factor: float) -> Iterator[None]:
    """In life: a query scale that is in the weights already, or a multiplier one implementation leaves out."""
    with contextlib.ExitStack() as stack:
        for module in engine_model(trainer).modules():
            if hasattr(getattr(module, "impl", None), "scale"):
                stack.enter_context(swapped(module.impl, "scale", module.impl.scale * factor))
        yield


# ---- how the trainer scores ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def dropout(trainer: Any, p: float) -> Iterator[None]:
    """In life: dropout in the model's config is left on, and in train mode the trainer scores with it."""
    with contextlib.ExitStack() as stack:
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                stack.enter_context(swapped(module, "attention_dropout", p))
        yield


@contextlib.contextmanager
def other_rope(trainer: Any, factor: float) -> Iterator[None]:
    """The trainer rotates positions by another frequency. In life: rope scaling that only one side implements."""
    modules = [module for module in trainer.model.modules() if hasattr(module, "inv_freq")]
    for module in modules:
        module.inv_freq.mul_(factor)
    try:
        yield
    finally:
        for module in modules:
            module.inv_freq.div_(factor)
