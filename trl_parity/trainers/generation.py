"""From trainers that sample with TRL's ``VLLMGeneration`` and learn without log-probs of the samples. TRL 1.16.

One tap for all of them: what the engine is asked for and answers is kept at ``VLLMGeneration.generate``, with the
log-probs of the sampled tokens, which these trainers do not ask for. The student's side is a pass of ours over that
batch. A trainer is a subclass of ``GenerationCapture`` and the name of the method that samples and makes of it what is
learned from. Private names used of the trainers: ``vllm_generation``, ``_metrics``, and those a subclass names.
"""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import DataError, InterceptionError
from ..records import RolloutBatch
from ..scoring.model_head import causal_lm
from .capture import Capture
from .grpo import around_generation, require_engine, sampling_settings
from .instrumentation import Observer, Wrapper, replaced

__all__ = ["GenerationCapture"]


class GenerationCapture(Capture):
    """One generation batch of such a trainer: a row for each completion that the engine was asked for.

    ``synced``, ``done``: attributes of the trainer with the optimizer step of the weights last handed to the engine,
    and with the micro-batches so far.
    """

    synced = "_last_loaded_step"
    done = "_step"

    def __init__(self, trainer: Any, observer: Observer, training: bool):
        super().__init__(trainer, observer, training)
        every = self.feeds(trainer.args)
        self.step = int(trainer.state.global_step)
        self.micro_batches = every - getattr(trainer, self.done) % every
        self.last_in_step = self.ends_step()
        self.sampling = sampling_settings(self.generation)
        self._asked: list[list[int]] = []  # prompts, a row each
        self._sampled: list[list[int]] = []  # completions
        self._reported: list[list[float]] = []  # their log-probs
        self._first = 0  # rows of the first call; later ones go on after a tool has spoken
        self._pictures = False

    @classmethod
    def wrapping(cls, trainer: type, method: str) -> Iterator[Wrapper]:
        """What is instrumented for a trainer class that samples in this method."""
        yield trainer, method, functools.partial(around_generation, cls)

    @property
    def replayed(self) -> bool:
        """Always: no log-prob of a sample is in the loss, so what was asked for to sample (GOLD's top_p) is meant."""
        return True

    @staticmethod
    def feeds(args: Any) -> int:
        """Micro-batches that one generation feeds."""
        return int(args.gradient_accumulation_steps)

    @abstractmethod
    def learned(self) -> Sequence[torch.Tensor]:
        """Token ids the trainer goes on with, by row of the first call: each begins with that row's completion."""

    @classmethod
    def require_interceptable(cls, trainer: Any) -> None:
        """Asks the engine for the sampled tokens' log-probs. Raises InterceptionError where there is none to ask."""
        if trainer.use_vllm and getattr(trainer.vllm_generation, "logprobs", 0) is None:
            trainer.vllm_generation.logprobs = 0
        require_engine(trainer, cls.synced)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what the engine was asked for and what it handed to this rank."""
        generation = self.generation
        generate = generation.generate

        def recorded(prompts: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            out = generate(prompts, images, *args, **kwargs)
            self._pictures |= any(images or ())
            self._keep(prompts, *out[1:4])
            return out

        with replaced(generation, "generate", recorded):
            yield

    def _keep(self, prompts: Any, completions: Any, reported: Any, of: Any) -> None:
        self._asked += [list(ids) for ids in prompts]
        self._sampled += [list(ids) for ids in completions]
        self._first = self._first or len(self._sampled)
        for ids, numbers, tokens in zip(completions, reported, of, strict=True):
            found = [n[t.index(token)] for token, n, t in zip(ids, numbers, tokens, strict=True)]
            self._reported.append([torch.nan if x is None else x for x in found])

    def rollout(self) -> RolloutBatch:
        """What the engine handed over; a row without a token where the trainer sampled none.

        Raises InterceptionError for prompts with images, DataError where the trainer goes on with other tokens.
        """
        return self._rollout

    @functools.cached_property
    def _rollout(self) -> RolloutBatch:
        self._require_learned()
        trainer = self.trainer
        device = trainer.accelerator.device
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        pad = tokenizer.pad_token_id or 0
        asked, sampled, reported = self._asked, self._sampled, self._reported
        if not sampled:
            asked, sampled, reported = [[pad]], [[pad]], [[0.0]]

        def padded(rows: Sequence[Sequence[Any]], value: float = 0, side: str = "right", ones: bool = False) -> Any:
            tensors = [torch.tensor(row) for row in rows]
            return pad_sequence([torch.ones_like(t) if ones else t for t in tensors], True, value, side).to(device)

        mask = padded(sampled, ones=True)
        synced = int(getattr(trainer, self.synced))
        return RolloutBatch(
            prompt_ids=padded(asked, pad, "left"),
            prompt_mask=padded(asked, side="left", ones=True),
            completion_ids=padded(sampled, pad),
            completion_mask=mask,
            engine_mask=mask.bool() & bool(self._sampled),
            rollout_logprobs=padded(reported),
            own_logprobs=None,
            sampling=self.sampling,
            trainer_temperature=self.temperature,
            step=self.step,
            sync_step=synced,
            training=self.training,
            last_in_step=self.last_in_step,
            # synced every few steps only: what older weights sampled differs by rights
            lags=None if synced == self.step else torch.full((len(mask),), self.step - synced, device=device),
        )

    def _require_learned(self) -> None:
        if self._pictures:
            raise InterceptionError(
                "the prompts hold images, which trl-parity measures in GRPOTrainer and RLOOTrainer alone. Expected "
                f"prompts of text for {type(self.trainer).__name__}. Train it without ParityCallback."
            )
        if not self._sampled:
            return
        learned = self.learned()
        rows = zip(learned, self._sampled[: self._first], strict=False)
        if len(learned) != self._first or any(ours[: len(ids)].tolist() != ids for ours, ids in rows):
            raise DataError(
                f"the trainer goes on with {len(learned)} completions that are not the {self._first} the engine "
                f"returned (step {self.step}). Expected the same tokens in the same order. Does a subclass, or a "
                "library, change them on the way?"
            )

    def rewards(self) -> list[float]:
        """None: it learns from a teacher."""
        return []

    def log(self, values: dict[str, float]) -> None:
        """One value a key, so nothing is averaged."""
        for name, value in values.items():
            self.trainer._metrics["train" if self.training else "eval"][name] = [value]

    def run_policy(
        self, ids: torch.Tensor, attention: torch.Tensor, keep: int, batch_size: int | None = None, **images: Any
    ) -> torch.Tensor:
        """A no-grad pass as the trainer's loss makes its: log-probs (B, keep) of the model's own logits over T."""
        from trl.models.utils import disable_gradient_checkpointing

        trainer, args = self.trainer, self.trainer.args
        size = batch_size or (args.per_device_train_batch_size if self.training else args.per_device_eval_batch_size)
        # DDP's own forward may sync buffers over ranks, and ranks may run different passes here
        model = trainer.model if self.sharded else self.policy
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs),
            trainer.compute_loss_context_manager(),
        ):
            rows = zip(ids.split(size), attention.split(size), strict=True)
            return torch.cat([self.logprobs(model, some, mask, keep) for some, mask in rows])

    def logprobs(self, model: Any, ids: torch.Tensor, attention: torch.Tensor, keep: int) -> torch.Tensor:
        """(b, keep) of some rows."""
        from trl.trainer.utils import selective_log_softmax

        takes = inspect.signature(type(causal_lm(self.policy)).forward).parameters
        only = {"logits_to_keep": keep + 1} if "logits_to_keep" in takes else {}
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False, **only).logits[:, -(keep + 1) : -1]
        logprobs: torch.Tensor = selective_log_softmax(logits.float() / self.temperature, ids[:, -keep:])
        return logprobs
