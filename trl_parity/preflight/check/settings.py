"""What a check is told, and what it finds. Imports no torch: the command line is made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from ...config.fields import at_least, check_fields, number
from ...config.rules import nearest
from ...credentials import without_credentials
from ...errors import ConfigError
from .rows import CheckOutcome, Limits, Row, outcome

if TYPE_CHECKING:
    from .trials import Trial

__all__ = ["EARLY_ERROR", "ROWS", "STAGES", "TITLES", "CheckSettings", "Result"]

TITLES = {  # of the rows that build the engine otherwise
    "compiled": "compiled and eager",
    "chunked_prefill": "prompts in chunks and whole",
    "block_size": "block size of the cache",
}

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


EARLY_ERROR = 0.005

_SPENT = number(lambda x: 0 <= x <= 0.02, "a number from 0 to 0.02")

HAS_LAW = number(lambda x: 0.01 <= x <= 100, "0.01 to 100: greedy answers have no law")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """What is checked and how. All of it decides the numbers, so a check goes on only with all of it alike.

    Fields with a help text are arguments of ``trl-parity check``.
    """

    model: str = field(metadata={"help": "folder or hub name of the model", "metavar": "NAME"})
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    trials: Annotated[int, at_least(1)] = field(
        default=50, metadata={"help": "batches of prompts, at most: they end where more would change no row"}
    )
    seed: int = field(default=0, metadata={"help": "of prompts and sampling"})
    temperature: Annotated[float, number(lambda x: 0.01 <= x <= 100, "0.01 to 100: greedy answers have no law")] = (
        field(default=1.0, metadata={"help": "of the training run, at which trials sample"})
    )
    trainer_dtype: str = field(
        default="float32",
        metadata={
            "help": "of the trainer's weights and forward, whose noise the engine is measured against",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    max_tokens: Annotated[int, at_least(1)] = field(
        default=16, metadata={"help": "sampled after a prompt", "metavar": "N"}
    )
    max_length: Annotated[int, at_least(1)] = field(
        default=256, metadata={"help": "of a trial's prompts", "metavar": "N"}
    )
    max_batch: Annotated[int, at_least(1)] = field(default=8, metadata={"help": "prompts in a trial", "metavar": "N"})
    target_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens the run works with; 125, 150 and 200 %% of it are checked (default: half of "
            "max_model_len)",
            "metavar": "N",
        },
    )
    prompts: str | None = field(
        default=None, metadata={"help": "JSONL of prompts to use in place of drawn ones", "metavar": "FILE"}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "also compare with a stored reference (trl-parity baseline)", "metavar": "DIR"}
    )
    case: str | None = field(
        default=None, metadata={"help": "this one batch only, as a failed check prints it", "metavar": "TEXT"}
    )
    skip: tuple[str, ...] = field(
        default=(),
        metadata={"help": "rows, or groups of them, not to run: they never pass", "metavar": "ROW", "nargs": "+"},
    )
    budget: float = field(
        default=900.0,
        metadata={"help": "nothing new is begun after it; what is left is 'not run'", "metavar": "SECONDS"},
    )
    device: str = field(default="cpu", metadata={"help": "of the reference"})
    early_error: Annotated[float, _SPENT] = field(
        default=EARLY_ERROR,
        metadata={
            "help": "chance, of 0.025 in all, that a limit is wrongly met because trials end early; 0: all are run",
            "metavar": "P",
        },
    )
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.skip:
            if name not in ROWS and not name.startswith("length_"):
                raise ConfigError(f"no row or group of rows is called {name!r}{nearest(name, ROWS)}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        kept: dict[str, Any] = without_credentials(json.loads(json.dumps(asdict(self), default=str)))
        return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rows, and what is needed to read them."""

    rows: tuple[Row, ...]
    settings: CheckSettings
    facts: Mapping[str, Any]  # the engine's own settings, versions, speed
    trials: tuple[Trial, ...]
    resumed: int = 0  # findings of an earlier run that was killed

    @property
    def outcome(self) -> CheckOutcome:
        """Fit, unfit, could not tell."""
        return outcome(self.rows)
