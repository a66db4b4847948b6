"""Where verdicts go besides the trainer's own metrics: ``metrics.jsonl`` always, rich objects to W&B.

A sink that can't be set up fails before the first step; one that fails later warns once and the run goes on.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .metrics import MismatchSums, log_ratio_histogram
from .records import Verdict

__all__ = ["SCHEMA_VERSION", "JsonlSink", "WandbSink"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


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


class WandbSink:
    """Histogram of log-ratios, table of the worst tokens and alerts, on the active W&B run (main process only).

    The scalars don't pass here: they reach W&B through the trainer, as they reach every other reporter.
    """

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as e:
            raise ConfigError(
                "report_to names wandb, which is not installed. Run: pip install 'trl-parity[wandb]'."
            ) from e

        self._wandb = wandb
        self._failed = False

    def log_rich(self, step: int, sums: MismatchSums, worst: list[dict[str, Any]]) -> None:
        """Log a window's histogram and worst tokens at ``train/global_step`` = ``step``."""
        histogram = log_ratio_histogram(sums)
        objects: dict[str, Any] = {}
        if histogram is not None:
            objects["parity/log_ratio"] = self._wandb.Histogram(np_histogram=histogram)
        if worst:
            table = self._wandb.Table(columns=list(worst[0]), data=[list(row.values()) for row in worst])
            objects["parity/worst_tokens"] = table
        if objects:
            self._guarded(lambda run: run.log({**objects, "train/global_step": step}))

    def alert(self, verdict: Verdict, text: str) -> None:
        """Send a W&B alert."""
        title = f"trl-parity {verdict.status} at step {verdict.step}"
        self._guarded(lambda run: run.alert(title=title, text=text, level=self._wandb.AlertLevel.ERROR))

    def _guarded(self, send: Any) -> None:
        run = self._wandb.run
        if run is None or self._failed:
            return
        try:
            send(run)
        except Exception as e:  # a tracker must not take the run down, whatever it raises
            self._failed = True
            logger.warning("W&B failed (%s: %s); metrics.jsonl goes on, W&B objects stop.", type(e).__name__, e)
