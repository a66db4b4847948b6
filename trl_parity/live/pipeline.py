"""From an open window to what follows from it: noise floor, scalars, verdict, diagnosis, announcement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from typing import TYPE_CHECKING

from ..collectives import on_any
from ..metrics.reduction import reduce_many, reduce_sums
from ..metrics.statistics import compute
from ..metrics.sums import MismatchSums
from ..verdict import MismatchStats, Verdict
from .head_share import HeadShare
from .judge import RunJudge
from .stopwatch import Stopwatch
from .window import SPENT, OpenWindow

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Pipeline", "Surroundings"]


class Surroundings:
    """What can be had of a run when its window closes. Of a loop of one's own: nothing, only its numbers are known.

    Everything is called on all ranks at the same window.
    """

    accelerator: Accelerator | None = None  # with several ranks
    accounts = False  # whether a window holds what measuring it cost

    def check_engine(self) -> None:
        """Look at the engine's settings before the window is judged."""

    def floor_sums(self) -> Mapping[str, Sequence[MismatchSums]] | None:
        """This rank's sums of one side against itself, by source and group; None where there is nothing to measure on.

        As many groups on each rank.
        """
        return None

    def all_tokens(self) -> MismatchSums | None:
        """What changes in the window's sums, over all ranks, where each token of its last batch is scored.

        None where all were, or where it can't be done.
        """
        return None

    def add_to(self, sums: MismatchSums) -> None:
        """Add to this rank's sums what is looked at once a window."""

    def scalars(self) -> Mapping[str, float | None]:
        """What belongs to the window that closes beside what was measured."""
        return {}

    def on_verdict(self, verdict: Verdict, sums: MismatchSums) -> None:
        """A window was judged; its reduced sums."""

    def diagnose(self, verdict: Verdict) -> None:
        """Look for the cause where it is due."""

    def announce(self, verdict: Verdict) -> str:
        """The text of an alert, told to who watches this process."""
        return f"{verdict.status} at step {verdict.step}: {verdict.reason}"


class Pipeline:
    """The open ``window`` of a run, how it is judged and what is done then. No trainer is known here."""

    def __init__(self, judge: RunJudge, surroundings: Surroundings):
        self._judge, self._surroundings = judge, surroundings
        self.window = OpenWindow(judge.config.bootstrap_samples)
        self.stopwatch = Stopwatch()  # "cost", and what is no part of it
        self.head = HeadShare(judge.config.cost_budget)
        self._doubted = False  # the sample that the last window was

    def close_window(self, step: int) -> Verdict:
        """Judge the open window; another begins at ``step``. Collective: all ranks come here at the same batch."""
        judge, surroundings = self._judge, self._surroundings
        with self.stopwatch.account("cost"):
            surroundings.check_engine()
            if judge.floor.due:
                self._measure_floor()
            sums, spent = self._reduced()
            verdict = self._judged(step, sums, spent)
            judge.stages.forget()
            self.window.begin(step)
            judge.keep(verdict)
            with judge.stages("head share"):
                self.head.update(sums, calm=judge.calm and not self._doubted)
            surroundings.on_verdict(verdict, sums)
            surroundings.diagnose(verdict)
            if verdict.alert:
                judge.alert(verdict, surroundings.announce(verdict))
        return verdict

    def _judged(self, step: int, sums: MismatchSums, spent: Mapping[str, float | None]) -> Verdict:
        """The verdict on reduced sums: the same on every rank, also where judging failed on one. Collective."""
        judge, accelerator = self._judge, self._surroundings.accelerator
        breaker = copy(judge.breaker)
        stats: MismatchStats | None = None
        verdict: Verdict | None = None
        beside: dict[str, float | None] = {}
        doubts = thin = False
        with judge.stages("statistics"):
            beside = {**spent, **self._surroundings.scalars()}
            stats = compute(sums).updated(beside)
            beside |= judge.of_replicas(sums, stats)
            stats = judge.scalars(stats.updated(beside), new_window=True)
            thin, doubts = judge.doubts_sample(stats), judge.doubts_floor(stats)
        if not (doubts or thin):
            verdict = self._decided(step, stats)
        failed, doubts, thin = on_any((bool(judge.stages.unjudged), doubts, thin), accelerator)
        self._doubted = thin
        if thin and not failed:
            more = self._surroundings.all_tokens()
            with judge.stages("statistics"):
                if more is not None:
                    sums.add_(more)
                stats = judge.scalars(compute(sums).updated(beside))
                doubts = judge.doubts_floor(stats)
            failed, doubts = on_any((bool(judge.stages.unjudged), doubts), accelerator)
            if not doubts:
                verdict = self._decided(step, stats)
                [failed] = on_any((bool(judge.stages.unjudged),), accelerator)
        if doubts and not failed:
            self._measure_floor()
            with judge.stages("statistics"):
                assert stats is not None
                stats = judge.scalars(stats)
            verdict = self._decided(step, stats)
            [failed] = on_any((bool(judge.stages.unjudged),), accelerator)
        return judge.unjudged(step, breaker, accelerator) if failed or verdict is None else verdict

    def _decided(self, step: int, stats: MismatchStats | None) -> Verdict | None:
        """On this rank; None where judging failed."""
        judge = self._judge
        with judge.stages("verdict"):
            return None if judge.stages.unjudged else judge.decide(step, stats, self.window.error)
        return None

    def _reduced(self) -> tuple[MismatchSums, dict[str, float | None]]:
        """The window's sums over all ranks, on the host; and what the window before cost after its verdict."""
        spent: dict[str, float | None] = {}
        accelerator = self._surroundings.accelerator
        device = "cpu" if accelerator is None else accelerator.device
        self._surroundings.add_to(self.window.sums(device))
        sums = self.window.settled(device, self._judge.stages)
        if self._surroundings.accounts:
            seconds, wall = self.stopwatch.lap()
            floor = seconds.get("floor", 0.0)
            spent = self._spent(seconds)
            sums.bump(cost_seconds=seconds.get("cost", 0.0), floor_seconds=floor, wall_seconds=wall)
        if accelerator is not None:
            sums = reduce_sums(sums, accelerator)
        sums = sums.cpu()
        self._judge.floor.account(*sums.span("floor_seconds", "wall_seconds").tolist())
        return sums, spent

    def _spent(self, seconds: Mapping[str, float]) -> dict[str, float | None]:
        """Seconds of what is done a few times a run, mean over ranks; all of them did it, or none. Collective then."""
        accelerator = self._surroundings.accelerator
        found: dict[str, float | None] = {
            name: seconds[account] for name, account in SPENT.items() if account in seconds
        }
        if found and accelerator is not None and accelerator.num_processes > 1:
            import torch

            values = torch.tensor(list(found.values()), dtype=torch.float64, device=accelerator.device)
            found = dict(zip(found, accelerator.reduce(values, "mean").tolist(), strict=True))
        return found

    def _measure_floor(self) -> None:
        """Measure the noise floor on the batch at hand, where there is one. Collective."""
        if not self._judge.floor.enabled:
            return
        with self.stopwatch.account("floor"):
            measured = self._surroundings.floor_sums()
            if measured is None:
                return
            accelerator = self._surroundings.accelerator
            many = [sums for found in measured.values() for sums in found]
            reduced = iter(many if accelerator is None else reduce_many(many, accelerator))
            judge, before = self._judge, deepcopy(self._judge.floor)
            failed = True
            with judge.stages("floor in force"):
                judge.floor.update({name: [next(reduced) for _ in found] for name, found in measured.items()})
                failed = False
            [failed] = on_any((failed,), accelerator)
            if failed:  # on a rank: all go on with the older one
                judge.floor = before
                judge.floor.missed()
