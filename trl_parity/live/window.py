"""Sums on their way to a verdict, and from a verdict to the trainer's log."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ..collectives import on_any
from ..metrics.reduction import reduce_sums
from ..metrics.statistics import compute, measure_policy_drift
from ..metrics.sums import MismatchSums
from ..verdict import MismatchStats, Status, Verdict, worst
from .judge import RunJudge
from .stages import Stages

__all__ = ["SPENT", "OpenWindow", "UnloggedWindows"]

# scalars of what is done a few times a run -> its account
SPENT = {"cost/diagnosis_seconds": "diagnosis", "cost/incident_seconds": "incident"}

_UPDATES = 16  # loss computations whose log-probs are kept before they are measured


class OpenWindow:
    """The window that batches are added to, on one rank, and how a checkpoint carries it.

    ``start``: optimizer steps done when it began. ``batches``: rollout batches in it. ``error``: the last measurement
    of it that failed, in words.
    """

    def __init__(self, bootstrap_samples: int, start: int = 0):
        self._bootstrap_samples = bootstrap_samples
        self._saved: MismatchSums | None = None  # over all ranks, as the checkpoint keeps it
        self._updates: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.begin(start)

    def begin(self, start: int) -> None:
        """An empty window from this optimizer step on."""
        self.start, self.batches, self.error = start, 0, ""
        self._sums: MismatchSums | None = None

    def sums(self, device: torch.device | str) -> MismatchSums:
        """This rank's, to be added to in place."""
        if self._sums is None:
            self._sums = MismatchSums.zeros(device, self._bootstrap_samples)
        return self._sums

    def add(self, sums: MismatchSums, error: str, stages: Stages | None = None) -> None:
        """One rollout batch. That there was one is known whatever fails of it: ranks decide by it."""
        self.batches += 1
        self.error = error or self.error
        with stages("sums") if stages is not None else nullcontext():
            self._sums = added(self._sums, sums)

    def add_update(self, new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep what the policy drift of one loss computation is measured from; a window's are measured together."""
        self._updates.append((new, old, mask))
        if len(self._updates) >= _UPDATES:
            self.add_updates()

    def add_updates(self) -> None:
        """Measure the policy drift of the updates that wait for it."""
        waiting, self._updates = self._updates, []
        for new, old, mask in waiting:
            measure_policy_drift(self.sums(new.device), new, old, mask)

    def settled(self, device: torch.device | str, stages: Stages) -> MismatchSums:
        """As ``sums``, with nothing in them that can still fail: what did is counted. They can be reduced."""
        with stages("policy drift"):
            self.add_updates()
        sums = self.sums(device)
        with stages("sums"):
            sums.settle()
        if stages.unmeasured:
            self.error, stages.unmeasured = self.error or stages.unmeasured, ""
            sums.bump(errors=1)
        return sums

    def carry(self, accelerator: Any, stages: Stages) -> None:
        """Reduce it, so that rank 0's checkpoint holds all of it. Collective."""
        self._saved = None
        [begun] = on_any((self._sums is not None or bool(self._updates or stages.unmeasured),), accelerator)
        if not begun:
            return
        self._saved = reduce_sums(self.settled(accelerator.device, stages), accelerator)
        fresh = MismatchSums.zeros(accelerator.device, self._bootstrap_samples)
        self._sums = self._saved.copy() if accelerator.is_main_process else fresh

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sums as last carried."""
        saved = None if self._saved is None else self._saved.to_sparse()
        return {"window_start": self.start, "open_batches": self.batches, "window": saved}

    def load_state(self, state: dict[str, Any], device: torch.device, main: bool) -> bool:
        """Restore ``state``: rank 0 gets the sums of all ranks. False where ``bootstrap_samples`` has changed."""
        self.begin(int(state["window_start"]))
        saved = state["window"]
        if saved is None:
            return True
        if saved["bootstrap_samples"] != self._bootstrap_samples:
            return False
        self.batches = int(state["open_batches"])
        if main:
            self.sums(device).add_(MismatchSums.from_sparse(saved))
        else:
            self.sums(device)
        return True


class UnloggedWindows:
    """The windows since the trainer last logged, merged: no means of means. All from reduced numbers."""

    def __init__(self) -> None:
        self._sums: MismatchSums | None = None
        self._status, self._streak, self._level = Status.OK, 0, 0.0  # the worst, the longest, the highest
        self._only: MismatchStats | None = None  # while it is one
        self._windows = 0
        self._spent: dict[str, float | None] = {}

    def __bool__(self) -> bool:
        return self._windows > 0

    def add(self, verdict: Verdict, sums: MismatchSums) -> None:
        """One window that was judged."""
        self._windows += 1  # first: whether there is a row is the same on every rank, whatever fails of it
        self._only = verdict.stats if self._windows == 1 else None
        self._sums = added(self._sums, sums)
        self._status = worst((self._status, verdict.status))
        self._streak, self._level = max(self._streak, verdict.streak), max(self._level, verdict.level)
        for name in SPENT:
            if verdict.stats is not None and (seconds := verdict.stats.get(name)) is not None:
                self._spent[name] = (self._spent.get(name) or 0.0) + seconds

    def scalars(self, judge: RunJudge) -> dict[str, float | None]:
        """Every scalar of them as one window, with the worst status and the longest streak."""
        assert self._sums is not None
        stats = self._only
        if stats is None:
            stats = judge.scalars(compute(self._sums)).updated(judge.evidence.scalars() | judge.replicas.scalars)
        return {
            **stats.values_by_name,
            **self._spent,
            "breaker/status": self._status.code,
            "breaker/streak": self._streak,
            "breaker/level": self._level,
            "breaker/windows": self._windows,
        }


def added(sums: MismatchSums | None, more: MismatchSums) -> MismatchSums:
    """``sums`` with ``more`` added in place; ``more`` itself where there are none."""
    if sums is None:
        return more
    sums.add_(more)
    return sums
