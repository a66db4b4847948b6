"""What is remembered of an AsyncGRPOTrainer: where each sample comes from, and the probe that is under way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ..engine.cache_stats import CacheUse, Counters, server_counters
from ..records import RolloutBatch
from .async_probe import Answer, Client, Probe, sampled_now, sampling_settings
from .instrumentation import Observer

__all__ = ["AsyncRun", "Origin", "RememberingQueue"]

_RUN = "_trl_parity_run"


@dataclass(frozen=True, slots=True)
class Origin:
    """Of one sample. ``step``: optimizer steps of the weights it was begun with; -1: no sync made that version.

    ``in_flight``: 1 when it was queued after the next sync began, so that its later tokens may come from newer
    weights (an upper bound: scoring takes time too, and the server tells no version with its answers); -1: not known.
    """

    step: int
    in_flight: int


@dataclass(slots=True)
class AsyncRun:
    """What is remembered of a trainer. Versions, samples and the probe itself: on the main process."""

    trainer: Any
    synced: dict[int, tuple[int, float]] = field(default_factory=dict)  # version: optimizer steps, start of the sync
    latest: RolloutBatch | None = None  # contexts for the next probe
    due: bool = False  # a probe was begun and not collected; the same on every rank
    probe: Probe | None = None
    clock: float = field(default_factory=time.perf_counter)
    generation: Any = None  # what stands for TRL's VLLMGeneration
    counters: Counters | None = None  # of the server, at the last batch

    def __post_init__(self) -> None:
        main = self.trainer.accelerator.is_main_process
        self.synced[self.trainer.model_version] = int(self.trainer.state.global_step), 0.0
        self.generation = SimpleNamespace(
            mode="server", logprobs=0, vllm_client=Client(self.trainer) if main else None
        )

    @classmethod
    def of(cls, trainer: Any) -> AsyncRun:
        """The trainer's."""
        if not hasattr(trainer, _RUN):
            setattr(trainer, _RUN, cls(trainer))
        run: AsyncRun = getattr(trainer, _RUN)
        return run

    def origin(self, sample: Any) -> Origin:
        """Of a sample off the queue."""
        if sample.model_version not in self.synced:
            return Origin(-1, -1)
        step, _ = self.synced[sample.model_version]
        if sample.enqueued_at is None:
            return Origin(step, -1)
        after = self.synced.get(sample.model_version + 1)
        return Origin(step, int(after is not None and sample.enqueued_at > after[1]))

    def cache_use(self) -> CacheUse | None:
        """What the server did since the last call, our probes' part included; None on other ranks than main's."""
        client = self.generation.vllm_client
        now = None if client is None else server_counters(client)
        before, self.counters = self.counters, now
        return None if now is None or before is None else now.since(before)

    def on_sync(self, observer: Observer, began: float) -> None:
        """Both sides hold the same weights now."""
        trainer = self.trainer
        tokens = observer.measurement.probe_tokens
        self.due = tokens > 0
        if trainer.accelerator.is_main_process:
            self.synced[trainer.model_version] = int(trainer.state.global_step), began
            self.probe = None
            if self.due and self.latest is not None:
                settings, version = sampling_settings(trainer), trainer.model_version
                handle, latest = observer.engine_handle, self.latest
                self.probe = Probe(lambda: sampled_now(handle, self.generation, settings, latest, tokens, version))

    def collect(self) -> Answer | None:
        """The answer to the probe since the last sync; None without one. A collective: all ranks get the same."""
        if not self.due:
            return None
        self.due = False
        answers = [None if self.probe is None else self.probe.answer()]
        if self.trainer.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(answers, from_process=0)
        return answers[0]


class RememberingQueue:
    """The trainer's queue of samples, which remembers the one handed out last."""

    def __init__(self, queue: Any, run: AsyncRun):
        self._queue, self.run = queue, run
        self.last: Any = None

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's."""
        self.last = self._queue.get(*args, **kwargs)
        return self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)
