"""The folder a halt leaves: ``incident.json``, ``tokens.parquet``, ``report.md`` and pictures, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import jsonable, require_no_link
from ..results.incident import _KINDS, Incident, incident_folder
from ..results.redaction import TEXT_COLUMNS, bare
from . import figures
from .drawing import draw
from .markdown import report_markdown
from .summary import summary_of

__all__ = ["write_incident"]

logger = logging.getLogger(__name__)

_COLUMNS = {
    "sequence": "int64", "position": "int64", "token_id": "int64", "token": "string", "prompt": "string",
    "rollout_logprob": "float64", "trainer_logprob": "float64", "log_ratio": "float64", "entropy": "float64",
    "compared": "bool_",
}  # fmt: skip


_NO_PICTURES = "Without pictures: training went on. Run: trl-parity report . --html report.html"


def write_incident(
    parity_dir: Path,
    incident: Incident,
    rows: list[dict[str, Any]],
    text: Callable[[Path], str] | None = None,
    *,
    pictures: bool = True,
) -> Path:
    """Write the folder whole or not at all, and return it. Raises ConfigError where that can't be done.

    A folder of the same step is left as it is; this one is called ``step-<n>-2`` then, ``-3`` and so on. A picture
    that can't be drawn is left out, and the report says so. When redacted, columns and details that hold ids or text
    are dropped whatever is given; sentences are not looked into. ``text``: the incident's, given its folder.
    ``pictures``: whether they are drawn now, which takes seconds; else the report says how to have them.
    """
    while True:
        folder = incident_folder(Path(parity_dir), incident.step)
        if text is not None:
            incident = replace(incident, text=text(folder))
        if _write_whole(folder, incident, rows, pictures):
            return folder


def _write_whole(folder: Path, incident: Incident, rows: list[dict[str, Any]], pictures: bool) -> bool:
    """Whether the folder was written; not where another process has made it meanwhile."""
    incident, rows = bare(incident, rows)
    home = folder.parent
    temporary = home / f".step-{incident.step}.{uuid.uuid4().hex[:12]}.tmp"
    content = json.dumps(jsonable({name: getattr(incident, name) for name in _KINDS}), indent=2, allow_nan=False)
    try:
        require_no_link(home)
        home.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(mode=0o777 if incident.redacted else 0o700)  # text is for this user alone
        (temporary / "incident.json").write_text(content + "\n", encoding="utf-8")
        _write_tokens(temporary / "tokens.parquet", rows, incident.redacted)
        drawn: dict[str, bytes] = {}
        note = _NO_PICTURES
        if pictures:
            drawn, note = draw(figures.INCIDENT_PICTURES, summary_of(incident, rows))
            if note:
                logger.warning("the incident at step %d: %s", incident.step, note)
        for name, png in drawn.items():
            (temporary / name).write_bytes(png)
        report = report_markdown(incident, rows, list(drawn), note=note)
        (temporary / "report.md").write_text(report, encoding="utf-8", newline="\n")
        return _rename(temporary, folder)
    except OSError as e:
        raise ConfigError(
            f"cannot write {home / f'step-{incident.step}'}: {e.strerror or e}. Expected a writable directory with "
            "room; set parity_dir or output_dir."
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(path: Path, rows: list[dict[str, Any]], redacted: bool) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {name: kind for name, kind in _COLUMNS.items() if not (redacted and name in TEXT_COLUMNS)}
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in columns.items()])
    parquet.write_table(pyarrow.Table.from_pylist([_encodable(row) for row in rows], schema=schema), path)


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """Lone surrogates, which UTF-8 lacks, as escapes."""
    return {k: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for k, v in row.items()}


def _rename(temporary: Path, folder: Path) -> bool:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not os.path.lexists(folder):
            raise
        return False
    return True
