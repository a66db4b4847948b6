"""What of a drift was learned from before the halt, and from where to go on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.parity import ParityConfig
from ..verdict import Verdict
from .counted import counted

__all__ = ["Learned", "last_checkpoint_before", "learned_from", "recovery"]


@dataclass(frozen=True, slots=True)
class Learned:
    """Optimizer steps of the drift: ``first`` of its windows, ``last`` that was applied (before ``first``: none)."""

    first: int
    last: int


def learned_from(verdict: Verdict, verdicts: Sequence[Verdict], config: ParityConfig) -> Learned:
    """From the first window that led to this halt on. ``verdicts``: up to it, oldest first."""
    start = counted(verdict, config, verdicts).windows[0].step
    before = [v.step for v in verdicts if v.step < start]
    first = max(start - config.every_n_steps, *before[-1:], 0) + 1
    return Learned(first, verdict.step if config.action == "log" else verdict.step - 1)


def last_checkpoint_before(output_dir: Path, step: int) -> Path | None:
    """The trainer's newest checkpoint that has nothing of this step or a later one in its weights."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d{1,12})", folder.name)
        if match and int(match[1]) < step and (folder / "trainer_state.json").is_file():
            found.append((int(match[1]), folder))
    return max(found)[1] if found else None


def recovery(learned: Learned, checkpoint: Path | None, action: str) -> tuple[str, str]:
    """In words, and what resumes, if anything does. ``checkpoint``: the last one from before the drift."""
    first, last = learned.first, learned.last
    if last < first:
        text = "no step of it was learned from."
    elif action == "log":
        text = f"steps {first} to {last} were learned from, and what follows will be."
    else:
        steps = f"step {first} was" if last == first else f"steps {first} to {last} were"
        text = f"{steps} learned from before it was sure; step {last + 1} was not."
    if checkpoint is not None:
        text += f" Once it is mended, roll back to the last checkpoint from before step {first}:"
        return text, f"trainer.train(resume_from_checkpoint={str(checkpoint)!r})"
    if last >= first:
        text += f" There is no checkpoint from before step {first} to roll back to (save_steps)."
    if action != "stop":
        return text, ""
    text += " Once it is mended, go on from the one that is saved now:"
    return text, "trainer.train(resume_from_checkpoint=True)"
