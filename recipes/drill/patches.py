"""Small, reversible breaks of a live trainer and its engine. Each stands for a bug of real stacks."""

from __future__ import annotations

import contextlib
import math
import random
import re
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
    """Each of the run's requests gets ``SamplingParams.<name> = strength`` after TRL has made it.

    In life: a server lays the model's generation_config.json over requests that do not set the field.
    """

    def patch(trainer: Any, strength: Any) -> Any:
        llm = trainer.vllm_generation.llm
        real = llm.generate

        def generate(prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Any:
            if sampling_params is not None and not isinstance(sampling_params, list):  # a list: asked by a diagnosis
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


def soft_capped(logits: Any, cap: float) -> Any:
    """In life: a final soft cap (Gemma 2) that one side reads from the config and the other does not."""
    return cap * (logits / cap).tanh()


def tilted(logits: Any, most: float) -> Any:
    """A bias from -most to most over the vocabulary. In life: a logits processor that steers what is sampled."""
    import torch

    return logits + torch.linspace(-most, most, logits.shape[-1], dtype=logits.dtype)


def noisy(trainer: Any, size: float) -> Any:
    """Every call adds other noise to the logits. In life: kernels whose sums depend on what else is in the batch."""
    import torch

    generator = torch.Generator().manual_seed(5)  # the run's random numbers stay as they are
    add = lambda z, _: z + size * torch.randn(z.shape, generator=generator, dtype=z.dtype)  # noqa: E731
    return touch_logits(add)(trainer, size)


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


def short_prompts(trainer: Any, count: int) -> Any:
    """The engine reads prompts without their first tokens. In life: truncation on the left on one side only."""
    generation = trainer.vllm_generation
    real = generation.generate

    def generate(prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        _, *rest = real([list(ids)[count:] for ids in prompts], *args, **kwargs)
        return prompts, *rest

    return swapped(generation, "generate", generate)


def crossed(trainer: Any, share: float) -> Any:
    """Neighbouring sequences have each other's log-probs. In life: results of a queue, matched in another order."""
    generation, rng = trainer.vllm_generation, random.Random(0)
    real = generation.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        prompts, completions, logprobs, ids = real(*args, **kwargs)
        for i in range(0, len(logprobs) - 1, 2):
            n = min(len(logprobs[i]), len(logprobs[i + 1]))
            if rng.random() < share:
                logprobs[i][:n], logprobs[i + 1][:n] = logprobs[i + 1][:n], logprobs[i][:n]
        return prompts, completions, logprobs, ids

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


def touch_tensors(part: str, change: Callable[[Any, Any], Any]) -> Patch:
    """After each sync, the engine's tensors with ``part`` in their name are changed.

    In life: a loader that transposes, scales or rounds what it should copy, a rank that got another rank's shard.
    """

    def patch(trainer: Any, strength: Any) -> Any:
        generation = trainer.vllm_generation
        real = generation.sync_weights

        def sync() -> None:
            real()
            for name, tensor in engine_model(trainer).named_parameters():
                if part in name:
                    tensor.data.copy_(change(tensor.data, strength))

        return swapped(generation, "sync_weights", sync)

    return patch


def exchange_layers(trainer: Any, part: str) -> Any:
    """The loader takes tensors with ``part`` in their name of layer 0 for those of layer 1, and the other way round.

    In life: pipeline stages or expert ranks whose names are counted from different layers.
    """
    model = engine_model(trainer)
    real, other = model.load_weights, {"0": "1", "1": "0"}

    def load(weights: Any) -> Any:
        renamed = (
            (re.sub(r"layers\.([01])\.", lambda m: f"layers.{other[m[1]]}.", name) if part in name else name, tensor)
            for name, tensor in weights
        )
        return real(renamed)

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


@contextlib.contextmanager
def favoured_expert(trainer: Any, by: float) -> Iterator[None]:
    """The engine's routers favour expert 0. In life: a bias that balances experts, on one side."""
    with contextlib.ExitStack() as stack:
        for module in engine_model(trainer).modules():
            router = vars(module).get("router")
            if not hasattr(router, "select_experts"):
                continue

            def select_experts(
                hidden_states: Any, router_logits: Any, *args: Any, real: Any = router.select_experts, **kwargs: Any
            ) -> Any:
                router_logits = router_logits.clone()
                router_logits[:, 0] += by
                return real(hidden_states, router_logits, *args, **kwargs)

            stack.enter_context(swapped(router, "select_experts", select_experts))
        yield


@contextlib.contextmanager
def coarse_cache(trainer: Any, dtype: str) -> Iterator[None]:
    """Keys and values are rounded on their way into the engine's cache, whatever its settings say.

    In life: a connector that compresses the blocks it moves (offloading, disaggregated prefill) and gives them back.
    """
    import torch

    def rounding(real: Any) -> Any:
        def update(layer: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            narrow = getattr(torch, dtype)
            return real(layer, key.to(narrow).to(key.dtype), value.to(narrow).to(value.dtype), *args, **kwargs)

        return update

    with contextlib.ExitStack() as stack:
        for module in engine_model(trainer).modules():
            if hasattr(impl := getattr(module, "impl", None), "do_kv_cache_update"):
                stack.enter_context(swapped(impl, "do_kv_cache_update", rounding(impl.do_kv_cache_update)))
        yield


def numbers(owner: str, attribute: str) -> Patch:
    """A number that all modules of one side (``trainer`` or ``engine``) have under that name.

    In life: a default that one implementation has in its code and the other in its config.
    """

    @contextlib.contextmanager
    def patch(trainer: Any, value: Any) -> Iterator[None]:
        model = trainer.model if owner == "trainer" else engine_model(trainer)
        with contextlib.ExitStack() as stack:
            for module in model.modules():
                if attribute in vars(module):
                    stack.enter_context(swapped(module, attribute, value))
            yield

    return patch


@contextlib.contextmanager
def own_law(trainer: Any, factor: float) -> Iterator[None]:
    """Both models multiply their logits at the end of their forward pass, under a name that TRL's loss does not know.

    In life: a multiplier that a model has under a name of its own; TRL's fused head goes around the model's forward.
    """
    policy, model = trainer.accelerator.unwrap_model(trainer.model), engine_model(trainer)
    real, logits = policy.forward, model.compute_logits

    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        output = real(*args, fused_lm_head=fused_lm_head, **kwargs)
        if not fused_lm_head:
            output.logits = factor * output.logits
        return output

    with (
        swapped(policy, "forward", forward),
        swapped(model, "compute_logits", lambda *a, **k: factor * logits(*a, **k)),
    ):
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
