"""An incident, or a run, as Markdown for people: on GitHub, in an editor and on a terminal. Needs no torch.

The words are in ``templates``, which escape what a model, a tokenizer or a library wrote.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..causes import CAUSES
from ..config.parity import ParityConfig
from ..errors import ConfigError
from ..results.reader import as_number
from ..results.redaction import bare
from .escape import visible
from .format import cut, number
from .looser import looser_rules
from .rendering import render_markdown, sections
from .sequences import WorstSequence, worst_sequences
from .summary import SHOWN, headline, statistics

if TYPE_CHECKING:
    from ..results.incident import Incident
    from .summary import Summary

__all__ = ["markdown_parts", "report_markdown"]

_CAPTIONS = {
    "windows.png": "Drift by step, with the noise floor, the limit and the status of each window",
    "log_ratio.png": "Histogram of the log-ratios of the worst sequences",
    "timeline.png": "Drift by step with its noise floor, limit and onset, and the status of each window",
    "histogram.png": "Histogram of the log-ratios before and after the onset",
    "scatter.png": "Trainer against rollout log-prob",
    "position.png": "Drift by position in the completion",
    "entropy.png": "Drift by the trainer's entropy",
    "evidence.png": "Share of the excess that each probe explains",
}

_SEQUENCES, _TOKENS, _CHARS = 4, 12, 160  # shown


def report_markdown(
    incident: Incident, rows: Sequence[Mapping[str, Any]], pictures: Sequence[str], *, note: str = ""
) -> str:
    """``report.md``, with links to ``pictures``. ``note``: why some are missing."""
    return render_markdown(
        "incident.md.j2",
        status=incident.verdict.get("status", "?"),
        step=incident.step,
        reason=incident.verdict.get("reason") or "no reason given",
        note=note,
        pictures=_captions(pictures),
        **_of_incident(incident, rows),
    )


def markdown_parts(summary: Summary, pictures: Sequence[str], note: str = "") -> tuple[str, ...]:
    """Markdown up to the worst sequences, of them, and after them. ``pictures``: names of those there are."""
    incident = summary.incident
    status, sentence = headline(summary)
    if incident is None:
        config = None if summary.config is None else summary.config.to_dict()
        known = _settings(summary.facts.get("engine") or {}, summary.facts.get("versions") or {}, config)
    else:
        known = _of_incident(incident, summary.tokens)
    columns = summary.columns
    return sections(
        "report.md.j2",
        "head",
        "sequences",
        "tail",
        status=status,
        path=summary.path,
        sentence=sentence,
        columns=columns,
        incident=incident,
        notes=[*([note] if note else []), *summary.notes],
        statistics=statistics(SHOWN, columns.values, columns.last, summary.config),
        events="\n".join(f"{r['status']:<12} step {r['step']:<8} {cut(r['reason'], 600)}" for r in columns.events),
        both=len(summary.before) and len(summary.after),
        sampled=_sampled(summary),
        of=summary.of,
        others=[path.parent.name for path in summary.incidents],
        pictures=_captions(pictures),
        **known,
    )


def _captions(pictures: Sequence[str]) -> dict[str, str]:
    return {name: _CAPTIONS[name] for name in pictures}


def _sampled(summary: Summary) -> list[tuple[str, int]]:
    """When tokens were sampled, and how many."""
    onset, before, after = summary.columns.onset, len(summary.before), len(summary.after)
    if onset is None or summary.of != "sampled tokens":
        parts = [("", before + after)]
    else:
        parts = [(f"before step {onset}", before), (f"from step {onset} on", after)]
    return [(when, n) for when, n in parts if n]


def _of_incident(incident: Incident, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the parts that both reports share are filled in with."""
    incident, rows = bare(incident, rows)
    diagnosis = incident.diagnosis
    evidence = [] if diagnosis is None else diagnosis["evidence"]
    probed = [e for e in evidence if not e["error"]]
    probed.sort(key=lambda e: -math.inf if e["explained"] is None else float(e["explained"]), reverse=True)
    worst = worst_sequences(rows)
    return {
        "diagnosis": diagnosis,
        "fix": "" if diagnosis is None else _filled(diagnosis["fix"]),
        "cause_known": None if diagnosis is None else CAUSES.get(diagnosis["cause"]),
        "probed": probed,
        "found": [e for e in probed if e["finding"]],
        "not_probed": [e for e in evidence if e["error"]],
        "text": incident.text.strip("\n") if incident.text.strip() else "",
        "ways": _ways(incident.verdict, incident.config),
        "worst": worst,
        "tables": [(one, _table(one, incident.redacted)) for one in worst[:_SEQUENCES]],
        "redacted": incident.redacted,
        **_settings(incident.engine, incident.versions, incident.config),
    }


def _filled(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _ways(verdict: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """To go on anyway."""
    breaches = list(verdict.get("breaches") or ())
    ways = ['ParityConfig(action="log")    # measures on, never halts, learns from such batches']
    if breaches:  # a file's: of any kind
        try:
            config = ParityConfig.from_mapping(settings)
        except (ConfigError, TypeError):  # another version's
            config = ParityConfig()
        seen = {str(name): as_number(value) for name, value in verdict.items()}
        rules = looser_rules(map(str, breaches), seen, config)
        told = [f"rules.{breaches[0]}.limit=..."]  # the numbers are not in the file
        for stat, keys in list(rules.items())[:1]:
            ways.append(f"ParityConfig(rules={rules})    # wider limits, if this drift is expected")
            told = [f"rules.{stat}.{key}={value}" for key, value in (keys or {}).items()] or [f"rules.{stat}=null"]
        ways += ["", "# what other limits would have done, from this folder"]
        ways.append("trl-parity replay ../.. " + " ".join(f"--set {one}" for one in told))
    return "\n".join(ways)


def _table(sequence: WorstSequence, redacted: bool) -> str:
    """Its text, and its tokens of largest Δ in reading order."""
    lines = []
    if not redacted:
        lines += [f"prompt      {_quoted(sequence.prompt, from_end=True)}"]
        lines += [f"completion  {_quoted(sequence.completion)}", ""]
    lines.append("position         Δ   rollout   trainer   entropy" + ("" if redacted else "  token"))
    # a Δ that is not finite goes first; then by size
    worst = sorted(sequence.compared, key=lambda t: (math.isfinite(t["log_ratio"]), -abs(t["log_ratio"])))[:_TOKENS]
    for t in sorted(worst, key=lambda t: int(t["position"])):
        known = [number(t["log_ratio"], "+.3f")]
        known += [number(t.get(name), ".3f") for name in ("rollout_logprob", "trainer_logprob", "entropy")]
        figures = "".join(f"{figure:>10}" for figure in known)
        lines.append(f"{t['position']:>8}{figures}" + ("" if redacted else f"  {_quoted(t.get('token') or '')}"))
    return "\n".join(lines)


def _quoted(text: str, *, from_end: bool = False) -> str:
    """In quotes on one line, its beginning or end where it is long."""
    part = text[-_CHARS:] if from_end else text[:_CHARS]
    inner = visible(part.replace("\\", "\\\\").replace('"', '\\"'))
    if len(part) == len(text):
        return f'"{inner}"'
    return f'…"{inner}"' if from_end else f'"{inner}"…'


def _settings(
    engine: Mapping[str, Any], versions: Mapping[str, Any], config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Settings of the engine, versions, and the settings of trl-parity that are not the defaults (None: not known)."""
    changed = None
    if config is not None:
        usual = ParityConfig().to_dict()
        differing = {k: v for k, v in config.items() if k not in usual or usual[k] != v}
        changed = json.dumps(differing, indent=2, ensure_ascii=False, default=str) if differing else ""
    return {"engine": engine, "versions": versions, "changed": changed}
