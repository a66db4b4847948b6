"""Token ids, text and prompts taken out of records; keys and passwords always."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..credentials import masked, without_credentials

if TYPE_CHECKING:
    from .incident import Incident

__all__ = ["TEXT_COLUMNS", "bare", "without_text"]

TEXT_COLUMNS = ("token_id", "token", "prompt")  # of the rows of tokens, when not redacted

_TEXT_KEYS = {
    "token", "token_ids", "tokens", "text", "prompt", "ids", "banned", "bias", "allowed", "allowed_token_ids",
    "bad_words", "bad_words_token_ids", "logit_bias", "stop", "stop_token_ids",
}  # fmt: skip


def bare(incident: Incident, rows: Sequence[Mapping[str, Any]]) -> tuple[Incident, list[dict[str, Any]]]:
    """What may be shown: all but credentials or, when redacted, without the columns and details of ids and text.

    Sentences of the diagnosis stay as they are otherwise.
    """
    incident = replace(
        incident,
        engine=without_credentials(incident.engine),
        config=without_credentials(incident.config),
        text=masked(incident.text),
        diagnosis=_sentences(incident.diagnosis),
    )
    if not incident.redacted:
        return incident, [dict(row) for row in rows]
    diagnosis = incident.diagnosis
    if diagnosis is not None:
        details = diagnosis.get("details") or {}
        counts = {k: v for k, v in details.items() if k == "tokens" and isinstance(v, int)}
        evidence = [{**e, "details": without_text(e.get("details"))} for e in diagnosis.get("evidence", ())]
        diagnosis = {**diagnosis, "evidence": evidence, "details": without_text(details) | counts}
    kept = [{k: v for k, v in row.items() if k not in TEXT_COLUMNS} for row in rows]
    return replace(incident, diagnosis=diagnosis, engine=without_text(incident.engine)), kept


def _sentences(value: Any) -> Any:
    """Without the credentials in texts: a diagnosis has no names of settings, and calls the text of a token so."""
    if isinstance(value, Mapping):
        return {k: _sentences(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_sentences(v) for v in value]
    return masked(value) if isinstance(value, str) else value


def without_text(value: Any) -> Any:
    """Values without the entries, at any depth, that hold ids or text."""
    if isinstance(value, Mapping):
        return {k: without_text(v) for k, v in value.items() if k not in _TEXT_KEYS}
    return [without_text(v) for v in value] if isinstance(value, list | tuple) else value
