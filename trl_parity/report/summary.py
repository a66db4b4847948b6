"""What a report is about: a run's folder or an incident's, read once, and what its numbers come to. Needs no torch."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.parity import ParityConfig
from ..config.rules import Rule
from ..errors import ConfigError, DataError
from ..files import open_regular
from ..judging.breaker import read
from ..judging.limits import allowed
from ..results.incident import Incident, order_of, read_incident
from ..results.paths import is_run, metrics_path
from ..results.reader import Columns, Sample, as_number, iter_windows, recorded_config, run_facts, samples
from ..results.redaction import bare
from ..verdict import Status
from .messages import left_out
from .outcome import outcome

__all__ = ["SHOWN", "Statistic", "Summary", "headline", "statistics", "summarize", "summary_of"]

# statistics that curves and tables show
SHOWN = ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99", "ratio/out_of_band", "ess", "honesty_gap",
         "entropy/trainer", "reward/mean")  # fmt: skip

COLUMNS = (
    *SHOWN, *(f"{form}/{stat}" for form in ("trimmed", "floor") for stat in SHOWN[:5]), "limit/kl_k3",
    "own_head/kl_k3", "logp_abs_diff/max",
)  # fmt: skip

_WORST_IS_LOW = ("ess", "entropy/trainer", "reward/mean")

_KEEP, _MOST_ROWS = 400, 20_000  # last windows as they are; tokens of worst sequences

_MOST_BYTES = 1 << 28  # unpacked, of those tokens

_PIECE, _MOST_TEXT = 64, 20_000  # rows read at once; characters of a text in them

_TEXTS = ("token", "prompt")

_TOKEN_COLUMNS = (
    "sequence", "position", "token_id", *_TEXTS, "rollout_logprob", "trainer_logprob", "log_ratio", "entropy",
    "compared",
)  # fmt: skip

_SAMPLED = ("position", "rollout_logprob", "trainer_logprob", "entropy")

_OF_WORST = "tokens of the worst sequences"


@dataclass(kw_only=True)
class Summary:
    """A run or an incident, as far as files tell of it."""

    path: Path
    columns: Columns
    rows: deque[dict[str, Any]] = field(default_factory=deque)  # the last windows
    before: Sample = field(default_factory=Sample)
    after: Sample = field(default_factory=Sample)
    of: str = "sampled tokens"  # what the samples are
    incident: Incident | None = None
    tokens: list[dict[str, Any]] = field(default_factory=list)  # rows of the worst sequences
    incidents: list[Path] = field(default_factory=list)  # all of the run
    config: ParityConfig | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def rule(self) -> Rule | None:
        """The rule on k3; None where there is none, or the settings are not known."""
        rules = () if self.config is None else self.config.resolved_rules()
        return next((rule for rule in rules if rule.stat == "kl_k3" and not rule.below), None)

    @property
    def not_finite(self) -> int:
        """Compared tokens of the worst sequences that no picture can show."""
        if self.of != _OF_WORST:
            return 0
        return sum(1 for t in self.tokens if t["compared"]) - len(self.after)


def summarize(path: str | Path) -> Summary:
    """Read a run's folder (or its ``metrics.jsonl``) or an incident's folder.

    Raises ConfigError or DataError for what is neither, is damaged, or comes from a newer trl-parity.
    """
    path = Path(path)
    if path.name == "incident.json" or (path / "incident.json").is_file():
        return _of_incident(path.parent if path.name == "incident.json" else path)
    if not path.exists():
        raise DataError(f"{path} does not exist. Expected the folder of a run or of an incident.")
    if not is_run(path):
        raise DataError(
            f"{path} holds neither metrics.jsonl nor incident.json. Expected the folder of a run "
            "(<output_dir> or <output_dir>/parity) or of an incident (<output_dir>/parity/incidents/step-<n>)."
        )
    return _of_run(path)


def _of_run(path: Path, incident: Path | None = None) -> Summary:
    last: deque[dict[str, Any]] = deque(maxlen=_KEEP)

    def seen() -> Iterator[dict[str, Any]]:
        for row in iter_windows(path):
            last.append(row)
            yield row

    columns = Columns.of(seen(), COLUMNS)
    summary = Summary(path=path, columns=columns, rows=last)
    for fill in (_settings, _samples):
        try:
            fill(summary)
        except (ConfigError, DataError) as e:  # the windows are told without
            summary.notes.append(str(e))
    folder = metrics_path(path).parent / "incidents"
    summary.incidents = sorted(folder.glob("step-*/incident.json"), key=lambda path: order_of(path.parent))
    chosen = incident or (summary.incidents[-1].parent if summary.incidents else None)
    if chosen is not None:
        found, rows, notes = _read(chosen)
        summary.incident, summary.tokens = bare(found, rows)
        summary.notes += notes
        if not len(summary.before) and not len(summary.after):
            _sample_worst(summary)
    return summary


def _settings(summary: Summary) -> None:
    summary.facts = run_facts(summary.path)
    _judged_by(summary, recorded_config(summary.path))


def _judged_by(summary: Summary, config: ParityConfig | None) -> None:
    summary.config = config
    if config is not None and (left := left_out(config)):
        summary.notes.append(left)


def _samples(summary: Summary) -> None:
    summary.before, summary.after = samples(summary.path, summary.columns.onset)


def _of_incident(folder: Path) -> Summary:
    parity = folder.parent.parent
    if (parity / "metrics.jsonl").is_file():
        summary = _of_run(parity, incident=folder)
        summary.path = folder
        return summary
    incident, rows, notes = _read(folder)
    summary = summary_of(incident, rows, folder)
    summary.notes[:0] = notes
    return summary


def summary_of(incident: Incident, rows: Sequence[Mapping[str, Any]], path: Path | None = None) -> Summary:
    """Of an incident alone, with the windows it holds. ``rows``: its ``tokens.parquet``."""
    windows = [clean for row in incident.windows[-_KEEP:] if (clean := _window(row)) is not None]
    summary = Summary(path=path or Path(), columns=Columns.of(windows, COLUMNS), rows=deque(windows))
    summary.incident, summary.tokens = bare(incident, rows)
    try:
        _judged_by(summary, ParityConfig.from_mapping(incident.config))
    except (ConfigError, TypeError) as e:
        summary.notes.append(str(e))
    _sample_worst(summary)
    return summary


def _window(row: Any) -> dict[str, Any] | None:
    import json

    from ..results.reader import window_of

    return window_of(json.dumps(row).encode()) if isinstance(row, dict) else None


def _read(folder: Path) -> tuple[Incident, list[dict[str, Any]], list[str]]:
    """An incident, its rows of tokens, and why there are none."""
    incident = read_incident(folder)
    try:
        return incident, _tokens(folder / "tokens.parquet"), []
    except ImportError as e:
        why = f"No sequences: pyarrow can't be imported ({e}). Run: pip install pyarrow."
    except Exception as e:  # cut, or not parquet at all: pyarrow has many errors
        why = f"{folder / 'tokens.parquet'} can't be read ({type(e).__name__}: {str(e)[:200]})."
    return incident, [], [why]


def _tokens(path: Path) -> list[dict[str, Any]]:
    """Rows of ``tokens.parquet``, of bounded number and types: the columns known here, a few rows at a time.

    A text that many of them share is held once, as it is in the file.
    """
    import pyarrow
    from pyarrow import compute, parquet

    kept: list[dict[str, Any]] = []
    with open_regular(path, within=True) as raw:
        schema = parquet.read_schema(raw)
        texts = [name for name in _TEXTS if name in schema.names]
        file = parquet.ParquetFile(raw, read_dictionary=texts)
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
        if max(groups, default=0) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes unpacked")
        flat = [field.name for field in schema if not pyarrow.types.is_nested(field.type)]
        names = [name for name in _TOKEN_COLUMNS if name in flat]
        for piece in file.iter_batches(batch_size=_PIECE, columns=names):
            columns = {}
            for name in names:
                column = piece.column(name)
                if isinstance(column, pyarrow.DictionaryArray):
                    places = column.indices.unique().drop_null()
                    short = compute.utf8_slice_codeunits(column.dictionary.take(places), 0, _MOST_TEXT)
                    words = dict(zip(places.to_pylist(), short.to_pylist(), strict=True))
                    columns[name] = [words.get(place) for place in column.indices.to_pylist()]
                else:
                    columns[name] = column.to_pylist()
            kept += _clean(columns, piece.num_rows)
            if len(kept) >= _MOST_ROWS:
                break
    return kept[:_MOST_ROWS]


def _clean(columns: Mapping[str, Sequence[Any]], count: int) -> Iterator[dict[str, Any]]:
    """Rows with numbers and texts where those belong."""
    for i in range(count):
        row = {name: values[i] for name, values in columns.items()}
        for name in ("log_ratio", *_SAMPLED[1:]):
            row[name] = as_number(row.get(name))
        for name in _TEXTS:
            if row.get(name) is not None:
                row[name] = str(row[name])[:_MOST_TEXT]
        if isinstance(row.get("position"), int) and isinstance(row.get("sequence"), int):
            yield row | {"compared": bool(row.get("compared"))}


def _sample_worst(summary: Summary) -> None:
    """Where no sample was kept: the tokens of the worst sequences."""
    out = Sample(windows=1)
    for row in summary.tokens:
        delta, *values = (as_number(row.get(name)) for name in ("log_ratio", *_SAMPLED))
        entropy = values.pop()
        if not row["compared"] or any(v is None or not math.isfinite(v) for v in (delta, *values)):
            continue
        for name, value in zip(_SAMPLED, (*values, entropy), strict=True):
            column: array[float] = getattr(out, name)
            column.append(math.nan if value is None else value)
    if len(out):
        summary.after, summary.of = out, _OF_WORST


# ---- words


def headline(summary: Summary) -> tuple[str, str]:
    """The status a run came to, and one sentence: healthy or not, since when, and why."""
    c, incident = summary.columns, summary.incident
    if summary.config is not None:
        c.course.action = summary.config.action
    status, text = outcome(c.course, reason=str(c.last.get("reason") or ""))
    if c.onset is not None and not c.course.recovered:
        healthy = sum(1 for step in c.steps if step < c.onset) * c.width
        began = "its first window" if not healthy else f"step {c.onset}"
        text += f"; over the limit since {began}"
    if incident is not None and incident.diagnosis is not None and (c.course.halts or status is Status.BREACH):
        text += f"; cause: {incident.diagnosis.get('cause')}"
    return str(status), text + "."


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic over a run's windows."""

    name: str
    values: list[float | None]
    last: float | None
    floor: float | None  # the last window's
    share: float | None  # of its limit that the last window uses; None: no rule is on it, or its limit is not known
    median: float
    worst: float


def used(rule: Rule, window: Mapping[str, Any]) -> float | None:
    """Share of its limit that a statistic uses in a window; infinite for what is no number, None if it is not known.

    Of a rule over a noise floor both are taken above the floor, and the limit is the nearest that applied.
    """
    reading, floor = read(rule, window), as_number(window.get(f"floor/{rule.stat}"))
    if reading is None:
        return None
    value, limit = reading.value, allowed(rule, floor)
    if limit is None:
        limit = reading.limit
    elif floor is not None and not reading.seen.startswith("excess/"):  # over the ceiling: the statistic itself
        value -= floor if rule.stat != "ess" else 1.0 - floor
    if limit <= 0:
        return math.inf if reading.over else None
    share = value / limit
    return max(0.0, share) if math.isfinite(share) else math.inf


def statistics(
    names: Iterable[str],
    series: Mapping[str, Sequence[float | None]],
    last: Mapping[str, Any],
    config: ParityConfig | None,
) -> list[Statistic]:
    """Those of ``names`` that were measured at all. ``series``: by name, a value a window; ``last``: the last one."""
    rules = {rule.stat: rule for rule in (config or ParityConfig()).resolved_rules()}
    out = []
    for name in names:
        values = [None if v is None or math.isnan(v) else v for v in series.get(name, ())]
        known = sorted(v for v in values if v is not None)
        if not known:
            continue
        share = used(rules[name], last) if name in rules else None
        worst = known[0] if name in _WORST_IS_LOW else known[-1]
        now, floor = (as_number(last.get(key)) for key in (name, f"floor/{name}"))
        out.append(Statistic(name, values, now, floor, share, known[len(known) // 2], worst))
    return out
