"""Verdicts, histograms and tables to W&B and trackio. One that fails warns once, and is tried again."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ConfigError
from ..metrics.statistics import log_ratio_histogram
from ..metrics.sums import MismatchSums
from ..verdict import Status, Verdict

__all__ = ["AlertSink", "RichLog", "TrackioSink", "WandbSink", "alert_sinks"]

logger = logging.getLogger(__name__)

_VERDICTS = 50  # windows that were not healthy, in the table of verdicts

_ALERTS = 8  # that wait for a tracker, the newest

_PAUSES = (0.0, 0.5, 2.0)  # seconds before each try to tell of a HALT

# what a run's summary keeps of a scalar besides its last value: the worst of it
_WORST = {
    **dict.fromkeys(
        ("kl_k3", "own_head/kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99", "logp_abs_diff/max",
         "ratio/out_of_band", "excess/kl_k3", "excess/logp_abs_diff/mean", "honesty_gap", "nonfinite_rate",
         "breaker/status", "breaker/streak"), "max",
    ),
    **dict.fromkeys(("ess", "seq/ess", "entropy/trainer"), "min"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RichLog:
    """A window's objects beyond scalars. Rows as ``trl_parity.metrics.tokens`` makes them."""

    step: int
    sums: MismatchSums
    worst: list[dict[str, Any]]
    sample: list[dict[str, Any]]
    verdicts: Sequence[Verdict]  # the last ones, this window's the newest


class AlertSink(Protocol):
    """A tracker that takes alerts, rich objects, and scalars outside a trainer."""

    def alert(self, verdict: Verdict, text: str) -> None:
        """Send an alert."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log scalars."""

    def log_rich(self, rich: RichLog) -> None:
        """Log a window's histogram and tables."""

    def tell(self, verdict: str) -> None:
        """Keep the verdict in words with the run, in place of the one before."""

    def before_row(self, step: int) -> None:
        """The trainer's next row is about this step."""


def alert_sinks(report_to: Iterable[str]) -> list[AlertSink]:
    """A sink for each tracker of ``report_to`` that has alerts. Raises ConfigError when one is not installed."""
    kinds: dict[str, Callable[[], AlertSink]] = {"wandb": WandbSink, "trackio": TrackioSink}
    return [kinds[name]() for name in report_to if name in kinds]


class _GuardedSink:
    """Base of sinks on a tracker: a failure warns once, never ends the run, and does not end this sink.

    After n failures in a row the next 2^n - 1 calls (63 at most) are left out, so that a tracker that is down costs
    few waits. An alert that failed is kept, and sent before what comes next; that of a HALT is tried at once, three
    times: the run may be over then. In a trainer the scalars don't pass here: they reach the tracker through it, as
    they reach every other reporter.
    """

    name = ""

    def __init__(self) -> None:
        try:
            self._module = importlib.import_module(self.name)
        except ImportError as e:
            raise ConfigError(
                f"report_to names {self.name}, which is not installed. Run: pip install 'trl-parity[{self.name}]'."
            ) from e
        self._failures = self._rest = 0  # in a row; calls to leave out
        self._told = False
        self._unsent: list[Callable[[], Any]] = []  # alerts

    def _guarded(self, send: Callable[[], Any]) -> None:
        """Send, with the alerts that wait, unless the tracker has failed just now."""
        if self._rest:
            self._rest -= 1
        elif self._caught_up():
            self._sent(send)

    def _caught_up(self) -> bool:
        while self._unsent and self._sent(self._unsent[0]):
            del self._unsent[0]
        return not self._unsent

    def flush(self) -> None:
        """Send the alerts that wait: the run is over."""
        self._caught_up()

    def _sent(self, send: Callable[[], Any]) -> bool:
        try:
            send()
        except Exception as e:  # a tracker must not take the run down, whatever it raises
            self._failures += 1
            self._rest = 2 ** min(self._failures, 6) - 1
            if not self._told:
                self._told = True
                logger.warning(
                    "%s failed (%s: %s); metrics.jsonl goes on, alerts and objects there are tried again.",
                    self.name,
                    type(e).__name__,
                    e,
                )
            return False
        self._failures = self._rest = 0
        return True

    def _alert(self, verdict: Verdict, send: Callable[[], Any]) -> None:
        """Send an alert now, whatever has failed before; or keep it."""
        for pause in _PAUSES if verdict.halted else _PAUSES[:1]:
            time.sleep(pause)
            if self._sent(send):
                return
        self._unsent = [*self._unsent, send][-_ALERTS:]

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._module.log({**values, "train/global_step": step})

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log scalars at ``train/global_step`` = ``step``."""
        self._guarded(lambda: self._log(step, scalars))

    def log_rich(self, rich: RichLog) -> None:
        """Log a histogram of log-ratios and the tables of verdicts, worst tokens and sampled tokens."""
        self._guarded(lambda: self._log(rich.step, _objects(self._module, rich)))

    def tell(self, verdict: str) -> None:
        """Keep nothing: not every tracker has a summary."""

    def before_row(self, step: int) -> None:
        """Do nothing: most trackers are told a row's step."""


def _objects(module: Any, rich: RichLog) -> dict[str, Any]:
    """W&B's and trackio's histogram and table take the same arguments."""
    objects: dict[str, Any] = {}
    if (histogram := log_ratio_histogram(rich.sums)) is not None:
        objects["parity/log_ratio"] = module.Histogram(np_histogram=histogram)
    told = [v for v in rich.verdicts[:-1] if v.status not in (Status.OK, Status.CALIBRATING)][-_VERDICTS:]
    verdicts = [
        {"step": v.step, "status": str(v.status), "streak": v.streak, "verdict": v.reason or "healthy"}
        for v in [*told, *rich.verdicts[-1:]]
    ]
    tables = {"verdicts": verdicts, "worst_tokens": rich.worst, "tokens": rich.sample}
    for name, rows in tables.items():
        if rows:
            data = [list(row.values()) for row in rows]
            objects[f"parity/{name}"] = module.Table(columns=list(rows[0]), data=data)
    return objects


class WandbSink(_GuardedSink):
    """Alerts and rich objects on the active W&B run (main process only)."""

    name = "wandb"

    def __init__(self) -> None:
        super().__init__()
        self._defined: Any = None  # the run whose metrics are

    def _guarded(self, send: Callable[[], Any]) -> None:
        if self._module.run is not None:
            super()._guarded(send)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._module.run.log({**values, "train/global_step": step})

    def define_metrics(self) -> None:
        """Axes, and what the run's summary keeps of a scalar: its last value and the worst one."""
        self._guarded(self._define)

    def _define(self) -> None:
        run = self._module.run
        if run is self._defined:
            return
        run.define_metric("parity/*", step_metric="train/global_step", step_sync=True)
        for prefix in ("train/parity", "parity"):  # the trainer's reporter, and a monitor outside a trainer
            for name, worst in _WORST.items():
                run.define_metric(
                    f"{prefix}/{name}", step_metric="train/global_step", step_sync=True, summary=f"{worst},last"
                )
        self._defined = run

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log scalars at ``train/global_step`` = ``step``."""
        self.define_metrics()
        super().log(step, scalars)

    def log_rich(self, rich: RichLog) -> None:
        """The same, and the verdict in words in the run's summary."""
        super().log_rich(rich)
        if rich.verdicts:
            v = rich.verdicts[-1]
            self.tell(f"{v.status} at step {v.step}" + (f": {v.reason}" if v.reason else ""))

    def tell(self, verdict: str) -> None:
        """Keep the verdict as ``parity/verdict`` in the run's summary."""
        self._guarded(lambda: self._module.run.summary.update({"parity/verdict": verdict}))

    def make_panels(self) -> None:
        """The ready-made workspace in the active run's project; nothing for an offline run. Never raises."""
        run = self._module.run
        if run is None or run.offline:
            return
        try:
            from .workspace import create

            url, made = create(run.project, run.entity)
        except Exception as e:  # whatever the client raises: panels are no reason to end a run
            logger.warning("no W&B panels: %s. The run goes on; `trl-parity panels` makes them later.", e)
        else:
            logger.info("W&B panels %s: %s", "made" if made else "are there", url)

    def alert(self, verdict: Verdict, text: str) -> None:
        """Send a W&B alert: level WARN, or ERROR for a halt."""

        def send() -> None:
            level = self._module.AlertLevel.ERROR if verdict.halted else self._module.AlertLevel.WARN
            self._module.run.alert(title=_title(verdict), text=text, level=level)

        if self._module.run is not None:
            self._alert(verdict, send)


class TrackioSink(_GuardedSink):
    """Alerts and rich objects on the current trackio run."""

    name = "trackio"

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log scalars at ``train/global_step`` = ``step``, which is trackio's step as well."""
        self._guarded(lambda: self._module.log({**scalars, "train/global_step": step}, step=step))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._module.log({**values, "train/global_step": step}, step=step)
        self.before_row(step)

    def before_row(self, step: int) -> None:
        """TrackioCallback names no step, and trackio counts rows: let it count on from here."""

        def send() -> None:
            self._module.context_vars.current_run.get()._next_step = step

        self._guarded(send)

    def alert(self, verdict: Verdict, text: str) -> None:
        """Send a trackio alert: level warn, or error for a halt."""

        def send() -> None:
            level = self._module.AlertLevel.ERROR if verdict.halted else self._module.AlertLevel.WARN
            self._module.alert(title=_title(verdict), text=text, level=level)

        self._alert(verdict, send)


def _title(verdict: Verdict) -> str:
    return f"trl-parity {verdict.status} at step {verdict.step}"
