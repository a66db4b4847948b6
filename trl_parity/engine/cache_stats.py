"""How full an engine's KV cache gets and how much of the prompts it reads from its prefix cache, by vLLM's own counts.

A colocated engine's statistics need vLLM's stats logging, which it switches off and which writes to the log. What they
are made of is there all the same: each request's number of cached tokens, and the block pool's usage after each
scheduling. A server counts for ``/metrics``; there the difference between two readings is taken, around the run's own
requests, so that ours are not in it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from .http import ServerAPI

__all__ = ["CacheUse", "Counters", "block_usage", "prefix_hits", "server_counters", "server_use"]

logger = logging.getLogger(__name__)

TIMEOUT = 5.0  # seconds for a server's counters: they are not worth a wait

_EVERY = 0.25  # seconds between two looks at a server that generates

_untold: WeakSet[Any] = WeakSet()  # clients of servers that did not answer once


@dataclass(slots=True)
class CacheUse:
    """Of some requests. ``cached`` of ``looked_up`` prompt tokens were read from the prefix cache; 0 of 0: it is off.

    ``kv_usage``: the largest share of the KV cache's blocks that running requests held, 0 to 1; None: not known.
    """

    cached: float = 0.0
    looked_up: float = 0.0
    kv_usage: float | None = None


def prefix_hits(outputs: Any) -> tuple[int, int]:
    """Prompt tokens read from the prefix cache, and looked up, of finished ``vllm.RequestOutput``."""
    known = [o for o in outputs or () if getattr(o, "num_cached_tokens", None) is not None]
    return sum(o.num_cached_tokens for o in known), sum(len(o.prompt_token_ids) for o in known)


@contextmanager
def block_usage(llm: Any) -> Iterator[CacheUse]:
    """Inside the block ``kv_usage`` is the peak so far, read after each scheduling: some microseconds a step.

    An engine core in another process can't be looked at: None.
    """
    use = CacheUse()
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    scheduler: Any = getattr(core, "scheduler", None)
    manager: Any = getattr(scheduler, "kv_cache_manager", None)
    if scheduler is None or not hasattr(manager, "usage"):
        yield use
        return
    schedule, own = scheduler.schedule, scheduler.__dict__.get("schedule")
    use.kv_usage = 0.0

    def recorded(*args: Any, **kwargs: Any) -> Any:
        out = schedule(*args, **kwargs)
        with suppress(Exception):  # the engine is at work: it must not hear of it
            use.kv_usage = max(use.kv_usage or 0.0, float(manager.usage))
        return out

    scheduler.schedule = recorded
    try:
        yield use
    finally:
        if own is None:
            del scheduler.schedule
        else:
            scheduler.schedule = own


@dataclass(frozen=True, slots=True)
class Counters:
    """One reading of a server's ``/metrics``, over its engines: sums since its start, and the fullest KV cache."""

    hits: float
    queries: float
    kv_usage: float | None

    def since(self, before: Counters) -> CacheUse:
        """What happened between two readings. Counters that fell: the server was restarted, and began at 0."""
        if self.queries < before.queries or self.hits < before.hits:
            return CacheUse(self.hits, self.queries, self.kv_usage)
        return CacheUse(self.hits - before.hits, self.queries - before.queries, self.kv_usage)


def server_counters(client: Any, timeout: float = TIMEOUT) -> Counters | None:
    """The counters of the server behind TRL's client. None where it does not tell: said once, and not asked again."""
    if client in _untold:
        return None
    try:
        return _parsed(ServerAPI(client.base_url, timeout).text("get", "/metrics"))
    except (ConnectionError, RuntimeError, ValueError) as e:
        _untold.add(client)
        logger.warning("the vLLM server does not tell its counters (parity/engine/*): %s: %s", type(e).__name__, e)
        return None


def _parsed(text: str) -> Counters:
    """Prometheus' text format: ``name{labels} value``."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        if line.startswith("vllm:"):
            name, value = line.split("{", 1)[0].split(" ", 1)[0], line.rsplit(" ", 1)[1]
            found.setdefault(name.removesuffix("_total"), []).append(float(value))
    hits, queries = found.get("vllm:prefix_cache_hits"), found.get("vllm:prefix_cache_queries")
    if hits is None or queries is None:
        raise ValueError("no vllm:prefix_cache_hits among its metrics. Expected a vLLM server with statistics on")
    return Counters(sum(hits), sum(queries), max(found.get("vllm:kv_cache_usage_perc", []), default=None))


@contextmanager
def server_use(client: Any) -> Iterator[CacheUse]:
    """After the block: what the server did in it, its KV usage sampled beside the requests."""
    use, before = CacheUse(), server_counters(client)
    if before is None:
        yield use
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(_EVERY):
            if (now := server_counters(client)) is not None and now.kv_usage is not None:
                use.kv_usage = max(use.kv_usage or 0.0, now.kv_usage)

    thread = threading.Thread(target=look, name="trl-parity-counters", daemon=True)
    thread.start()
    try:
        yield use
    finally:
        over.set()
        thread.join(TIMEOUT)
        if (now := server_counters(client)) is not None:
            done = now.since(before)
            use.cached, use.looked_up = done.cached, done.looked_up
