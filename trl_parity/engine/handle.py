"""The engine of a run: one handle for everybody who asks, and what a server was found to run with over time."""

from __future__ import annotations

import logging
import threading
from typing import Any

from .base import Engine, in_process
from .colocated import engine_of
from .http import NoAnswer
from .server import TIMEOUT, ServerEngine

__all__ = ["EngineHandle", "SettingsHistory"]

logger = logging.getLogger(__name__)


class EngineHandle:
    """The engine of one run, made when it is first asked for. Whoever asks gets the same.

    A server that can't be reached, refuses to tell its settings or let a request wait in vain is no engine until
    ``refreshed`` finds it telling them. One that does not even answer that in time is not asked again: a server that
    never answers costs a run one timeout, one that falls silent later one and a few seconds. Either is said once.

    ``absence``: why there is no engine, where there should be one.
    """

    def __init__(self, timeout: float = TIMEOUT):
        self._timeout, self._lock = timeout, threading.Lock()  # asynchronous training asks from a thread, too
        self._generation: Any = None
        self._engine: Engine | None = None
        self._given_up = False
        self.absence = ""

    def get(self, generation: Any) -> Engine | None:
        """The engine behind TRL's ``VLLMGeneration``; None on ranks that talk to no server, and without an answer."""
        with self._lock:
            if generation is not self._generation:
                self._open(generation)
            elif self._engine is not None and self._engine.failure is not None:
                self._absent(self._engine.failure)
            return None if self.absence else self._engine

    def refreshed(self, generation: Any) -> Engine | None:
        """As ``get``, with a server's settings read anew: one short request."""
        with self._lock:
            if generation is not self._generation:
                self._open(generation)
            elif not self._given_up:
                self._read()
            return None if self.absence else self._engine

    def _open(self, generation: Any) -> None:
        self._generation, self._engine = generation, None
        self._given_up, self.absence = False, ""
        if generation is None or generation.mode == "colocate":
            self._engine = engine_of(generation)
        else:
            self._read()

    def _read(self) -> None:
        client = getattr(self._generation, "vllm_client", None)
        try:
            if self._engine is not None:
                self._engine.refresh()
            elif client is not None:  # else: of a rank that talks to no server
                self._engine = ServerEngine(client, self._timeout)
            self.absence = ""
        except Exception as e:  # gone, silent, or without its development endpoints: who asks does without
            self._given_up = isinstance(e, NoAnswer)
            self._absent(e)

    def _absent(self, error: Exception) -> None:
        if str(error) != self.absence:
            end = ". It is not asked again in this run" if self._given_up else ""
            logger.warning("the vLLM server does not tell its settings: %s%s", error, end)
        self.absence = str(error)


class SettingsHistory:
    """What a server runs with, against what it ran with at the first look."""

    def __init__(self) -> None:
        self._first: dict[str, Any] | None = None
        self._instance = ""
        self._told = ""
        self.restarts = 0
        self.changes: dict[str, tuple[Any, Any]] = {}  # setting -> at the first look, now

    def compare(self, engine: Engine | None) -> None:
        """Say once what is not as it was. Nothing of an engine in this process, nor without one."""
        if engine is None or in_process(engine):
            return
        now = engine.everything()
        if self._first is None:
            self._first, self._instance = now, engine.instance
        if restarted := engine.instance != self._instance:
            self._instance, self.restarts = engine.instance, self.restarts + 1
        self.changes = {name: (was, now[name]) for name, was in self._first.items() if now[name] != was}
        text = "; ".join(f"{name} was {was}, is {value}" for name, (was, value) in self.changes.items())
        if restarted:
            logger.warning(
                "the vLLM server was restarted: until the next sync it serves the weights it was started with. %s.",
                f"Its settings changed: {text}" if text else "Its settings are the same",
            )
        elif text and text != self._told:
            logger.warning("the vLLM server's settings are not those the run began with: %s.", text)
        self._told = text

    def to_dict(self) -> dict[str, Any]:
        """For an incident's engine settings: JSON. Empty while nothing changed."""
        out: dict[str, Any] = {f"{name} at the start": was for name, (was, _) in self.changes.items()}
        return out | ({"restarts": self.restarts} if self.restarts else {})
