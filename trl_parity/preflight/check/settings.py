"""What a check is told, and what it finds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...config.rules import nearest
from ...errors import ConfigError
from .engines import TITLES
from .rows import Limits, Outcome, Row, outcome
from .trials import Trial

__all__ = ["ROWS", "STAGES", "CheckSettings", "Result"]

# the rows each stage makes, and their group; those of lengths depend on the model
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "drift": ("mechanisms", ()),
    "sampling": ("mechanisms", ("logprob_meaning", "sampling")),
    "lengths": ("lengths", ()),
    "own": ("invariances", ("batch", "order", "seed", "prefill_decode")),
    "baseline": ("baseline", ("baseline",)),
    "update": ("invariances", ("update", "update_back")),
    "small blocks": ("invariances", ("prefix_cache", "update_prefix_cache")),
    "engines": ("invariances", tuple(TITLES)),
}

ROWS = (
    "limits", "kl_mean", "kl_max", "pass_rate", "logprobs", "mechanisms", "dtype", "kv_cache", "weights", "config",
    "scale", "positions", "model", "lengths", "invariances", *(id for _, ids in STAGES.values() for id in ids),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """What is checked and how. All of it decides the numbers, so a check goes on only with all of it alike."""

    model: str
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 50
    seed: int = 0
    temperature: float = 1.0  # the run's: what trials sample at
    trainer_dtype: str = "float32"  # of the weights and the forward the engine is compared with
    max_tokens: int = 16  # sampled after each prompt
    max_length: int = 256  # of a trial's prompts
    max_batch: int = 8
    target_length: int | None = None  # None: half of what the engine takes
    prompts: str | None = None  # JSONL, in place of drawn prompts
    baseline: str | None = None
    case: str | None = None  # one batch, as a failed trial prints it
    skip: tuple[str, ...] = ()  # rows, or whole groups of them
    budget: float = 900.0  # seconds after which nothing new is begun
    device: str = "cpu"  # of the reference
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("trials", "max_tokens", "max_length", "max_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}. Expected a whole number >= 1.")
        if not 0.01 <= self.temperature <= 100:
            raise ConfigError(
                f"temperature is {self.temperature:g}. Expected 0.01 to 100: greedy answers have no law."
            )
        if self.trainer_dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"trainer dtype is {self.trainer_dtype!r}. Expected float32, bfloat16 or float16.")

        for name in self.skip:
            if name not in ROWS and not name.startswith("length_"):
                raise ConfigError(f"no row or group of rows is called {name!r}{nearest(name, ROWS)}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return json.loads(json.dumps(asdict(self), default=str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rows, and what is needed to read them."""

    rows: tuple[Row, ...]
    settings: CheckSettings
    facts: Mapping[str, Any]  # the engine's own settings, versions, speed
    trials: tuple[Trial, ...]
    resumed: int = 0  # findings of an earlier run that was killed

    @property
    def outcome(self) -> Outcome:
        """Fit, unfit, could not tell."""
        return outcome(self.rows)
