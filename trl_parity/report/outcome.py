"""What a run came to, in words: the same in every report, on every line and in W&B's summary."""

from __future__ import annotations

from ..judging.course import Course
from ..verdict import JUDGED, Status, Verdict, enough_judged, judged, worst

__all__ = ["halts_in_words", "outcome", "window_in_words"]


def outcome(course: Course, *, reason: str = "") -> tuple[Status, str]:
    """The status a run came to, and half a sentence: healthy or not, since when.

    A halt that is over is told, and is no longer the status. ``reason``: the last window's.
    """
    if not course.counts:
        return Status.NO_DATA, "no window was measured"
    over = course.recovered
    if course.halted:
        return Status.HALT, halts_in_words(course)
    counts = course.recent
    status, total = worst(counts), sum(counts.values())
    missing = total - judged(counts)
    windows = f"{total:,} windows" + (f" since step {course.since}" if over else "")
    of = f"{counts[status]:,} of {windows}"
    if status is Status.BREACH:
        text = f"{of} over a limit, none halted"
    elif status is Status.ERROR:
        text = f"{of} could not be measured"
    elif status is Status.WARN:
        text = f"never over a limit{f' since step {course.since}' if over else ''}; {of} near one or watched"
    elif missing == total:
        status = Status(max(counts, key=counts.__getitem__))
        text = f"{windows}, none judged healthy or ill ({reason or 'no noise floor yet'})"
    elif not missing:
        text = f"healthy in all {windows}, to step {course.step}"
    else:  # healthy where it was judged
        status = Status.OK if enough_judged(counts) else worst(s for s in counts if s not in JUDGED)
        text = f"healthy in {counts['OK']:,} of {windows}, to step {course.step}"
    if 0 < missing < total:
        names = ", ".join(f"{n:,} {name}" for name, n in counts.items() if name not in JUDGED)
        text += f"; {missing:,} not judged ({names})"
    return status, f"{text}; {halts_in_words(course)}" if over else text


def halts_in_words(course: Course) -> str:
    """``halted at step 3``, or of a halt that is over ``halted once at step 3, resumed``; nothing without one."""
    if not course.halts:
        return ""
    at, first = course.last_halt, course.first_halt
    if course.standing:
        return f"halted at step {at}" + (f", {course.halts} times since step {first}" if course.halts > 1 else "")
    often = f"once at step {at}" if course.halts == 1 else f"{course.halts} times, at steps {first} to {at}"
    after = {"log": f"and learned on; OK since step {course.since}", "skip_update": "its updates dropped"}
    return f"halted {often}, {after.get(course.action, 'resumed')}"


def window_in_words(verdict: Verdict, course: Course) -> str:
    """The last window, and that the run was halted before it."""
    text = f"{verdict.status} at step {verdict.step}" + (f": {verdict.reason}" if verdict.reason else "")
    return text if course.standing or not course.halts else f"{text}; {halts_in_words(course)}"
