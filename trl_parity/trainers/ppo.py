"""From a PPOTrainer to rollout batches. Written against TRL 1.12, the last TRL that has one.

PPOTrainer is one loop that tells callbacks little and heeds none of them. So while ``train()`` runs, the few things
the loop calls are replaced by ones that look on: generation, the reward model, the optimizer's step. Private names
used: of ``trl.experimental.ppo.ppo_trainer`` ``batch_generation`` and ``get_reward``; of the trainer ``train``,
``generate_completions``, ``_save_checkpoint`` and the ``policy`` of its model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..errors import InterceptionError
from ..records import RolloutBatch, SamplingSettings
from . import instrumentation
from .capture import Capture
from .grpo import sampling_settings
from .instrumentation import Wrapper, replaced
from .ppo_rollouts import ROLLOUTS, VLLMRollouts, policy_logits, temperature_of

# transformers' settings that change the law and are not replayed on the trainer's logits
_UNREPLAYED = ("bad_words_ids", "min_length", "min_new_tokens", "no_repeat_ngram_size", "sequence_bias",
               "suppress_tokens")  # fmt: skip


def wrappers() -> Iterator[Wrapper]:
    """Everything that is instrumented for good; the rest only while ``train`` runs."""
    from trl.experimental.ppo import PPOTrainer

    yield PPOTrainer, "train", _around_train


class _Stopped(Exception):
    """Leaves the trainer's loop between two updates."""


def _around_train(original: Any, trainer: Any) -> None:
    observer, rollouts = instrumentation.observer_of(trainer), getattr(trainer, ROLLOUTS, None)
    if observer is None and rollouts is None:
        original(trainer)
        return
    try:
        with _Interception(trainer, observer, rollouts).intercepted():
            original(trainer)
    except _Stopped:  # what the loop does at its end
        state, args = trainer.state, trainer.args
        state.episode -= args.batch_size  # counted for the update that was not begun
        trainer.control = trainer.callback_handler.on_train_end(args, state, trainer.control)
        if trainer.control.should_save:
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.control = trainer.callback_handler.on_save(args, state, trainer.control)


class _Interception:
    """One ``train()``: what its loop calls, with somebody looking on."""

    def __init__(self, trainer: Any, observer: Any, rollouts: VLLMRollouts | None):
        from trl.experimental.ppo import ppo_trainer

        self._trainer, self._observer, self._rollouts = trainer, observer, rollouts
        self._module = ppo_trainer
        self._generate, self._get_reward = ppo_trainer.batch_generation, ppo_trainer.get_reward
        self._generate_completions, self._step = trainer.generate_completions, trainer.optimizer.step
        self._save_checkpoint = trainer._save_checkpoint
        self._capture: PPOCapture | None = None  # of a batch whose scores are still to come
        self._showing = False  # samples for people are generated: nothing is learned from them
        if rollouts is not None:
            rollouts.sync_step = -1  # the loop counts its steps from 0 again

    @contextmanager
    def intercepted(self) -> Iterator[None]:
        """The loop finds the methods below for the duration of the block."""
        with ExitStack() as stack:
            stack.enter_context(replaced(self._module, "batch_generation", self._on_generate))
            stack.enter_context(replaced(self._trainer, "generate_completions", self._on_samples))
            if self._observer is not None:
                stack.enter_context(replaced(self._module, "get_reward", self._on_reward))
                stack.enter_context(replaced(self._trainer.optimizer, "step", self._on_step))
                stack.enter_context(replaced(self._trainer, "_save_checkpoint", self._on_save))
            yield

    def _on_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._showing = True
        try:
            return self._generate_completions(*args, **kwargs)
        finally:
            self._showing = False

    def _on_generate(
        self, model: Any, queries: torch.Tensor, batch_size: int, pad_token_id: int, generation_config: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._showing:
            return self._generate(model, queries, batch_size, pad_token_id, generation_config)
        if self._observer is None:
            assert self._rollouts is not None
            return self._rollouts.generate(queries, pad_token_id, batch_size)
        if self._trainer.control.should_training_stop:  # the loop itself never asks
            raise _Stopped
        capture = PPOCapture(self._trainer, self._observer, queries, pad_token_id, generation_config)
        if self._rollouts is None:
            sequences, logits = self._generate(model, queries, batch_size, pad_token_id, generation_config)
            with capture.trying():
                capture.sampled(sequences, logits)
        else:
            sequences, logits = self._rollouts.generate(queries, pad_token_id, batch_size, capture)
            capture.sync_step = self._rollouts.sync_step
        self._capture = capture
        return sequences, logits

    def _on_reward(self, model: Any, query_responses: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self._get_reward(model, query_responses, *args, **kwargs)
        capture = self._capture
        if capture is not None and model is self._trainer.reward_model and not self._showing:
            with capture.trying():
                capture.scored(query_responses, out[1])
            if capture.complete:
                self._capture = None
                capture.batch_seconds = time.perf_counter() - capture.start - capture.seconds
                try:
                    self._observer.on_generation(capture)
                finally:
                    capture.requests = [replace(request, outputs=None) for request in capture.requests]
        return out

    def _on_step(self, *args: Any, **kwargs: Any) -> Any:
        """The event that the loop does not send: callbacks may drop the gradient before it is applied."""
        trainer = self._trainer
        if trainer.accelerator.sync_gradients:
            self._observer.on_pre_optimizer_step(
                trainer.args, trainer.state, trainer.control, optimizer=trainer.optimizer
            )
        return self._step(*args, **kwargs)

    def _on_save(self, *args: Any, **kwargs: Any) -> None:
        """A stop must save, and TRL can't under DDP: it looks for config and policy on what DDP is wrapped around.

        The attribute, transformers asks for on every rank but the first, and PPOTrainer skips Trainer's ``__init__``.
        """
        trainer = self._trainer
        if not isinstance(trainer.model, torch.nn.parallel.DistributedDataParallel):
            self._save_checkpoint(*args, **kwargs)
            return
        with (
            replaced(trainer, "model", trainer.model.module),
            replaced(trainer, "is_distributed_loading_by_transformers", False),
        ):
            self._save_checkpoint(*args, **kwargs)


class PPOCapture(Capture):
    """One rollout batch of a PPOTrainer: one an update, of several optimizer steps but one ``global_step``.

    "The engine" is vLLM after ``use_vllm``; else it is transformers' ``generate``, and its
    log-probs are those of the scores it returns, which are the old log-probs PPO learns with.
    """

    last_in_step = True
    micro_batches = 1  # PPO tells of none: all of an update is one

    def __init__(self, trainer: Any, observer: Any, queries: torch.Tensor, pad_token_id: int, generation_config: Any):
        super().__init__(trainer, observer, training=True)
        self.start = time.perf_counter()
        self.step = self.sync_step = int(trainer.state.global_step)
        self._pad = pad_token_id
        self._scores: list[torch.Tensor] = []
        self._truncated: list[torch.Tensor] = []  # responses cut after the stop token, as the reward model sees them
        self.output = {"queries": queries}
        with self.trying():
            if self.generation is None:
                self.sampling = _transformers_settings(generation_config, self.policy.generation_config)
            else:
                self.sampling = sampling_settings(self.generation)

    @property
    def generation(self) -> Any:
        """VLLMGeneration after ``use_vllm``; else None: the trainer samples by itself."""
        return getattr(self.trainer, "vllm_generation", None)

    @property
    def policy(self) -> Any:
        """The policy without the value model beside it."""
        return super().policy.policy

    @property
    def temperature(self) -> float:
        """What PPO divides logits by."""
        return temperature_of(self.trainer)

    def sampled(self, sequences: torch.Tensor, logits: torch.Tensor) -> None:
        """Take over what transformers generated: (B, P + C) ids, (B, C, V) scores."""
        from trl.trainer.utils import selective_log_softmax

        responses = sequences[:, self.output["queries"].shape[1] :]
        self.output |= {"responses": responses, "reported": selective_log_softmax(logits, responses)}

    def scored(self, query_responses: torch.Tensor, scores: torch.Tensor) -> None:
        """Take over some rows' scores; the rows hold the responses as PPO cuts them."""
        self._truncated.append(query_responses[:, self.output["queries"].shape[1] :])
        self._scores.append(scores)

    @property
    def complete(self) -> bool:
        """Whether all rows have scores."""
        return sum(map(len, self._scores)) == len(self.output["queries"])

    def rewards(self) -> list[float]:
        """PPO's scores over all ranks, the penalty for a missing end token taken off."""
        scores, penalty = torch.cat(self._scores).float(), self.trainer.args.missing_eos_penalty
        if penalty is not None:
            ended = (torch.cat(self._truncated) == self.trainer.processing_class.eos_token_id).any(-1)
            scores = scores - penalty * ~ended
        return self.trainer.accelerator.gather(scores).tolist()

    def log(self, values: dict[str, float]) -> None:
        """PPO has logged its own row of the step already."""
        self.trainer.log(values)

    def rollout(self) -> RolloutBatch:
        """What was sampled, and of it what PPO learns from: everything before the first padding."""
        queries, responses, reported = (self.output[name] for name in ("queries", "responses", "reported"))
        if reported is None:
            raise InterceptionError(
                f"the rollout of step {self.step} came without log-probs. Expected vLLM to return the sampled "
                "token's; set trainer.vllm_generation.logprobs = 0 before trainer.train()."
            )
        padded = torch.cat(self._truncated) == self._pad
        mask = padded.cumsum(1) == 0
        return RolloutBatch(
            prompt_ids=queries,
            prompt_mask=(queries != self._pad).long(),
            completion_ids=responses,
            completion_mask=mask.long(),
            engine_mask=mask,
            rollout_logprobs=reported.to(responses.device),
            own_logprobs=self.pass_logprobs,
            sampling=self.sampling,
            trainer_temperature=self.temperature,
            step=self.step,
            sync_step=self.sync_step,
            training=True,
            last_in_step=self.last_in_step,
        )

    def run_policy(
        self, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None = None, **images: Any
    ) -> torch.Tensor:
        """PPO's no-grad pass over given sequences: log-probs (B, keep) of the policy's own head."""
        from trl.trainer.utils import selective_log_softmax

        size = batch_size or self.trainer.args.local_rollout_forward_batch_size
        parts = policy_logits(self.trainer, self.policy, ids, attention.bool(), keep, size)
        with torch.no_grad():
            return torch.cat(
                [selective_log_softmax(*pair) for pair in zip(parts, ids[:, -keep:].split(size), strict=True)]
            )


def _transformers_settings(given: Any, model: Any) -> SamplingSettings:
    """What transformers' ``generate`` does: its arguments, and the model's generation config for what they leave."""

    def value(name: str) -> Any:
        own = getattr(given, name, None)
        return getattr(model, name, None) if own is None else own

    found = {name: value(name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    unreplayed = tuple(name for name in _UNREPLAYED if value(name))
    return SamplingSettings(**{n: v for n, v in found.items() if v is not None}, unreplayed=unreplayed)
