"""What a server is asked right after a weight sync of asynchronous training, when both sides hold the same weights.

It samples a few continuations with the run's own settings: honesty and entropy drift hold only for tokens drawn from
the law that is looked at, so that scoring old tokens again would not do. Private names used of TRL 1.16:
AsyncGRPOTrainer's ``_lora_sync``, ``_lora_name``; AsyncRolloutWorker's ``_loop_kwargs``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.handle import EngineHandle
from ..engine.server import ServerEngine
from ..records import RolloutBatch, SamplingSettings

__all__ = ["Answer", "Client", "Probe", "sampled_now", "sampling_settings"]

_PROBES = 16  # sequences of a probe: intervals of honesty and entropy drift are over sequences


def sampling_settings(trainer: Any) -> SamplingSettings:
    """What the worker asks the engine for; where it is not at hand (other ranks, other workers), the arguments."""
    from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

    worker = trainer.rollout_worker
    sent = worker._loop_kwargs if isinstance(worker, AsyncRolloutWorker) else vars(trainer.args)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values: dict[str, Any] = {name: 0.0 if sent[name] is None else sent[name] for name in names}
    return SamplingSettings(**values)


class Client:
    """TRL's VLLMClient of asynchronous training, with what ``ServerEngine`` needs."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._base = str(trainer.accelerator.unwrap_model(trainer.model).config._name_or_path)

    @property
    def base_url(self) -> str:
        """Of the server."""
        return str(self._trainer.vllm_client.server_url)

    @property
    def model(self) -> str:
        """The name the server has the newest weights under."""
        trainer = self._trainer
        return f"{trainer._lora_name}-v{trainer.model_version}" if trainer._lora_sync else self._base


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server made of a probe: context, token ids and log-probs of each sequence, or an error."""

    version: int
    sequences: Sequence[tuple[list[int], list[int], list[float]]] = ()
    request: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


class Probe:
    """A question to the server that does not hold up the training."""

    def __init__(self, ask: Callable[[], Answer | None]):
        self._ask = ask
        self._answer: Answer | None = None
        self._thread = threading.Thread(target=self._work, name="trl-parity-probe", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._answer = self._ask()

    def answer(self) -> Answer | None:
        """Waits for it; the requests have timeouts."""
        self._thread.join()
        return self._answer


def sampled_now(
    handle: EngineHandle, generation: Any, settings: SamplingSettings, latest: RolloutBatch, tokens: int, version: int
) -> Answer | None:
    """Continuations of recent samples by the server as it is now; None where no context fits it."""
    try:
        engine = handle.get(generation) or handle.refreshed(generation)
        if engine is None:
            raise ConnectionError(handle.absence)
        assert isinstance(engine, ServerEngine)
        each = max(1, tokens // _PROBES)
        contexts = [ids for ids in _contexts(latest) if len(ids) + each <= engine.max_model_len]
        if not contexts:
            return None
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        request = {name: getattr(settings, name) for name in names}
        sampled = engine.generate(contexts, request, each, seed=version * _PROBES)
        sequences = [(ids, *answer) for ids, answer in zip(contexts, sampled, strict=True)]
        return Answer(version, sequences, request)
    except Exception as e:  # server gone, busy, or refusing: a failed measurement, told by what reads it
        return Answer(version, error=f"{type(e).__name__}: {e}")


def _contexts(rollout: RolloutBatch) -> Iterator[list[int]]:
    """Recent samples, each up to another share of its trained tokens: what follows is early and late in turn."""
    count = len(rollout.completion_ids)
    for i in range(_PROBES):
        at = i * count // _PROBES
        trained = rollout.engine_mask[at].nonzero().flatten().tolist()
        if trained:
            end = trained[len(trained) * i // _PROBES]
            prompt = rollout.prompt_ids[at][rollout.prompt_mask[at].bool()].tolist()
            yield prompt + rollout.completion_ids[at, :end].tolist()
