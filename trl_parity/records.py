"""The records that travel one way through trl-parity.

RolloutBatch → ScoredBatch → MismatchStats → Verdict → Diagnosis (of Evidence).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["UNREPLAYED", "Diagnosis", "Evidence", "NamedCause", "RolloutBatch", "SamplingSettings", "ScoredBatch"]

# request settings that change the law the engine samples from and are not replayed on the trainer's logits
UNREPLAYED = ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "structured_outputs", "logits_processors")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """What the engine does to logits before it samples, as sent with the requests (vLLM's names and defaults)."""

    temperature: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    unreplayed: tuple[str, ...] = ()  # settings that change the law and are not replayed on the trainer's side

    @property
    def truncates(self) -> bool:
        """Whether part of the vocabulary is cut off."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """One generation batch of one rank, as the trainer received it. B sequences, P prompt and C completion columns."""

    prompt_ids: torch.Tensor  # (B, P) int64, left-padded
    prompt_mask: torch.Tensor  # (B, P)
    completion_ids: torch.Tensor  # (B, C) int64, right-padded
    completion_mask: torch.Tensor  # (B, C): 1 where a completion token exists
    engine_mask: torch.Tensor  # (B, C) bool: the engine generated this token (completion_mask x tool/env mask)
    rollout_logprobs: torch.Tensor  # (B, C) log-prob the engine reported for the token it sampled
    own_logprobs: torch.Tensor | None  # (B, C) TRL's old_per_token_logps: the trainer's own head; None: it has none
    sampling: SamplingSettings
    trainer_temperature: float  # what the loss divides logits by
    step: int  # optimizer steps done when the batch was generated
    sync_step: int  # optimizer step of the weights last handed to the engine
    training: bool  # False: an evaluation batch
    last_in_step: bool  # no further generation before the next optimizer step
    lags: torch.Tensor | None = None  # (B,) optimizer steps by sequence, where they differ; None: ``lag``, of all
    in_flight: torch.Tensor | None = None  # (B,) 1: weights may have changed meanwhile, 0: not, -1: not known
    probe: bool = False  # generated only to be compared: nothing is learned from it
    # (B, 1) or (B, C) what TRL's correction multiplies the loss of a sequence or token by; None: no correction
    correction_weights: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None  # (B, C): the part of it the trainer's pass and loss have; None: all
    # (B,) int64: equal for rows whose prompts have the same pictures, 0 for none; None: all prompts are text alone
    image_keys: torch.Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.completion_ids.shape)
        for name in ("completion_mask", "engine_mask", "rollout_logprobs", "own_logprobs", "loss_mask"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise DataError(
                    f"{name} has shape {tuple(value.shape)} but completion_ids has {shape} (step {self.step}). "
                    "Check that both come from the same rollout."
                )
        if tuple(self.prompt_ids.shape) != tuple(self.prompt_mask.shape):
            raise DataError(
                f"prompt_ids has shape {tuple(self.prompt_ids.shape)} but prompt_mask has "
                f"{tuple(self.prompt_mask.shape)} (step {self.step}). Check that both come from the same rollout."
            )
        if self.prompt_ids.shape[0] != shape[0]:
            raise DataError(
                f"{self.prompt_ids.shape[0]} prompts but {shape[0]} completions (step {self.step}). Expected one "
                "prompt row per completion."
            )

    @property
    def lag(self) -> int:
        """Optimizer steps between the weights the engine held and the trainer's at generation."""
        return self.step - self.sync_step


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """A rollout batch scored by the trainer. All (B, C); values outside ``mask`` are undefined."""

    mask: torch.Tensor  # bool: engine-generated tokens that were scored
    rollout_logprobs: torch.Tensor
    trainer_logprobs: torch.Tensor  # judged: fp32 head, plain, or with the engine's processing replayed
    own_logprobs: torch.Tensor  # the trainer's own head, plain
    entropy: torch.Tensor | None  # nats, of the trainer's fp32-head law (plain); None: not known
    law_entropy: torch.Tensor | None = None  # of the law trainer_logprobs belongs to; None: the plain one's
    log_kept: torch.Tensor | None = None  # log probability mass of the engine's support under the trainer
    out_of_support: torch.Tensor | None = None  # bool: sampled token outside the trainer's own kept set
    replayed_logprobs: torch.Tensor | None = None  # fp32 head, the engine's processing replayed; None: it has none
    rows: torch.Tensor | None = None  # of the rollout batch, where only some were scored; None: all of them
    lag: int = 0
    # where sequences come from different weights, ``mask`` has the tokens at lag 0, and these the others
    lags: torch.Tensor | None = None  # (B,)
    in_flight: torch.Tensor | None = None  # (B,) as in RolloutBatch
    stale: torch.Tensor | None = None  # (B, C) bool: engine-generated tokens of sequences at lag > 0
    probe: bool = False
    correction_weights: torch.Tensor | None = None  # (B, 1) or (B, C) as in RolloutBatch
    # how many tokens a token that the fp32 head scored stands for; 0: ``trainer_logprobs`` has the own head's number,
    # all that is of the fp32 head alone is unknown; None: all were scored
    weights: torch.Tensor | None = None
    keys: torch.Tensor | None = None  # (B,) int64, equal for the same completion of the same prompt; None: all differ
    prompts: torch.Tensor | None = None  # (B,) int64, equal for the same prompt; None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one probe found. Residuals are mean Huber(Δ) of the probed tokens: Δ²/2 up to 1 nat, |Δ| - 1/2 beyond.

    (For small Δ that is k3; the linear tail keeps one token from deciding.) ``explained`` is the share of the excess
    over the noise floor that disappears: 1 - (after - floor)+ / (before - floor), None where nothing was redone.
    """

    name: str  # of the probe
    cause: str  # the cause it would name
    hypothesis: str
    prediction: str  # what is seen if the hypothesis holds
    cost: str  # none, head, forward, weights, engine: what it needs, cheapest first
    before: float | None = None
    after: float | None = None
    explained: float | None = None
    finding: str = ""  # what was seen, in words and numbers
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)  # JSON
    error: str = ""  # why it gave nothing: a failure, or what this setup can't be asked

    def to_dict(self) -> dict[str, Any]:
        """Its entry in incident.json."""
        return {
            "name": self.name,
            "cause": self.cause,
            "hypothesis": self.hypothesis,
            "prediction": self.prediction,
            "residual_before": self.before,
            "residual_after": self.after,
            "explained": self.explained,
            "finding": self.finding,
            "cost": self.cost,
            "seconds": self.seconds,
            "details": self.details,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCause:
    """One cause of a drift, and how much of the whole excess disappears with it."""

    cause: str
    explained: float
    confidence: float
    finding: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why engine and trainer disagree: the cause that explains most, what remains after it, and all the evidence."""

    step: int
    cause: str  # an identifier of trl_parity.causes; "unknown" when nothing explains half of the excess
    explained: float  # of the excess, by all named causes together, 0 to 1
    confidence: float  # share of bootstrap resamples of sequences in which this cause explains most, and half or more
    summary: str  # one or two sentences for people
    fix: str
    causes: tuple[NamedCause, ...] = ()  # in the order they were found; the first is ``cause``
    evidence: tuple[Evidence, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)  # residual, floor, tokens, sequences, seconds, by position

    def to_dict(self) -> dict[str, Any]:
        """``diagnosis`` of incident.json."""
        return {
            "step": self.step,
            "cause": self.cause,
            "explained": self.explained,
            "confidence": self.confidence,
            "summary": self.summary,
            "fix": self.fix,
            "causes": [
                {name: getattr(c, name) for name in ("cause", "explained", "confidence", "finding", "fix")}
                for c in self.causes
            ],
            "evidence": [e.to_dict() for e in self.evidence],
            "details": self.details,
        }
