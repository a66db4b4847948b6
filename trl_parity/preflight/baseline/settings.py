"""How a reference data set is made. Imports no torch: the command line is made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from ...config.fields import at_least, check_fields, number
from ...errors import ConfigError

__all__ = ["Generation"]


SAMPLED = number(lambda x: 0 < x < math.inf, "a number above 0; greedy needs none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How answers are made: one sampled answer a prompt for each of ``seeds``, beside the greedy one.

    Each field is an argument of ``trl-parity baseline``.
    """

    max_new_tokens: Annotated[int, at_least(1)] = field(
        default=32, metadata={"help": "tokens of an answer", "metavar": "N"}
    )
    greedy: bool = field(default=True, metadata={"help": "the greedy answer"})
    seeds: tuple[int, ...] = field(default=(0,), metadata={"help": "one sampled answer each", "metavar": "SEED"})
    temperature: Annotated[float, SAMPLED] = field(
        default=1.0, metadata={"help": "of the sampled answers", "metavar": "T"}
    )
    top_k: Annotated[int, at_least(1)] = field(  # nothing is cut from what is sampled
        default=20, metadata={"help": "most likely tokens kept at each place", "metavar": "K"}
    )
    batch_size: Annotated[int, at_least(1)] = field(
        default=16, metadata={"help": "answers at a time; another one rounds otherwise", "metavar": "N"}
    )
    shard_size: Annotated[int, at_least(1)] = field(
        default=256, metadata={"help": "prompts in a file", "metavar": "N"}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ConfigError(f"seeds are {self.seeds}. Expected different whole numbers >= 0.")
        if not self.modes:
            raise ConfigError("neither greedy nor a seed is asked for. Expected at least one of them.")

    @property
    def modes(self) -> tuple[int | None, ...]:
        """One a row of each prompt: None is greedy, a number the seed of a sampled answer."""
        return (*((None,) if self.greedy else ()), *self.seeds)
