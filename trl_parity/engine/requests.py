"""What was really asked of the engine: the requests of a batch, recorded as they go out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .cache_stats import CacheUse, block_usage, prefix_hits, server_use

__all__ = ["Request", "recorded_requests"]


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the engine as it was really made."""

    temperature: float | None
    params: Any = None  # vllm.SamplingParams of a colocated engine, the HTTP arguments of a server
    outputs: Any = None  # list of vllm.RequestOutput of a colocated engine, a server's answer for all ranks
    cache_use: CacheUse | None = None  # what it did to the engine's caches


@contextmanager
def recorded_requests(generation: Any) -> Iterator[list[Request]]:
    """The calls the engine gets inside the block, read from what is really sent to it."""
    colocated = generation.mode == "colocate"
    target = generation.llm if colocated else getattr(generation, "vllm_client", None)
    seen: list[Request] = []
    if target is None:  # not the process that talks to the server
        yield seen
        return
    generate, own = target.generate, target.__dict__.get("generate")

    def recording(*args: Any, **kwargs: Any) -> Any:
        with block_usage(target) if colocated else server_use(target) as use:
            out = generate(*args, **kwargs)
        if colocated:
            params = kwargs.get("sampling_params", args[1] if len(args) > 1 else None)
            first: Any = params[0] if isinstance(params, list) and params else params
            temperature = None if first is None else first.temperature
            if target.llm_engine.vllm_config.cache_config.enable_prefix_caching:
                use.cached, use.looked_up = prefix_hits(out)
            seen.append(Request(temperature, first, out, use))
        else:
            temperature = (kwargs.get("generation_kwargs") or {}).get("temperature", kwargs.get("temperature"))
            sent = {k: v for k, v in kwargs.items() if k not in ("prompts", "features")}
            seen.append(Request(None if temperature is None else float(temperature), sent, out, use))
        return out

    target.generate = recording
    try:
        yield seen
    finally:
        if own is None:
            del target.generate
        else:
            target.generate = own
