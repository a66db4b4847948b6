"""Pictures over optimizer steps and of evidence; those of tokens are in ``token_figures``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.rules import Rule
from ..judging.limits import allowed
from ..verdict import worst
from .drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, canvas, legend, png
from .escape import one_line
from .format import cut
from .token_figures import draw_by_entropy, draw_by_position, draw_histogram, draw_scatter

if TYPE_CHECKING:
    from ..results.reader import Columns
    from .summary import Summary

__all__ = ["INCIDENT_PICTURES", "REPORT_PICTURES", "draw_comparison", "draw_evidence", "draw_timeline"]

# marker, colour, filled, size
_MARKS: dict[str, tuple[str, str, bool, int]] = {
    "OK": ("o", GREEN, True, 18),
    "CALIBRATING": ("o", GREY, False, 18),
    "WARN": ("^", ORANGE, True, 44),
    "BREACH": ("s", VERMILION, True, 40),
    "HALT": ("X", BLACK, True, 110),
    "ERROR": ("P", PURPLE, True, 60),
    "NO_DATA": ("D", GREY, False, 24),
}

_MARKED = 60  # more windows than that: only those that are not healthy get a mark

_SIZES = (
    ("logp_abs_diff/mean", GREEN, "-", "|Δ| mean"),
    ("logp_abs_diff/p99", PURPLE, "-.", "|Δ| p99"),
    ("logp_abs_diff/max", ORANGE, "--", "|Δ| max"),
)

_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind words

_NEEDED = 0.5  # share of the excess that a named cause explains at least


def draw_timeline(summary: Summary) -> bytes | None:
    """k3 with floor and limit above, the size of log-ratios below where it is known; onset and halt."""
    c = summary.columns
    steps = np.array(c.steps)
    drift, floor = column(c, "trimmed/kl_k3", "kl_k3"), column(c, "floor/kl_k3")
    limit = np.array([drawn_limit(summary.rule, *x) for x in zip(column(c, "limit/kl_k3"), floor, strict=True)])
    limit[np.isnan(drift)] = np.nan
    shown = np.concatenate([drift, floor, limit])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if not (drift > 0).any() or not shown.size:
        return None
    sizes = [size for size in _SIZES if (column(c, size[0]) > 0).any()]
    figure, axes = canvas(6.4, rows=2, heights=(3, 2)) if sizes else canvas(4.8)
    above, below = axes if sizes else (axes, None)
    above.set_yscale("log")
    above.set_ylim(shown.min() / 2, shown.max() * 2)
    _curve(above, steps, drift, BLUE, "-", "k3 KL (trimmed)")
    _curve(above, steps, floor, SKY, "--", "noise floor")
    _curve(above, steps, limit, VERMILION, ":", "limit (with floor)")
    _marks(above, steps, drift, c.status)
    above.set_ylabel("k3, nats per token")
    if below is not None:
        for name, colour, style, label in sizes:
            _curve(below, steps, column(c, name), colour, style, label)
        below.set_yscale("log")
        below.set_ylabel("nats")
        above.tick_params(labelbottom=False)
    _over_steps([above] if below is None else [above, below], steps, c)
    above.set_title(_timeline_title(summary, drift), fontsize=11, parse_math=False)
    legend(figure, 4)
    return png(figure)


def _timeline_title(summary: Summary, drift: np.ndarray) -> str:
    c = summary.columns
    ended = f"worst status {worst(c.statuses)}"
    if (incident := summary.incident) is not None:
        breached = ", ".join(one_line(b) for b in incident.verdict.get("breaches") or ())
        ended = f"halted at step {incident.step}" + (f" on {breached}" if breached else "")
    elif c.first_halt is not None:
        ended = f"halted at step {c.first_halt}"
    notes = []
    if np.isposinf(drift).any():
        notes.append("infinite: on the upper edge")
    if np.isnan(drift).any() or (drift <= 0).any():
        notes.append("0 or not measured: on the lower edge")
    title = cut(f"{c.count:,} window{'s' * (c.count != 1)}: {ended}", 90)
    return title + (f"\n({'; '.join(notes)})" if notes else "")


def _over_steps(panels: Sequence[Any], steps: np.ndarray, columns: Columns) -> None:
    """The axis of steps of each panel, and the onset."""
    margin = 0.03 * (steps.max() - steps.min()) or 1.0
    for panel in panels:
        if columns.onset is not None:
            label = f"onset, step {columns.onset}" if panel is panels[0] else None
            panel.axvline(
                columns.onset - 0.5, color=BLACK, linewidth=1.4, linestyle=(0, (6, 2)), zorder=2.8, label=label
            )
        panel.grid(alpha=0.3)
        panel.set_xlim(steps.min() - margin, steps.max() + margin)
        panel.xaxis.get_major_locator().set_params(integer=True)
    more = f" (a point is the mean of {columns.width} windows)" if columns.width > 1 else ""
    panels[-1].set_xlabel(f"optimizer step{more}")


def _marks(axes: Any, steps: np.ndarray, drift: np.ndarray, statuses: Sequence[str]) -> None:
    """A marker a window by its status; what lies outside the axis is drawn on its edge."""
    low, high = axes.get_ylim()
    status = np.array(statuses)
    at = np.where(np.isnan(drift), low, np.clip(np.nan_to_num(drift, nan=low, posinf=high), low, high))
    for name, (marker, colour, filled, size) in _MARKS.items():
        of = status == name
        if not of.any() or (name == "OK" and len(steps) > _MARKED):
            continue
        halt = name == "HALT"
        face, edge = colour if filled else "white", "white" if halt else colour
        look = {"marker": marker, "facecolors": face, "edgecolors": edge, "zorder": 4 if halt else 3}
        axes.scatter(steps[of], at[of], s=size, linewidths=1, clip_on=False, label=f"{name} ({of.sum()})", **look)


def draw_evidence(summary: Summary) -> bytes | None:
    """The share of the excess each probe explains; None without a diagnosis. Failed probes are hollow."""
    diagnosis = None if summary.incident is None else summary.incident.diagnosis
    if diagnosis is None or not diagnosis["evidence"]:
        return None
    evidence = sorted(diagnosis["evidence"], key=_rank)  # bars are drawn from below: the largest comes last
    named = {cause["cause"] for cause in diagnosis["causes"]} | {diagnosis["cause"]}
    figure, axes = canvas(1.9 + 0.34 * len(evidence))
    half = axes.axvline(_NEEDED, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    kinds: dict[str, Any] = {"needed to name one": half}
    for y, e in enumerate(evidence):
        kind, bar = _bar(axes, y, e, e["cause"] in named)
        kinds.setdefault(kind, bar)
    names = [cut(one_line(e["name"]), 28) for e in evidence]
    axes.set_yticks(range(len(evidence)), names, fontsize=9, parse_math=False)
    axes.set_ylim(-0.6, len(evidence) - 0.4)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("share of the excess over the noise floor that disappears")
    axes.set_title(f"Cause: {cut(one_line(diagnosis['cause']), 60)}", fontsize=11, parse_math=False)
    axes.grid(alpha=0.3, axis="x")
    legend(figure, 5, kinds)
    return png(figure)


def _bar(axes: Any, y: int, evidence: Mapping[str, Any], named: bool) -> tuple[str, Any]:
    """One probe's bar, and which kind it is."""
    share = _as_float(evidence["explained"])
    if error := evidence["error"]:
        kind, text, hatch = "not probed", one_line(error), "////"
    elif not math.isfinite(share):
        kind, text, hatch = "observed only", "nothing to redo", ""
    else:
        return _share_bar(axes, y, share, named)
    bar = axes.barh(y, 0.02, facecolor="white", edgecolor=GREY, hatch=hatch, zorder=2)
    said = cut(f"{kind}: {text}", 78)
    axes.text(0.035, y, said, va="center", fontsize=8, color="#404040", parse_math=False, bbox=_BOX, zorder=3)
    return kind, bar


def _share_bar(axes: Any, y: int, share: float, named: bool) -> tuple[str, Any]:
    width = min(1.0, max(0.0, share))
    cause = named and share >= _NEEDED
    colour, hatch = (VERMILION, "//") if cause else (BLUE, "")
    bar = axes.barh(y, width, facecolor=colour, edgecolor="white", linewidth=0, zorder=2, hatch=hatch)
    worse = " (worse than before)" if share < 0 else ""
    axes.text(width + 0.012, y, f"{share:.0%}{worse}", va="center", fontsize=9, bbox=_BOX, zorder=3)
    return "named as a cause" if cause else "tried", bar


# what a report has, and what an incident's folder has
REPORT_PICTURES: dict[str, Callable[[Summary], bytes | None]] = {
    "timeline.png": draw_timeline,
    "histogram.png": draw_histogram,
    "scatter.png": draw_scatter,
    "position.png": draw_by_position,
    "entropy.png": draw_by_entropy,
    "evidence.png": draw_evidence,
}
INCIDENT_PICTURES: dict[str, Callable[[Summary], bytes | None]] = {
    "windows.png": draw_timeline,
    "evidence.png": draw_evidence,
    "log_ratio.png": draw_histogram,
}


def draw_comparison(names: Sequence[str], runs: Sequence[Columns], stats: Mapping[str, str]) -> bytes | None:
    """The same curves side by side: a panel a statistic, a line a run, each run's floor dotted in its colour."""
    kept = [s for s in stats if any(np.isfinite(column(c, s)).any() for c in runs)]
    if not kept:
        return None
    height = (len(kept) + 1) // 2
    figure, axes = canvas(1.0 + 2.5 * height, rows=height, columns=2)
    for panel, stat in zip(axes, kept, strict=False):
        _compared(panel, stat, runs, names if panel is axes[0] else None)
        panel.set_title(stats[stat], fontsize=10, parse_math=False)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.tick_params(which="both", labelsize=8)
    for panel in axes[len(kept) :]:
        panel.set_visible(False)
    for panel in axes[max(0, len(kept) - 2) : len(kept)]:
        panel.set_xlabel("optimizer step", fontsize=9)
    legend(figure, 3)
    return png(figure)


def _compared(panel: Any, stat: str, runs: Sequence[Columns], names: Sequence[str] | None) -> None:
    """One statistic of all runs. ``names``: labels, in one panel only."""
    colours = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
    dashes = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)))
    positive = True
    for i, c in enumerate(runs):
        values, floor = column(c, stat), column(c, f"floor/{stat}")
        colour = colours[i % len(colours)]
        positive &= bool((values[np.isfinite(values)] > 0).all())
        name = None if names is None else cut(one_line(names[i]), 40)
        look = {"linestyle": dashes[i % len(dashes)], "marker": "o" if len(c.steps) < 3 else None, "markersize": 4}
        panel.plot(np.array(c.steps), values, color=colour, linewidth=1.6, label=name, **look)
        if np.isfinite(floor).any():
            said = "noise floor, in its run's colour" if names is not None and i == 0 else None
            panel.plot(np.array(c.steps), floor, color=colour, linestyle=":", linewidth=1.1, alpha=0.8, label=said)
    if positive and stat not in ("ess", "reward/mean", "entropy/trainer"):
        panel.set_yscale("log")


def column(columns: Columns, name: str, instead: str = "") -> np.ndarray:
    """A column; ``instead`` where nothing of it was measured; NaN where there is none."""
    values = np.array(columns.values.get(name, ()), dtype=float)
    if instead and not np.isfinite(values).any():
        values = np.array(columns.values.get(instead, ()), dtype=float)
    return values if len(values) else np.full(len(columns.steps), np.nan)


def drawn_limit(rule: Rule | None, recorded: float, floor: float) -> float:
    """What trimmed k3 breached above in a window; NaN: not known. ``recorded``: its ``limit/kl_k3``."""
    if rule is None or not math.isnan(recorded):  # as it was applied: a resumed run may have had other rules before
        return floor + recorded
    if rule.k is None:
        return rule.limit
    if (limit := allowed(rule, None if math.isnan(floor) else floor)) is not None:
        return floor + limit
    limit = math.nan if rule.absolute is None else rule.absolute
    return limit if rule.ceiling is None else float(np.fmin(limit, rule.ceiling))


def _curve(axes: Any, steps: np.ndarray, values: np.ndarray, colour: str, style: str, label: str) -> None:
    if np.isfinite(values).any():
        lone = "o" if np.isfinite(values).sum() == 1 else None  # a line needs two points
        shown = np.where(values > 0, values, np.nan)
        axes.plot(steps, shown, color=colour, linestyle=style, linewidth=1.7, marker=lone, markersize=4, label=label)


def _rank(evidence: Mapping[str, Any]) -> tuple[int, float]:
    share = _as_float(evidence["explained"])
    return (0, 0.0) if evidence["error"] else (1, 0.0) if not math.isfinite(share) else (2, share)


def _as_float(value: Any) -> float:
    """A figure as it comes out of a file: NaN for none, "inf" as a string."""
    return math.nan if value is None else float(value)
