"""What a run left behind, read a line at a time: ``metrics.jsonl``, ``tokens.jsonl`` and what lies beside them.

A file may be huge, torn, or not ours at all: memory is bounded whatever its size, a line that is no window is passed
over, and values that are no numbers count as not measured. Imports no torch.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.parity import ParityConfig
from ..errors import ConfigError, DataError
from ..files import check_version, open_regular, read_versioned
from ..judging.course import Course
from ..lines import progress_bar
from ..metrics.scalars import SCALARS
from ..verdict import SEVERITY, worst
from .paths import CONFIG_NAME, RUN_NAME, TOKENS_NAME, metrics_path

__all__ = ["Columns", "Sample", "iter_windows", "recorded_config", "run_facts", "samples", "window_of"]

READABLE = (1, 2)  # schema versions of metrics.jsonl

TOKENS_READABLE = (1,)

MAX_LINE = 1 << 22  # bytes; a window takes about 4 KB

MAX_FILE = 1 << 24  # bytes of settings, and of what a run says of itself

MAX_NESTED = 10_000  # lists and mappings in a line; a window has none but names, a sample of tokens four

_LOUD = 1 << 26  # bytes from which on reading shows its progress


def iter_windows(path: str | Path, *, quiet: bool = False) -> Iterator[dict[str, Any]]:
    """The windows of a ``metrics.jsonl`` (or of the run folder that holds it), oldest first, one at a time.

    What is no whole window is passed over. Raises DataError for a missing file, one without any window, and a schema
    version of another trl-parity. A file that takes long shows its progress on a terminal's stderr.
    """
    path = metrics_path(path)
    found = False
    for line in _lines(path, quiet):
        if (row := window_of(line)) is None:
            continue
        check_version(path, row.get("schema_version"), READABLE, DataError)
        found = True
        yield row
    if not found:
        raise DataError(f"{path} holds no window. Expected one JSON object a line, as ParityCallback writes them.")


def _lines(path: Path, quiet: bool) -> Iterator[bytes]:
    """Lines without their ends; of one longer than MAX_LINE, nothing."""
    if path.is_dir():
        raise DataError(f"{path} holds no metrics.jsonl. Expected the folder of a run, or the file itself.")
    try:
        size = path.stat().st_size
        shown = not quiet and size >= _LOUD
        with (
            open_regular(path, within=True) as file,
            progress_bar(f"reading {path.name}", shown=shown, counted=False) as update,
        ):
            while line := file.readline(MAX_LINE):
                if shown:
                    update(file.tell(), size)
                if line.endswith(b"\n"):
                    yield line[:-1]
                elif len(line) < MAX_LINE:
                    yield line  # the last one; it may be torn
                else:
                    while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}. Expected a run's metrics.jsonl or its folder.") from e


# what is kept of a line beside scalars; whatever else stands in it is foreign
_KEYS = frozenset(
    ("schema_version", "step", "status", "streak", "breaches", "warnings", "alert", "reason", "num_tokens",
     "num_sequences", "num_batches", "num_errors", "breaker/status", "breaker/streak", "breaker/level")
)  # fmt: skip

_COUNTS = frozenset(name for name in _KEYS if name.startswith(("num_", "breaker/")))

_TOKENS = ("position", "rollout_logprob", "trainer_logprob", "entropy")  # columns of a line of tokens.jsonl

_MOST_SAMPLES, _MOST_TOKENS = 32, 4096  # windows that are kept, and tokens of each

_LONGEST = 1 << 14  # characters of a reason

_NAME = 256  # of a name


def window_of(line: bytes, columns: Sequence[str] = ()) -> dict[str, Any] | None:
    """The window in a line of ``metrics.jsonl``, its scalars as numbers or None; None for a torn or foreign line.

    Nothing else of the line is kept, but lists by the names of ``columns``, their first 4096 values.
    """
    if line.count(b"[") + line.count(b"{") > MAX_NESTED:
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("status"), str):
        return None
    step = row.get("step")
    if isinstance(step, bool) or not isinstance(step, int | float) or not abs(step) < 1 << 63:
        return None
    found, row = row, {}
    for name, value in found.items():
        if name in SCALARS:
            row[name] = value if type(value) is float or value is None else as_number(value)
        elif name in _KEYS:
            row[name] = value
    for name in columns:
        row[name] = value[:_MOST_TOKENS] if isinstance(value := found.get(name), list) else None
    row["step"], row["status"] = int(step), row["status"][:_NAME]
    for name in ("schema_version", "alert"):
        if isinstance(row.get(name), list | dict) or len(str(row.get(name))) > _NAME:
            row[name] = None
    for name in _COUNTS & row.keys():
        row[name] = as_number(row[name])
    row["streak"] = int(as_number(row.get("streak")) or 0) if math.isfinite(as_number(row.get("streak")) or 0) else 0
    for name in ("breaches", "warnings"):
        given = row.get(name)
        row[name] = [str(x)[:_NAME] for x in given[:64]] if isinstance(given, list) else []
    row["reason"] = str(row.get("reason") or "")[:_LONGEST]
    return row


def as_number(value: Any) -> float | None:
    """A figure as files hold it ("inf" is a string there); None for what is none."""
    if value is None or isinstance(value, bool | list | dict):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass
class Columns:
    """A run's windows as columns; memory is bounded: beyond ``limit`` rows, neighbours are merged two by two.

    A row holds the mean of each statistic over its windows, the worst status, and the last step. ``width``: windows
    in a row.
    """

    stats: tuple[str, ...]
    limit: int = 1 << 15
    count: int = 0
    width: int = 1
    onset: int | None = None  # step of the first window that the halt counts, else of the first breach
    course: Course = field(default_factory=Course)
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=12))  # the last that were not healthy
    last: dict[str, Any] = field(default_factory=dict)
    first_halt: int | None = None

    def __post_init__(self) -> None:
        self.steps = array("d")
        self.status: list[str] = []
        self.values = {name: array("d") for name in self.stats}
        self._open: list[dict[str, Any]] = []
        self._streak_from: int | None = None

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]], stats: Iterable[str], **kwargs: Any) -> Columns:
        """From windows, oldest first."""
        columns = cls(tuple(dict.fromkeys(stats)), **kwargs)
        for row in rows:
            columns.add(row)
        columns.finish()
        return columns

    def add(self, row: dict[str, Any]) -> None:
        """One window."""
        self.count += 1
        status = row["status"] if row["status"] in SEVERITY else "ERROR"
        self.course.add(row["step"], status)
        if status in ("BREACH", "HALT", "ERROR"):
            if self._streak_from is None:
                self._streak_from = row["step"]
            if status == "HALT" and self.first_halt is None:
                self.first_halt, self.onset = row["step"], self._streak_from
            elif status == "BREACH" and self.onset is None:
                self.onset = self._streak_from
        elif not row["streak"] and not as_number(row.get("breaker/level")):
            self._streak_from = None
        if status not in ("OK", "CALIBRATING"):
            self.events.append(row)
        self.last = row
        self._open.append({name: row.get(name) for name in ("step", "status", *self.stats)})
        if len(self._open) == self.width:
            self.finish()
            if len(self.steps) >= self.limit:
                self._halve()

    @property
    def statuses(self) -> Counter[str]:
        """Windows by status."""
        return self.course.counts

    def finish(self) -> None:
        """Close the row that is being filled."""
        if not self._open:
            return
        self.steps.append(self._open[-1]["step"])
        self.status.append(str(worst(r["status"] for r in self._open)))
        for name, column in self.values.items():
            column.append(_mean([r.get(name) for r in self._open]))
        self._open = []

    def _halve(self) -> None:
        pairs = range(0, len(self.steps) - 1, 2)
        self.steps = array("d", (self.steps[i + 1] for i in pairs))
        self.status = [str(worst(self.status[i : i + 2])) for i in pairs]
        self.values = {k: array("d", (_mean(list(v[i : i + 2])) for i in pairs)) for k, v in self.values.items()}
        self.width *= 2


def _mean(values: list[float | None]) -> float:
    known = [v for v in values if v is not None and v == v]
    return sum(known) / len(known) if known else math.nan


@dataclass
class Sample:
    """Uniformly drawn tokens of some windows, as columns; ``entropy`` is NaN where it is not known."""

    position: array = field(default_factory=lambda: array("d"))
    rollout_logprob: array = field(default_factory=lambda: array("d"))
    trainer_logprob: array = field(default_factory=lambda: array("d"))
    entropy: array = field(default_factory=lambda: array("d"))
    windows: int = 0

    def __len__(self) -> int:
        return len(self.position)


def samples(path: str | Path, onset: int | None) -> tuple[Sample, Sample]:
    """The last samples before the onset, and the last from it on (without an onset: all of them before)."""
    file = metrics_path(path).with_name(f"{TOKENS_NAME}.jsonl")
    before: deque[dict[str, Any]] = deque(maxlen=_MOST_SAMPLES)
    after: deque[dict[str, Any]] = deque(maxlen=_MOST_SAMPLES)
    if file.is_file():
        for line in _lines(file, quiet=True):
            row = window_of(line, _TOKENS)
            if row is None:
                continue
            check_version(file, row.get("schema_version"), TOKENS_READABLE, DataError)
            (after if onset is not None and row["step"] >= onset else before).append(row)
    return _sample(before), _sample(after)


def _sample(rows: Iterable[dict[str, Any]]) -> Sample:
    out = Sample()
    for row in rows:
        columns = [row.get(name) for name in _TOKENS]
        if not all(isinstance(column, list) for column in columns):
            continue
        out.windows += 1
        for values in zip(*columns, strict=False):
            position, rollout, trainer, entropy = map(as_number, values)
            if any(x is None or not math.isfinite(x) for x in (position, rollout, trainer)):
                continue
            for name, value in zip(_TOKENS, (position, rollout, trainer, entropy), strict=True):
                getattr(out, name).append(math.nan if value is None else value)
    return out


def recorded_config(path: str | Path) -> ParityConfig | None:
    """The settings the run was made with, kept beside its windows; None where they are not."""
    file = metrics_path(path).with_name(CONFIG_NAME)
    if not file.exists():
        return None
    values = read_versioned(
        file, (), {}, expected="the settings of a run", remedy="give them with --config", largest=MAX_FILE, within=True
    )
    try:
        return ParityConfig.from_mapping(values, where=str(file))
    except ConfigError as e:
        told = str(e) if str(file) in str(e) else f"{file}: {e}"
        raise ConfigError(told) from e
    except (TypeError, ValueError, OverflowError) as e:  # what no field's own check foresaw
        raise ConfigError(f"{file}: {type(e).__name__}: {e}. Expected the settings of a run.") from e


def run_facts(path: str | Path) -> dict[str, Any]:
    """``run.json``: trainer, model, engine settings and versions; empty where there is none."""
    file = metrics_path(path).with_name(RUN_NAME)
    if not file.exists():
        return {}
    facts = read_versioned(
        file,
        (1,),
        {"engine?": dict, "versions?": dict},
        expected="what a run says of itself",
        remedy="take another copy, or remove it",
        largest=MAX_FILE,
        within=True,
    )
    return {k: v for k, v in facts.items() if k != "schema_version"}
