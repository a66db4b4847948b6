"""Where verdicts go besides the trainer's own metrics: ``metrics.jsonl`` always, rich objects to W&B.

A sink that can't be set up fails before the first step; one that fails later warns once and the run goes on.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from .errors import ConfigError
from .metrics import MismatchSums, log_ratio_histogram
from .records import Verdict

__all__ = ["SCHEMA_VERSION", "AlertSink", "JsonlSink", "TrackioSink", "WandbSink", "alert_sinks"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2


class JsonlSink:
    """``metrics.jsonl``: one JSON object per window, each written whole in one call: a kill tears one at most.

    ``resume_step=0`` starts a new file and keeps an old one as ``metrics-<n>.jsonl``. ``resume_step > 0`` goes on
    after the windows up to that step; later ones, which the resumed run measures again, and a torn last line move
    to ``metrics.superseded.jsonl``.
    """

    def __init__(self, directory: str | Path, resume_step: int = 0):
        self.path = Path(directory) / "metrics.jsonl"
        self._failed = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size:
                self._take_over(resume_step)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run
        except OSError as e:
            raise ConfigError(
                f"cannot write {self.path}: {e.strerror}. Expected a writable directory; set parity_dir or output_dir."
            ) from e

    def _take_over(self, resume_step: int) -> None:
        if resume_step == 0:
            n = 1
            while (kept := self.path.with_name(f"metrics-{n}.jsonl")).exists():
                n += 1
            os.replace(self.path, kept)
            logger.info("an earlier run's %s is kept as %s", self.path, kept.name)
            return
        keep: list[bytes] = []
        drop: list[bytes] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            (keep if _step_of(line) <= resume_step else drop).append(line)
        if not drop:
            return
        with open(self.path.with_name("metrics.superseded.jsonl"), "ab") as superseded:
            superseded.writelines(line if line.endswith(b"\n") else line + b"\n" for line in drop)
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_bytes(b"".join(keep))
        os.replace(temporary, self.path)

    def write(self, verdict: Verdict) -> None:
        """Append one window. A failure (disk full, say) warns once; later windows are still tried."""
        line = json.dumps({"schema_version": SCHEMA_VERSION, **verdict.to_dict()}, allow_nan=False).encode() + b"\n"
        try:
            # after a failure a torn line may stand at the end: begin on a fresh one
            line = b"\n" + line if self._failed else line
            if self._file.write(line) != len(line):
                raise OSError("short write")
        except OSError as e:
            if not self._failed:
                logger.warning("cannot write %s: %s. Training goes on; windows may be missing there.", self.path, e)
            self._failed = True
        else:
            self._failed = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: bytes) -> float:
    """The step of a whole line; infinity for a torn or foreign one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


class AlertSink(Protocol):
    """A tracker that takes alerts, and scalars outside a trainer."""

    def alert(self, verdict: Verdict, text: str) -> None:
        """Send an alert."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log scalars."""


def alert_sinks(report_to: Iterable[str]) -> list[AlertSink]:
    """A sink for each tracker of ``report_to`` that has alerts. Raises ConfigError when one is not installed."""
    kinds: dict[str, Callable[[], AlertSink]] = {"wandb": WandbSink, "trackio": TrackioSink}
    return [kinds[name]() for name in report_to if name in kinds]


class _GuardedSink:
    """Base of sinks on a tracker: a failure warns once and ends this sink, never the run."""

    name = ""

    def __init__(self) -> None:
        try:
            self._module = importlib.import_module(self.name)
        except ImportError as e:
            raise ConfigError(
                f"report_to names {self.name}, which is not installed. Run: pip install 'trl-parity[{self.name}]'."
            ) from e
        self._failed = False

    def _guarded(self, send: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            send()
        except Exception as e:  # a tracker must not take the run down, whatever it raises
            self._failed = True
            logger.warning(
                "%s failed (%s: %s); metrics.jsonl goes on, alerts and objects there stop.",
                self.name,
                type(e).__name__,
                e,
            )


class WandbSink(_GuardedSink):
    """Histogram of log-ratios, table of the worst tokens and alerts, on the active W&B run (main process only).

    In a trainer the scalars don't pass here: they reach W&B through it, as they reach every other reporter.
    """

    name = "wandb"

    def log_rich(self, step: int, sums: MismatchSums, worst: list[dict[str, Any]]) -> None:
        """Log a window's histogram and worst tokens at ``train/global_step`` = ``step``."""
        if self._module.run is None:
            return
        histogram = log_ratio_histogram(sums)
        objects: dict[str, Any] = {}
        if histogram is not None:
            objects["parity/log_ratio"] = self._module.Histogram(np_histogram=histogram)
        if worst:
            table = self._module.Table(columns=list(worst[0]), data=[list(row.values()) for row in worst])
            objects["parity/worst_tokens"] = table
        if objects:
            self._guarded(lambda: self._module.run.log({**objects, "train/global_step": step}))

    def make_panels(self) -> None:
        """The ready-made workspace in the active run's project; nothing for an offline run."""
        run = self._module.run
        if run is None or run.offline:
            return
        from .panels import create

        try:
            url, made = create(run.project, run.entity)
        except ConfigError as e:
            logger.warning("no panels: %s", e)
        else:
            logger.warning("W&B panels %s: %s", "made" if made else "are there", url)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log scalars at ``train/global_step`` = ``step``."""
        if self._module.run is not None:
            self._guarded(lambda: self._module.run.log({**scalars, "train/global_step": step}))

    def alert(self, verdict: Verdict, text: str) -> None:
        """Send a W&B alert: level WARN, or ERROR for a halt."""
        if self._module.run is not None:
            level = self._module.AlertLevel.ERROR if verdict.halted else self._module.AlertLevel.WARN
            self._guarded(lambda: self._module.run.alert(title=_title(verdict), text=text, level=level))


class TrackioSink(_GuardedSink):
    """Alerts (and scalars outside a trainer) on the current trackio run."""

    name = "trackio"

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log scalars at ``train/global_step`` = ``step``."""
        self._guarded(lambda: self._module.log({**scalars, "train/global_step": step}))

    def alert(self, verdict: Verdict, text: str) -> None:
        """Send a trackio alert: level warn, or error for a halt."""
        level = self._module.AlertLevel.ERROR if verdict.halted else self._module.AlertLevel.WARN
        self._guarded(lambda: self._module.alert(title=_title(verdict), text=text, level=level))


def _title(verdict: Verdict) -> str:
    return f"trl-parity {verdict.status} at step {verdict.step}"
