"""What a run's callback saw and left, and a fault that many runs have."""

from __future__ import annotations

import json

from stack import shared_engine as shared_engine

from trl_parity import ParityCallback


class Recorder(ParityCallback):
    """Keeps what was intercepted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def on_generation(self, capture):
        super().on_generation(capture)
        self.seen.append(self._run.batches.last)


def statuses(callback):
    return [str(v.status) for v in callback.verdicts]


def jsonl(output_dir):
    return [json.loads(line) for line in (output_dir / "parity" / "metrics.jsonl").read_text().splitlines()]


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def lose_sync(monkeypatch, after=1):
    """Weights reach the engine ``after`` times and then no more: the engine goes stale in silence."""
    from trl.generation.vllm_generation import VLLMGeneration

    real, calls = VLLMGeneration.sync_weights, []

    def sync(self):
        calls.append(1)
        if len(calls) <= after:
            real(self)

    monkeypatch.setattr(VLLMGeneration, "sync_weights", sync)
