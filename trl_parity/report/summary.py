"""What a report is about: a run's folder or an incident's, read once, and its words as Markdown. Needs no torch."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.parity import ParityConfig
from ..config.rules import Rule
from ..errors import ConfigError, DataError
from ..judging.breaker import read
from ..results.incident import Incident, read_incident
from ..results.paths import is_run, metrics_path
from ..results.reader import Columns, Sample, as_number, iter_windows, recorded_config, run_facts, samples
from ..results.redaction import bare
from .escape import code, fenced, prose
from .markdown import incident_parts, settings_markdown
from .messages import number as figure

__all__ = ["PICTURES", "SHOWN", "Case", "headline", "load", "markdown_parts", "statistics_table"]

# statistics that curves and tables show
SHOWN = ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99", "ratio/out_of_band", "ess", "honesty_gap",
         "entropy/trainer", "reward/mean")  # fmt: skip

COLUMNS = (
    *SHOWN, *(f"{form}/{stat}" for form in ("trimmed", "floor") for stat in SHOWN[:5]), "limit/kl_k3",
    "own_head/kl_k3", "logp_abs_diff/max",
)  # fmt: skip

_KEEP, _MOST_ROWS = 400, 20_000  # last windows as they are; tokens of worst sequences

PICTURES = {
    "timeline.png": "Drift by step with its noise floor, limit and onset, and the status of each window",
    "histogram.png": "Histogram of the log-ratios before and after the onset",
    "scatter.png": "Trainer against rollout log-prob",
    "position.png": "Drift by position in the completion",
    "entropy.png": "Drift by the trainer's entropy",
    "evidence.png": "Share of the excess that each probe explains",
}


@dataclass(kw_only=True)
class Case:
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
        """The rule on k3."""
        rules = (self.config or ParityConfig()).resolved_rules()
        return next((rule for rule in rules if rule.stat == "kl_k3" and not rule.below), None)


def load(path: str | Path) -> Case:
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


def _of_run(path: Path, incident: Path | None = None) -> Case:
    last: deque[dict[str, Any]] = deque(maxlen=_KEEP)

    def seen() -> Iterator[dict[str, Any]]:
        for row in iter_windows(path):
            last.append(row)
            yield row

    columns = Columns.of(seen(), COLUMNS)
    case = Case(path=path, columns=columns, rows=last)
    for fill in (_settings, _samples):
        try:
            fill(case)
        except (ConfigError, DataError) as e:  # the windows are told without
            case.notes.append(str(e))
    folder = metrics_path(path).parent / "incidents"
    case.incidents = sorted(folder.glob("step-*/incident.json"), key=lambda p: p.stat().st_mtime)
    chosen = incident or (case.incidents[-1].parent if case.incidents else None)
    if chosen is not None:
        _add_incident(case, chosen)
    return case


def _settings(case: Case) -> None:
    case.facts = run_facts(case.path)
    case.config = recorded_config(case.path)


def _samples(case: Case) -> None:
    case.before, case.after = samples(case.path, case.columns.onset)


def _of_incident(folder: Path) -> Case:
    parity = folder.parent.parent
    if (parity / "metrics.jsonl").is_file():
        case = _of_run(parity, incident=folder)
        case.path = folder
        return case
    case = Case(path=folder, columns=Columns((), count=0))
    _add_incident(case, folder)
    assert case.incident is not None
    rows = [clean for row in case.incident.windows[-_KEEP:] if (clean := _window(row)) is not None]
    case.columns, case.rows = Columns.of(rows, COLUMNS), deque(rows)
    try:
        case.config = ParityConfig.from_mapping(case.incident.config)
    except (ConfigError, TypeError) as e:
        case.notes.append(str(e))
    _samples_of_incident(case)
    return case


def _window(row: Any) -> dict[str, Any] | None:
    import json

    from ..results.reader import window_of

    return window_of(json.dumps(row).encode()) if isinstance(row, dict) else None


def _add_incident(case: Case, folder: Path) -> None:
    incident = read_incident(folder)
    try:
        rows = _tokens(folder / "tokens.parquet")
    except ImportError as e:
        rows = []
        case.notes.append(f"No sequences: pyarrow can't be imported ({e}). Run: pip install pyarrow.")
    except Exception as e:  # cut, or not parquet at all: pyarrow has many errors
        rows = []
        case.notes.append(f"{folder / 'tokens.parquet'} can't be read ({type(e).__name__}: {str(e)[:200]}).")
    case.incident, case.tokens = bare(incident, rows)
    if not len(case.before) and not len(case.after):
        _samples_of_incident(case)


def _tokens(path: Path) -> list[dict[str, Any]]:
    """Rows of ``tokens.parquet``, of bounded number and types."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        rows = next(file.iter_batches(batch_size=_MOST_ROWS), None) if file.metadata.num_rows else None
    if rows is None:
        return []
    kept = []
    for row in rows.to_pylist():
        for name in ("log_ratio", "rollout_logprob", "trainer_logprob", "entropy"):
            row[name] = as_number(row.get(name))
        for name in ("token", "prompt"):
            if row.get(name) is not None:
                row[name] = str(row[name])[:_MOST_ROWS]
        if isinstance(row.get("position"), int) and isinstance(row.get("sequence"), int):
            kept.append(row | {"compared": bool(row.get("compared"))})
    return kept


def _samples_of_incident(case: Case) -> None:
    """Where no sample was kept: the tokens of the worst sequences."""
    out = Sample(windows=1)
    for row in case.tokens:
        values = [row["position"], row["rollout_logprob"], row["trainer_logprob"]]
        if not row["compared"] or any(v is None or not math.isfinite(v) for v in values):
            continue
        entropy = row["entropy"]
        for name, value in zip(("position", "rollout_logprob", "trainer_logprob", "entropy"), [*values, entropy],
                               strict=True):  # fmt: skip
            column: array[float] = getattr(out, name)
            column.append(math.nan if value is None else value)
    if len(out):
        case.after, case.of = out, "tokens of the worst sequences"


# ---- words


def headline(case: Case) -> tuple[str, str]:
    """The status a run came to, and one sentence: healthy or not, since when, and why."""
    c = case.columns
    if not c.count:
        return "NO_DATA", "no window was measured."
    last = c.last
    if c.first_halt is not None:
        status = "HALT"
        text = f"halted at step {c.first_halt}"
    elif c.statuses["BREACH"]:
        status = "BREACH"
        text = f"{c.statuses['BREACH']:,} of {c.count:,} windows over a limit, none halted"
    elif c.statuses["ERROR"]:
        status, text = "ERROR", f"{c.statuses['ERROR']:,} of {c.count:,} windows could not be measured"
    elif c.statuses["WARN"]:
        status, text = "WARN", f"never over a limit; {c.statuses['WARN']:,} of {c.count:,} windows near one or watched"
    elif c.statuses["OK"]:
        status, text = "OK", f"healthy in all {c.count:,} windows, to step {last['step']}"
    else:
        status = max(c.statuses, key=c.statuses.__getitem__)
        text = f"{c.count:,} windows, none judged healthy or ill ({last['reason'] or 'no noise floor yet'})"
    if c.onset is not None:
        healthy = sum(1 for step in c.steps if step < c.onset) * c.width
        began = "its first window" if not healthy else f"step {c.onset}"
        text += f"; over the limit since {began}"
    if case.incident is not None and case.incident.diagnosis is not None:
        cause = str(case.incident.diagnosis.get("cause"))
        text += f"; cause: {cause}"
    return status, text + "."


def statistics_table(case: Case) -> list[tuple[str, ...]]:
    """(name, last, noise floor, share of its limit, median, worst) of each statistic, as text."""
    rules = {rule.stat: rule for rule in (case.config or ParityConfig()).resolved_rules()}
    out = []
    for stat in SHOWN:
        known = sorted(v for v in case.columns.values.get(stat, ()) if v == v)
        if not known:
            continue
        last = case.columns.last
        reading = read(rules[stat], last) if stat in rules else None
        share = "-" if reading is None or not reading.limit else f"{max(0.0, reading.value / reading.limit):.0%}"
        worst = known[0] if stat in ("ess", "entropy/trainer", "reward/mean") else known[-1]
        out.append((stat, *map(figure, (as_number(last.get(stat)), as_number(last.get(f"floor/{stat}")))), share,
                    figure(known[len(known) // 2]), figure(worst)))  # fmt: skip
    return out


def markdown_parts(case: Case, pictures: Sequence[str], note: str = "") -> tuple[str, str, str]:
    """Markdown up to the worst sequences, of them, and after them. ``pictures``: names of those there are."""
    shown = {name: [f"![{said}]({name})", ""] if name in pictures else [] for name, said in PICTURES.items()}
    status, sentence = headline(case)
    incident = case.incident
    parts: Mapping[str, list[str]] = {} if incident is None else incident_parts(incident, case.tokens, shown)
    c = case.columns
    counts = ", ".join(f"{n:,} {prose(s)}" for s, n in c.statuses.items())
    head = [
        f"# trl-parity: {prose(status)}",
        "",
        f"{code(case.path)}: {prose(sentence)}",
        "",
        *([f"Windows: {counts}, to step {c.last['step']}.", ""] if c.count else []),
        *parts.get("cause", []),
        *[line for text in (*([note] if note else []), *case.notes) for line in (f"({prose(text)})", "")],
        *["## Timeline", ""],
        *shown["timeline.png"],
        "| statistic | last | noise floor | of its limit | median | worst |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {' | '.join([code(row[0]), *row[1:]])} |" for row in statistics_table(case)),
        "",
        *_events(case),
        *_tokens_section(case, shown),
        *parts.get("why", []),
        *parts.get("text", []),
        *parts.get("onward", []),
    ]
    tail = parts.get("settings") or settings_markdown(
        case.facts.get("engine") or {}, case.facts.get("versions") or {},
        None if case.config is None else case.config.to_dict(),
    )  # fmt: skip
    others = [p.parent.name for p in case.incidents]
    if len(others) > 1:
        tail = [f"Incidents of this run: {', '.join(map(code, others))}. Told here: the last.", "", *tail]
    return "\n".join(head), "\n".join(parts.get("sequences", [])), "\n".join(tail)


def _events(case: Case) -> list[str]:
    events = list(case.columns.events)
    if not events:
        return []
    lines = [f"{row['status']:<12} step {row['step']:<8} {row['reason'][:300]}" for row in events]
    return ["The last windows that were not healthy:", "", *fenced("\n".join(lines))]


def _tokens_section(case: Case, shown: Mapping[str, list[str]]) -> list[str]:
    if not len(case.before) and not len(case.after):
        return []
    title = "## Before and after" if len(case.before) and len(case.after) else "## Tokens"
    said = [f"{n:,} {case.of} {when}" for when, n in _when(case)]
    return [title, "", f"{'; '.join(said)}. Δ = trainer - rollout log-prob, in nats.", "",
            *shown["histogram.png"], *shown["scatter.png"], *shown["position.png"], *shown["entropy.png"]]  # fmt: skip


def _when(case: Case) -> list[tuple[str, int]]:
    onset = case.columns.onset
    if onset is None or case.of != "sampled tokens":
        return [("", len(case.before) + len(case.after))]
    return [(w, n) for w, n in ((f"before step {onset}", len(case.before)), (f"from step {onset} on", len(case.after)))
            if n]  # fmt: skip
