"""What was really asked of the engine: the requests of a batch, recorded as they go out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from .cache_stats import CacheUse, block_usage, prefix_hits, server_use
from .pictures import Pictures

__all__ = ["Request", "recorded_requests"]

logger = logging.getLogger(__name__)

_told: set[type] = set()  # kinds of failures


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the engine as it was really made."""

    temperature: float | None
    params: Any = None  # vllm.SamplingParams of a colocated engine, the HTTP arguments of a server
    outputs: Any = None  # list of vllm.RequestOutput of a colocated engine, a server's answer for all ranks
    cache_use: CacheUse | None = None  # what it did to the engine's caches
    # by prompt of a colocated engine, None for one of text alone; None: no prompt has any, or a server was asked
    pictures: Sequence[Pictures | None] | None = None


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
        use, watch = CacheUse(), ExitStack()
        with _beside():
            use = watch.enter_context(block_usage(target) if colocated else server_use(target))
        try:
            out = generate(*args, **kwargs)
        finally:
            with _beside():
                watch.close()
        with _beside():
            seen.append(_request(target, colocated, use, out, args, kwargs))
        return out

    target.generate = recording
    try:
        yield seen
    finally:
        if own is None:
            del target.generate
        else:
            target.generate = own


def _request(target: Any, colocated: bool, use: CacheUse, out: Any, args: Any, kwargs: Any) -> Request:
    if colocated:
        params = kwargs.get("sampling_params", args[1] if len(args) > 1 else None)
        first: Any = params[0] if isinstance(params, list) and params else params
        temperature = None if first is None else first.temperature
        if target.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            use.cached, use.looked_up = prefix_hits(out)
        prompts = kwargs.get("prompts", args[0] if args else None)
        return Request(temperature, first, out, use, _pictures(target, prompts))
    temperature = (kwargs.get("generation_kwargs") or {}).get("temperature", kwargs.get("temperature"))
    sent = {k: v for k, v in kwargs.items() if k not in ("prompts", "features")}
    return Request(None if temperature is None else float(temperature), sent, out, use)


def _pictures(llm: Any, prompts: Any) -> list[Pictures | None] | None:
    if not isinstance(prompts, list):
        return None
    found = [Pictures(llm, p) if isinstance(p, dict) and p.get("multi_modal_data") else None for p in prompts]
    return found if any(found) else None


@contextmanager
def _beside() -> Iterator[None]:
    """What fails in here is said once, and never reaches who generates."""
    try:
        yield
    except Exception as e:
        if type(e) not in _told:
            _told.add(type(e))
            logger.warning("the engine's requests could not be recorded: %s: %s", type(e).__name__, e)
