"""transformers' training loop as callbacks see it, with rollout batches of given drift and no model: milliseconds."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType

from trl_parity.records import ScoredBatch
from trl_parity.trainers.grpo import GRPOCapture

SHAPE = (8, 4)


class GivenCapture(GRPOCapture):
    """A batch whose trainer is off by ``shift`` nats (None: no token can be compared). Measuring it draws."""

    shift: float | None = 0.0
    weights: torch.Tensor | None = None  # of a sample that was scored
    engine = None
    temperature = 1.0

    def refreshed_engine(self) -> None:
        """There is none."""

    def rollout(self) -> Any:
        return f"{'training' if self.training else 'evaluation'} {self.step}"

    def score(self, rollout: Any, token_budget: int) -> ScoredBatch:
        torch.rand(3), random.random(), np.random.rand(3)
        reported = torch.full(SHAPE, -1.0)
        scores = reported + (self.shift or 0.0)
        mask = torch.full(SHAPE, self.shift is not None)
        return ScoredBatch(
            mask=mask, rollout_logprobs=reported, trainer_logprobs=scores, own_logprobs=scores, entropy=None,
            weights=self.weights,
        )  # fmt: skip

    def score_all(self, rollout: Any) -> ScoredBatch:
        self.weights = None
        return self.score(rollout, 0)

    def rewards(self) -> list[float]:
        return []

    def log(self, values: dict[str, float]) -> None:
        """Nobody reads it."""


class FlatOptimizer:
    """What DeepSpeed's own optimizers do: a torch optimizer steps an fp32 copy, which has the gradient that long."""

    def __init__(self, parameter: torch.Tensor):
        self.parameter, self.copy = parameter, parameter.detach().clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.copy], lr=0.1, weight_decay=0.1)

    def step(self) -> None:
        self.copy.grad = self.parameter.grad
        self.optimizer.step()
        self.parameter.data.copy_(self.copy)
        self.parameter.grad = self.copy.grad = None


class Loop:
    """One run. ``feeds``: micro-batches a generation feeds; ``accumulate``: of an optimizer step.

    ``shifts``: nats by number of the rollout batch. ``hidden``: numbers of batches that are not intercepted.
    ``accelerator``: a real one, of a rank among several.
    ``updates``: of each optimizer step the numbers of the batches that fed it, and whether it was applied.
    ``weights``: of a sample of each training batch's tokens that was scored; None: all were.
    ``deepspeed``: updates are made inside backward; the gradient of update n (from 0) is n + 1.
    """

    def __init__(
        self, callback: Any, output_dir: Any, *, feeds: int, accumulate: int, shifts: Any, hidden: Any = (),
        accelerator: Any = None, deepspeed: bool = False, weights: Any = None,
    ):  # fmt: skip
        self.weights = weights
        self.callback, self.feeds, self.accumulate, self.shifts, self.hidden = (
            callback, feeds, accumulate, shifts, hidden,
        )  # fmt: skip
        self.parameter = torch.nn.Parameter(torch.ones(1))
        self.flat = FlatOptimizer(self.parameter) if deepspeed else None
        none = SimpleNamespace()
        self.accelerator = accelerator or SimpleNamespace(
            sync_gradients=False, process_index=0, num_processes=1, device=torch.device("cpu"), scaler=None,
            is_main_process=False, distributed_type=DistributedType.NO,
            deepspeed_engine_wrapped=SimpleNamespace(engine=SimpleNamespace(optimizer=self.flat)),
        )  # fmt: skip
        self.args = SimpleNamespace(
            steps_per_generation=feeds, gradient_accumulation_steps=accumulate, report_to=[],
            world_size=self.accelerator.num_processes, output_dir=str(output_dir),
        )  # fmt: skip
        self.state = SimpleNamespace(global_step=0, is_world_process_zero=False)
        self.control = SimpleNamespace(should_training_stop=False, should_save=False, should_log=False)
        generation = SimpleNamespace(
            mode="colocate", generation_kwargs={}, temperature=1.0, top_k=0, top_p=1.0, min_p=None,
            repetition_penalty=1.0, structured_outputs_regex=None,
        )  # fmt: skip
        self.trainer = SimpleNamespace(
            args=self.args, state=self.state, accelerator=self.accelerator, num_iterations=1, _step=0,
            vllm_generation=generation, is_deepspeed_enabled=deepspeed, processing_class=none, temperature=1.0,
            callback_handler=SimpleNamespace(callbacks=[callback]),
            model=torch.nn.ParameterList([self.parameter]),
        )  # fmt: skip
        self.optimizer = SimpleNamespace(param_groups=[{"params": [self.parameter]}])
        self.updates: list[tuple[tuple[int, ...], bool]] = []
        self.generated_in: dict[int, int] = {}  # batch -> optimizer step
        self._fed: list[int] = []
        self._batch = -1

    def run(self, *epochs: int, ended: bool = True) -> list[tuple[tuple[int, ...], bool]]:
        """Epochs of so many micro-batches; not ``ended``: a dataset of unknown length ends without a last update."""
        told = self.args, self.state, self.control
        self.callback.on_train_begin(*told)
        for length in epochs:
            for micro_batches in (
                range(i, min(i + self.accumulate, length)) for i in range(0, length, self.accumulate)
            ):
                self.trainer.current_gradient_accumulation_steps = len(micro_batches)
                for i in micro_batches:
                    self.accelerator.sync_gradients = (i + 1) % self.accumulate == 0 or (ended and i + 1 == length)
                    self._micro_batch()
                    if not self.accelerator.sync_gradients:
                        self.callback.on_substep_end(*told)
                        continue
                    self.parameter.grad = torch.full((1,), len(self.updates) + 1.0)
                    before = self.parameter.item()
                    if self.flat is not None:
                        self.flat.step()
                    self.callback.on_pre_optimizer_step(*told, optimizer=self.optimizer)
                    applied = self.parameter.item() != before if self.flat else self.parameter.grad is not None
                    self.updates.append((tuple(self._fed), applied))
                    self._fed = []
                    self.state.global_step += 1
                    self.callback.on_step_end(*told)
                    if self.control.should_training_stop:
                        return self.updates
        return self.updates

    def _micro_batch(self) -> None:
        if self.trainer._step % self.feeds == 0:
            self._batch += 1
            self.generated_in[self._batch] = self.state.global_step
            if self._batch not in self.hidden:
                self.generate(self.shifts(self._batch))
        if self._batch not in self._fed:
            self._fed.append(self._batch)
        self.trainer._step += 1

    def generate(self, shift: float | None, training: bool = True) -> None:
        """One rollout batch."""
        capture = GivenCapture(self.trainer, self.callback, training)
        capture.shift, capture.weights = shift, self.weights if training else None
        self.callback.on_generation(capture)
