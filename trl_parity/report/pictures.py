"""Pictures of an incident as PNGs 800 pixels wide. matplotlib is imported when one is drawn, and only its Agg.

Colours of Okabe and Ito, and never colour alone: statuses have markers of their own, lines their dashes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.parity import ParityConfig
from ..config.rules import Rule
from ..errors import ConfigError
from .escape import visible

if TYPE_CHECKING:
    from ..results.incident import Incident

__all__ = ["PICTURES", "draw_evidence", "draw_log_ratio", "draw_windows"]

_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"

_BLUE, _VERMILION, _PURPLE, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#767676"

# marker, colour, filled, size
_MARKS: dict[str, tuple[str, str, bool, int]] = {
    "OK": ("o", _GREEN, True, 18),
    "CALIBRATING": ("o", _GREY, False, 18),
    "WARN": ("^", _ORANGE, True, 44),
    "BREACH": ("s", _VERMILION, True, 40),
    "HALT": ("X", _BLACK, True, 110),
    "ERROR": ("P", _PURPLE, True, 60),
    "NO_DATA": ("D", _GREY, False, 24),
}

_BAND = math.log(1.1)  # ratio/out_of_band


def draw_windows(incident: Incident, rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Trimmed k3 of each window with its noise floor, limit and status; None where none was measured."""
    windows = incident.windows
    rule = _rule(incident.config)
    steps = np.array([float(w["step"]) for w in windows])
    drift, floor = (np.array([_number(w.get(name)) for w in windows]) for name in ("trimmed/kl_k3", "floor/kl_k3"))
    limit = np.array([_limit(rule, w, f) for w, f in zip(windows, floor, strict=True)])
    limit[np.isnan(drift)] = np.nan
    shown = np.concatenate([drift, floor, limit])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if not (drift > 0).any() or not shown.size:
        return None
    low, high = shown.min() / 3, shown.max() * 3
    figure, axes = _figure(4.8)
    axes.set_yscale("log")
    lone = "o" if len(windows) == 1 else None  # a line needs two points
    # what lies outside the axis is drawn on its edge, and said to be
    at = np.where(np.isnan(drift), low, np.clip(np.nan_to_num(drift, nan=low, posinf=high), low, high))
    drawn = np.where(np.isnan(drift), np.nan, at)
    axes.plot(steps, drawn, color=_BLUE, linewidth=1.5, marker=lone, markersize=3, label="trimmed k3", zorder=2)
    if np.isfinite(floor).any():
        axes.plot(steps, np.clip(floor, low, None), color=_SKY, linewidth=1.8, linestyle="--", marker=lone,
                  label="noise floor", zorder=2.5)  # fmt: skip
    if np.isfinite(limit).any():
        axes.plot(steps, np.clip(limit, low, None), color=_VERMILION, linewidth=1.8, linestyle=":", marker=lone,
                  label="limit (with floor)", drawstyle="steps-mid", zorder=1)  # fmt: skip
    statuses = np.array([str(w["status"]) for w in windows])
    for name, (marker, colour, filled, size) in _MARKS.items():
        if (of := statuses == name).any():
            face = colour if filled else "white"
            edge = "white" if name == "HALT" else colour
            axes.scatter(steps[of], at[of], s=size, marker=marker, facecolors=face, edgecolors=edge, linewidths=1,
                         label=f"{name} ({of.sum()})", zorder=4 if name == "HALT" else 3, clip_on=False)  # fmt: skip
    notes = []
    if np.isposinf(drift).any():
        notes.append("infinite: on the upper edge")
    if np.isnan(drift).any() or (drift <= 0).any():
        notes.append("0 or not measured: on the lower edge")
    breached = ", ".join(_plain(b) for b in incident.verdict.get("breaches") or ())
    status = _plain(incident.verdict.get("status", "?"))
    axes.set_title(
        _cut(f"{status} at step {incident.step}" + (f" on {breached}" if breached else ""), 90)
        + f"\nDrift of the last {_many(len(windows), 'window')}"
        + (f"\n({'; '.join(notes)})" if notes else ""),
        fontsize=11, parse_math=False,
    )  # fmt: skip
    axes.set_ylim(low, high)
    margin = 0.03 * (steps.max() - steps.min()) or 1.0
    axes.set_xlim(steps.min() - margin, steps.max() + margin)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("trimmed k3, nats per token")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return _png(figure)


def draw_evidence(incident: Incident, rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """The share of the excess each probe explains; None without a diagnosis. Failed probes are hollow."""
    if incident.diagnosis is None or not incident.diagnosis["evidence"]:
        return None
    evidence = sorted(incident.diagnosis["evidence"], key=_rank)  # bars are drawn from below: the largest comes last
    named = {cause["cause"] for cause in incident.diagnosis["causes"]} | {incident.diagnosis["cause"]}
    figure, axes = _figure(1.9 + 0.34 * len(evidence))
    half, box = 0.5, {"facecolor": "white", "edgecolor": "none", "pad": 1}
    kinds: dict[str, Any] = {
        "needed to name one": axes.axvline(half, color=_GREY, linestyle="--", linewidth=1.2, zorder=1)
    }
    for y, e in enumerate(evidence):
        share = _number(e["explained"])
        if e["error"] or not math.isfinite(share):
            kind, text = ("not probed", _plain(e["error"])) if e["error"] else ("observed only", "nothing to redo")
            bar = axes.barh(y, 0.02, facecolor="white", edgecolor=_GREY, hatch="////" if e["error"] else "", zorder=2)
            axes.text(0.035, y, _cut(f"{kind}: {text}", 78), va="center", fontsize=8, color="#404040",
                      parse_math=False, bbox=box, zorder=3)  # fmt: skip
        else:
            width = min(1.0, max(0.0, share))
            kind = "named as a cause" if e["cause"] in named and share >= half else "tried"
            colour = _VERMILION if kind == "named as a cause" else _BLUE
            bar = axes.barh(y, width, facecolor=colour, edgecolor="white", linewidth=0, zorder=2,
                            hatch="" if kind == "tried" else "//")  # fmt: skip
            worse = " (worse than before)" if share < 0 else ""
            axes.text(width + 0.012, y, f"{share:.0%}{worse}", va="center", fontsize=9, bbox=box, zorder=3)
        kinds.setdefault(kind, bar)
    axes.set_yticks(
        range(len(evidence)), [_cut(_plain(e["name"]), 28) for e in evidence], fontsize=9, parse_math=False
    )
    axes.set_ylim(-0.6, len(evidence) - 0.4)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("share of the excess over the noise floor that disappears")
    axes.set_title(f"Cause: {_cut(_plain(incident.diagnosis['cause']), 60)}", fontsize=11, parse_math=False)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(kinds.values(), kinds.keys(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return _png(figure)


def draw_log_ratio(incident: Incident, rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Histogram of Δ of the compared tokens in ``rows``; None without one that is finite."""
    given = np.array([_number(row["log_ratio"]) for row in rows if row["compared"]])
    delta = given[np.isfinite(given)]
    if not delta.size:
        return None
    # the bulk, and the odd far token: those beyond 5 x the 99th percentile are counted, not drawn to scale
    size = np.abs(delta)
    near = size <= 5 * np.quantile(size, 0.99)
    left, right = min(0.0, delta[near].min()), max(0.0, delta[near].max())
    width = max((right - left) / 60, 1e-6)
    edges = width * np.arange(math.floor(left / width), math.floor(right / width) + 2)  # one edge is 0
    counts, _ = np.histogram(delta, edges)
    middle = (edges[1:] + edges[:-1]) / 2
    figure, axes = _figure(4.8)
    less = middle < 0
    for of, colour, hatch, label in (
        (less, _ORANGE, "...", "trainer gives less than the engine"),
        (~less, _BLUE, "", "as much or more"),
    ):
        if counts[of].any():
            axes.bar(middle[of], counts[of], width=width, facecolor=colour, edgecolor="white", linewidth=0.3,
                     hatch=hatch, label=label, zorder=2)  # fmt: skip
    for x, ratio in ((-_BAND, "1/1.1"), (_BAND, "1.1")):
        if edges[0] <= x <= edges[-1]:
            axes.axvline(x, color=_GREY, linestyle="--" if x < 0 else "-.", linewidth=1.2, zorder=3,
                         label=f"ratio {ratio}")  # fmt: skip
    mean = float(delta.mean())
    if edges[0] <= mean <= edges[-1]:
        axes.axvline(mean, color=_BLACK, linestyle=":", linewidth=1.8, label=f"mean {mean:+.3g}", zorder=4)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, counts.max() * 2)
    ticks = [0, *(10**n for n in range(int(math.log10(counts.max())) + 1))]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(edges[0] - 2 * width, edges[-1] + 2 * width)
    sequences = len({row["sequence"] for row in rows})
    beyond = (delta < edges[0]) | (delta > edges[-1])
    notes = []
    if beyond.any():
        notes.append(f"{beyond.sum():,} beyond the axis, to {delta[np.argmax(size)]:+.3g}")
    if left := given.size - delta.size:
        notes.append(f"{left:,} not finite")
    axes.set_title(
        f"Log-ratio of {delta.size:,} compared tokens in the {_many(sequences, 'worst sequence')}"
        + (f"\n({'; '.join(notes)})" if notes else ""),
        fontsize=11,
    )
    axes.set_xlabel("Δ = trainer - rollout log-prob, nats")
    axes.set_ylabel("tokens")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return _png(figure)


PICTURES: dict[str, Callable[[Incident, Sequence[Mapping[str, Any]]], bytes | None]] = {
    "windows.png": draw_windows,
    "evidence.png": draw_evidence,
    "log_ratio.png": draw_log_ratio,
}


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _rule(config: Mapping[str, Any]) -> Rule | None:
    """The rule on k3; None where there is none, or the settings are not this version's."""
    try:
        rules = ParityConfig.from_mapping(config).resolved_rules()
    except (ConfigError, TypeError):
        return None
    return next((rule for rule in rules if rule.stat == "kl_k3" and not rule.below), None)


def _limit(rule: Rule | None, window: Mapping[str, Any], floor: float) -> float:
    """What trimmed k3 breached above in this window; NaN: not known."""
    if rule is None:
        return floor + _number(window.get("limit/kl_k3"))
    if rule.k is None:
        return rule.limit
    if math.isnan(floor):
        limit = math.nan if rule.absolute is None else rule.absolute
    else:
        limit = floor + max(rule.limit, (rule.k - 1.0) * floor)
    return limit if rule.ceiling is None else float(np.fmin(limit, rule.ceiling))


def _rank(evidence: Mapping[str, Any]) -> tuple[int, float]:
    share = _number(evidence["explained"])
    return (0, 0.0) if evidence["error"] else (1, 0.0) if not math.isfinite(share) else (2, share)


def _number(value: Any) -> float:
    """A figure as it comes out of a file: NaN for none, "inf" as a string."""
    return math.nan if value is None else float(value)


def _plain(text: Any) -> str:
    return visible(" ".join(str(text).split()))


def _many(count: int, what: str) -> str:
    return what if count == 1 else f"{count:,} {what}s"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
