"""An incident as Markdown for people: on GitHub, in an editor and on a terminal. Needs no torch.

Whatever a model, a tokenizer or a library wrote is hostile until escaped: ``visible`` for control characters and
what has no shape, ``prose``, ``code`` and ``fenced`` for Markdown and HTML.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..causes import CAUSES
from ..config.parity import ParityConfig
from ..results.redaction import bare
from .escape import code, fenced, prose, visible
from .messages import number

if TYPE_CHECKING:
    from ..results.incident import Incident

__all__ = ["incident_parts", "report_markdown", "settings_markdown"]

_PICTURES = {
    "windows.png": "Drift by step, with the noise floor, the limit and the status of each window",
    "evidence.png": "Share of the excess that each probe explains",
    "log_ratio.png": "Histogram of the log-ratios of the worst sequences",
}

_SEQUENCES, _TOKENS, _CHARS = 4, 12, 160  # shown


def report_markdown(
    incident: Incident, rows: Sequence[Mapping[str, Any]], pictures: Sequence[str], *, note: str = ""
) -> str:
    """``report.md``, with links to ``pictures``. ``note``: why some are missing."""
    shown = {name: [f"![{said}]({name})", ""] if name in pictures else [] for name, said in _PICTURES.items()}
    parts = incident_parts(incident, rows, shown)
    reason = prose(incident.verdict.get("reason") or "no reason given")
    return "\n".join(
        [
            f"# trl-parity: {prose(incident.verdict.get('status', '?'))} at step {incident.step}",
            "",
            f"The engine that samples is not the policy that learns. Seen: {reason}.",
            "",
            *parts["cause"],
            *["## What happened", ""],
            *shown["windows.png"],
            *([f"({prose(note)})", ""] if note else []),
            *parts["text"],
            *parts["why"],
            *parts["onward"],
            *parts["sequences"],
            *parts["settings"],
        ]
    )


def incident_parts(
    incident: Incident, rows: Sequence[Mapping[str, Any]], shown: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The parts of an incident's report as Markdown lines. ``shown``: by a picture's name, the lines that show it."""
    incident, rows = bare(incident, rows)
    diagnosis = incident.diagnosis
    return {
        "cause": _cause(diagnosis),
        "text": fenced(incident.text.strip("\n")) if incident.text.strip() else [],
        "why": [] if diagnosis is None else _why(diagnosis, shown.get("evidence.png", [])),
        "onward": _onward(list(incident.verdict.get("breaches") or ())),
        "sequences": [
            "## Worst sequences",
            "",
            *shown.get("log_ratio.png", []),
            *_sequences(rows, incident.redacted),
        ],
        "settings": settings_markdown(incident.engine, incident.versions, incident.config),
    }


def _cause(diagnosis: dict[str, Any] | None) -> list[str]:
    if diagnosis is None:
        return ["**Cause** not looked for: no diagnosis was made.", ""]
    explained, confidence = _percent(diagnosis["explained"]), _percent(diagnosis["confidence"])
    return [
        f"**Cause** {code(diagnosis['cause'])}: {prose(diagnosis['summary'])}",
        "",
        f"Explained: {explained} of the excess over the noise floor. Confidence in this cause: {confidence}.",
        "",
        "**Fix**",
        "",
        *fenced(textwrap.fill(diagnosis["fix"], 100, break_long_words=False, break_on_hyphens=False)),
    ]


def _why(diagnosis: dict[str, Any], picture: list[str]) -> list[str]:
    lines = ["## Why", ""]
    if (cause := CAUSES.get(diagnosis["cause"])) is not None:
        lines += [f"{prose(cause.what)} {prose(cause.harm)}", ""]
    if len(diagnosis["causes"]) > 1:
        lines += ["All that was found, with the share of the whole excess that disappears with it:", ""]
        for c in diagnosis["causes"]:
            lines.append(
                f"- {code(c['cause'])} ({_percent(c['explained'])}, confidence {_percent(c['confidence'])}): "
                f"{prose(c['finding'])} Fix: {prose(c['fix'])}"
            )
        lines.append("")
    probed = [e for e in diagnosis["evidence"] if not e["error"]]
    failed = [e for e in diagnosis["evidence"] if e["error"]]
    probed.sort(key=lambda e: -math.inf if e["explained"] is None else float(e["explained"]), reverse=True)
    if probed:
        lines += ["| probe | hypothesis | before → after | explained | cost |", "| --- | --- | --- | ---: | --- |"]
        for e in probed:
            change = f"{_figure(e['residual_before'])} → {_figure(e['residual_after'])}"
            cost = f"{e['cost']}, {float(e['seconds']):.1f} s"
            cells = (code(e["name"]), prose(e["hypothesis"]), change, _percent(e["explained"]), prose(cost))
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "Before and after: mean Huber(Δ) of the probed tokens, Δ = trainer - rollout log-prob.", ""]
    lines += picture
    if found := [f"- {code(e['name'])}: {prose(e['finding'])}" for e in probed if e["finding"]]:
        lines += ["What each probe saw:", "", *found, ""]
    if failed:
        lines += ["Not probed, so not ruled out:", ""]
        lines += [f"- {code(e['name'])} ({prose(e['hypothesis'])}): {prose(e['error'])}" for e in failed]
        lines.append("")
    return lines


def _onward(breaches: list[str]) -> list[str]:
    ways = ['ParityConfig(action="log")    # measures on, never halts, learns from such batches']
    if breaches:
        rules = ", ".join(f'"{stat}": ...' for stat in breaches)
        ways += [
            f"ParityConfig(rules={{{rules}}})    # other limits, if this drift is expected",
            "",
            "# what other limits would have done, from this folder",
            f"trl-parity replay ../.. --set rules.{breaches[0]}.limit=...",
        ]
    return ["## Going on anyway", "", *fenced("\n".join(ways))]


def _sequences(rows: list[dict[str, Any]], redacted: bool) -> list[str]:
    by_sequence: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_sequence.setdefault(row["sequence"], []).append(row)
    if not rows:
        return ["No tokens: only a sample of the batch was scored, or nothing was compared.", ""]
    lines = [
        f"The worst {min(_SEQUENCES, len(by_sequence))} of {len(by_sequence)} in `tokens.parquet`, which holds every "
        "token of each. Δ = trainer - rollout log-prob, in nats." + (" Ids and text are redacted." * redacted),
        "",
    ]
    for sequence, tokens in list(by_sequence.items())[:_SEQUENCES]:
        compared = [t for t in tokens if t["compared"] and t["log_ratio"] is not None]
        finite = [t for t in compared if math.isfinite(t["log_ratio"])]
        total = sum(abs(t["log_ratio"]) for t in finite)
        odd = f", {len(compared) - len(finite)} more are not finite" if len(finite) < len(compared) else ""
        lines += [f"### Sequence {sequence}: sum |Δ| {total:.4g} over {len(finite)} compared tokens{odd}", ""]
        block = []
        if not redacted:
            block += [f"prompt      {_quoted(tokens[0].get('prompt') or '', from_end=True)}"]
            block += [f"completion  {_quoted(''.join(t.get('token') or '' for t in tokens))}", ""]
        block.append("position         Δ   rollout   trainer   entropy" + ("" if redacted else "  token"))
        # a Δ that is not finite goes first; then by size, and shown in reading order
        worst = sorted(compared, key=lambda t: (math.isfinite(t["log_ratio"]), -abs(t["log_ratio"])))[:_TOKENS]
        for t in sorted(worst, key=lambda t: int(t["position"])):
            figures = "".join(
                f"{'-' if t.get(k) is None else format(t[k], form):>10}"
                for k, form in (("log_ratio", "+.3f"), ("rollout_logprob", ".3f"), ("trainer_logprob", ".3f"),
                                ("entropy", ".3f"))
            )  # fmt: skip
            block.append(f"{t['position']:>8}{figures}" + ("" if redacted else f"  {_quoted(t.get('token') or '')}"))
        lines += fenced("\n".join(block))
    return lines


def _quoted(text: str, *, from_end: bool = False) -> str:
    """In quotes on one line, its beginning or end where it is long."""
    cut = text[-_CHARS:] if from_end else text[:_CHARS]
    inner = visible(cut.replace("\\", "\\\\").replace('"', '\\"'))
    if len(cut) == len(text):
        return f'"{inner}"'
    return f'…"{inner}"' if from_end else f'"{inner}"…'


def settings_markdown(
    engine: Mapping[str, Any], versions: Mapping[str, Any], config: Mapping[str, Any] | None
) -> list[str]:
    """Settings of the engine, versions, and the settings of trl-parity that are not the defaults."""
    lines = ["## Settings and versions", ""]
    for heading, values in (("engine", engine), ("package", versions)):
        if values:
            lines += [f"| {heading} | |", "| --- | --- |", *(f"| {code(k)} | {code(v)} |" for k, v in values.items())]
            lines.append("")
    if config is None:
        return [*lines, "Which settings of trl-parity the run had is not recorded.", ""]
    usual = ParityConfig().to_dict()
    changed = {k: v for k, v in config.items() if k not in usual or usual[k] != v}
    if not changed:
        return [*lines, "All settings of trl-parity are the defaults.", ""]
    said = json.dumps(changed, indent=2, ensure_ascii=False, default=str)
    return [*lines, "Settings of trl-parity that are not the defaults:", "", *fenced(said)]


def _figure(value: Any) -> str:
    return number(None if value is None else float(value))


def _percent(value: Any) -> str:
    """A share; '-' for none, and never 100% for less. Non-finite ones come as strings out of a file."""
    if value is None or not math.isfinite(share := float(value)):
        return "-" if value is None else str(value)
    return f"{share:.0%}" if share >= 1 or share <= 0.99 else f"{math.floor(share * 1000) / 10}%"
