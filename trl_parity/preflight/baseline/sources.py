"""Where a baseline's prompts come from, shard by shard: drawn over the vocabulary, or a user's own file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError, DataError
from ...files import bounded_lines, open_regular
from ..prompts.cases import LONGEST_LINE, Prompt, Vocabulary, read_jsonl
from .baseline import file_sha256

__all__ = ["DrawnPrompts", "FilePrompts", "Source"]

_DRAWS = 2  # counts up when a seed gives other prompts; 1 were hypothesis' draws


class Source(Protocol):
    """Where prompts come from."""

    @property
    def count(self) -> int:
        """How many there are."""

    def describe(self) -> dict[str, Any]:
        """What makes them what they are, for the manifest."""

    def shards(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Prompt]]]:
        """(number, prompts) of each wanted shard."""


@dataclass(frozen=True, slots=True)
class DrawnPrompts:
    """``count`` prompts from ``trl_parity.preflight.prompts.prompts``."""

    vocabulary: Vocabulary
    count: int
    seed: int
    max_len: int
    boundaries: tuple[int, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Seed, lengths, and the version of what draws."""
        return {
            "source": "strategies",
            "count": self.count,
            "seed": self.seed,
            "max_len": self.max_len,
            "boundaries": list(self.boundaries),
            "draws": _DRAWS,
        }

    def shards(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Prompt]]]:
        """Each shard is drawn by itself: no other has to be drawn for it."""
        from ..prompts.prompts import prompts, stream

        strategy = prompts(self.vocabulary, self.max_len, self.boundaries)
        for number in range(math.ceil(self.count / size)):
            if wanted(number):
                skip = min(number, 1)  # each stream begins with the simplest prompt there is
                here = min(size, self.count - number * size)
                yield number, list(islice(stream(strategy, f"{self.seed}:{number}"), skip, skip + here))


class FilePrompts:
    """The first ``count`` prompts of a user's own JSONL, or all."""

    def __init__(self, path: Path, tokenizer: Any, max_len: int, count: int | None = None):
        self._path, self._tokenizer, self._max_len = path, tokenizer, max_len
        try:
            with open_regular(path) as file:
                lines = sum(1 for line in bounded_lines(file, LONGEST_LINE) if line.strip())
            self._sha256 = file_sha256(path)
        except ValueError as e:
            raise DataError(f"{path} has a line of {e}. Expected a JSONL file of prompts.") from e
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}. Expected a JSONL file of prompts.") from e
        self.count = lines if count is None else min(count, lines)
        if not self.count:
            raise DataError(f"{path} holds no prompt. Expected a JSON object a line.")

    def describe(self) -> dict[str, Any]:
        """The file by its hash."""
        return {"source": "file", "count": self.count, "max_len": self._max_len, "sha256": self._sha256}

    def shards(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Prompt]]]:
        """Reads the whole file and keeps a shard of it."""
        prompts = islice(read_jsonl(self._path, self._tokenizer, self._max_len), self.count)
        number = 0
        while shard := list(islice(prompts, size)):
            if wanted(number):
                yield number, shard
            number += 1
