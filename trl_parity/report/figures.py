"""Pictures of a report and of a comparison as PNGs 800 pixels wide; an incident's are in ``report.pictures``.

matplotlib is imported when one is drawn. Colours of Okabe and Ito, and never colour alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .pictures import (
    _BAND,
    _BLACK,
    _BLUE,
    _GREEN,
    _GREY,
    _MARKS,
    _ORANGE,
    _PURPLE,
    _SKY,
    _VERMILION,
    _cut,
    _limit,
    _plain,
    _png,
    draw_evidence,
)

if TYPE_CHECKING:
    from ..results.reader import Columns, Sample
    from .summary import Case

__all__ = ["draw_case", "draw_comparison"]

_MARKED = 60  # more windows than that: only those that are not healthy get a mark

_DOTS = 1500  # of a scatter


def draw_case(case: Case) -> tuple[dict[str, bytes], str]:
    """PNGs by file name, and why some are missing."""
    draw: dict[str, Callable[[Case], bytes | None]] = {
        "timeline.png": _timeline,
        "histogram.png": _histogram,
        "scatter.png": _scatter,
        "position.png": _by_position,
        "entropy.png": _by_entropy,
        "evidence.png": lambda c: None if c.incident is None else draw_evidence(c.incident, c.tokens),
    }
    drawn: dict[str, bytes] = {}
    notes = []
    for name, one in draw.items():
        try:
            if (png := one(case)) is not None:
                drawn[name] = png
        except ImportError as e:
            return {}, f"No pictures: matplotlib can't be imported ({e}). Run: pip install 'trl-parity[report]'."
        except Exception as e:  # a picture must not cost the report
            notes.append(f"{name} could not be drawn ({type(e).__name__}: {str(e)[:200]}).")
    return drawn, " ".join(notes)


def _timeline(case: Case) -> bytes | None:
    """k3 with floor and limit above, the size of log-ratios below; onset and halt."""
    c = case.columns
    steps = np.array(c.steps)
    drift = _column(c, "trimmed/kl_k3", "kl_k3")
    if not (drift > 0).any():
        return None
    figure, (above, below) = _figure(6.4, rows=2, heights=(3, 2))
    floor, limits = _column(c, "floor/kl_k3"), _column(c, "limit/kl_k3")
    rule = case.rule
    limit = np.array([_limit(rule, {"limit/kl_k3": x}, f) for x, f in zip(limits, floor, strict=True)])
    _curve(above, steps, drift, _BLUE, "-", "k3 KL (trimmed)")
    _curve(above, steps, floor, _SKY, "--", "noise floor")
    _curve(above, steps, limit, _VERMILION, ":", "limit (with floor)")
    _log_limits(above, drift, floor, limit)
    _marks(above, steps, drift, c.status)
    for stat, colour, style, label in (
        ("logp_abs_diff/mean", _GREEN, "-", "|Δ| mean"), ("logp_abs_diff/p99", _PURPLE, "-.", "|Δ| p99"),
        ("logp_abs_diff/max", _ORANGE, "--", "|Δ| max"),
    ):  # fmt: skip
        _curve(below, steps, _column(c, stat), colour, style, label)
    below.set_yscale("log")
    above.set_ylabel("nats per token")
    below.set_ylabel("nats")
    for axes in (above, below):
        if c.onset is not None:
            axes.axvline(c.onset - 0.5, color=_BLACK, linewidth=1.4, linestyle=(0, (6, 2)), zorder=2.8,
                         label=f"onset, step {c.onset}" if axes is above else None)  # fmt: skip
        axes.grid(alpha=0.3)
        margin = 0.03 * (steps.max() - steps.min()) or 1.0
        axes.set_xlim(steps.min() - margin, steps.max() + margin)
        axes.xaxis.get_major_locator().set_params(integer=True)
    below.set_xlabel("optimizer step" + (f" (a point is the mean of {c.width} windows)" if c.width > 1 else ""))
    above.tick_params(labelbottom=False)
    status = max(c.statuses, key=list(_MARKS).index) if set(c.statuses) <= set(_MARKS) else ""
    ended = f"halted at step {c.first_halt}" if c.first_halt is not None else f"worst status {_plain(status)}"
    above.set_title(f"{c.count:,} window{'s' * (c.count != 1)}: {ended}", fontsize=11, parse_math=False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return _png(figure)


def _marks(axes: Any, steps: np.ndarray, drift: np.ndarray, statuses: Sequence[str]) -> None:
    low = axes.get_ylim()[0]
    status = np.array(statuses)
    at = np.where(np.isfinite(drift) & (drift > 0), drift, low)
    at = np.where(np.isposinf(drift), axes.get_ylim()[1], at)
    for name, (marker, colour, filled, size) in _MARKS.items():
        of = status == name
        if not of.any() or (name == "OK" and len(steps) > _MARKED):
            continue
        axes.scatter(steps[of], at[of], s=size, marker=marker, facecolors=colour if filled else "white",
                     edgecolors="white" if name == "HALT" else colour, linewidths=1, label=f"{name} ({of.sum()})",
                     zorder=4 if name == "HALT" else 3, clip_on=False)  # fmt: skip


def _histogram(case: Case) -> bytes | None:
    """Shares of tokens by Δ, before and after the onset."""
    parts = _parts(case)
    if not parts:
        return None
    deltas = [_delta(sample) for _, sample, _ in parts]
    every = np.concatenate(deltas)
    size = np.abs(every)
    reach = max(float(np.quantile(size, 0.995)) * 1.15, 1e-6)
    edges = np.linspace(-reach, reach, 61)
    figure, axes = _figure(4.2)
    styles = ((_BLUE, 0.55, ""), (_VERMILION, 0.0, "////")) if len(parts) > 1 else ((_BLUE, 0.55, ""),)
    for (label, _, _), delta, (colour, alpha, hatch) in zip(parts, deltas, styles, strict=True):
        counts = np.histogram(np.clip(delta, -reach, reach), edges)[0] / len(delta)
        axes.stairs(counts, edges, fill=bool(alpha), color=colour, alpha=alpha or None, hatch=hatch or None,
                    linewidth=1.4, label=f"{label}: {len(delta):,} tokens, mean {delta.mean():+.3g}")  # fmt: skip
        if alpha:
            axes.stairs(counts, edges, color=colour, linewidth=1.2)
    if reach > _BAND:
        for x in (-_BAND, _BAND):
            axes.axvline(x, color=_GREY, linestyle="--", linewidth=1.1,
                         label="ratio 1/1.1 and 1.1" if x > 0 else None)  # fmt: skip
    axes.set_yscale("symlog", linthresh=1e-3)
    top = axes.get_ylim()[1]
    ticks = [t for t in (0, 1e-3, 1e-2, 0.1, 1) if t <= top]
    axes.set_yticks(ticks, [f"{t:.3g}" if t < 1e-3 or t == 0 else f"{t:.1%}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, top)
    beyond = int((size > reach).sum())
    axes.set_title(f"Log-ratio of {case.of}" + (f" ({beyond} beyond the axis, in the end bins)" if beyond else ""),
                   fontsize=11)  # fmt: skip
    axes.set_xlabel("Δ = trainer - rollout log-prob, nats")
    axes.set_ylabel("share of tokens")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return _png(figure)


def _scatter(case: Case) -> bytes | None:
    """Trainer's log-prob over the engine's; a diagonal where both agree."""
    parts = _parts(case)
    if not parts:
        return None
    figure, axes = _figure(5.4)
    rng = np.random.default_rng(0)
    for label, sample, (colour, marker) in parts:
        x, y = np.array(sample.rollout_logprob), np.array(sample.trainer_logprob)
        keep = rng.permutation(len(x))[:_DOTS]
        axes.scatter(x[keep], y[keep], s=14, marker=marker, facecolors="none", edgecolors=colour, linewidths=0.8,
                     alpha=0.7, label=label)  # fmt: skip
    every = np.concatenate([np.minimum(s.rollout_logprob, s.trainer_logprob) for _, s, _ in parts])
    low = 1.05 * min(float(np.quantile(every, 0.002)), -0.1)  # one far token must not squeeze the rest
    beyond = int((every < low).sum())
    axes.plot([low, 0], [low, 0], color=_BLACK, linewidth=1, linestyle="--", label="agreement", zorder=1)
    axes.set_xlim(low, -0.02 * low)
    axes.set_ylim(low, -0.02 * low)
    axes.set_aspect("equal", adjustable="box")
    axes.set_title(f"Log-prob of {case.of}" + (f" ({beyond} beyond the axes)" if beyond else ""), fontsize=11)
    axes.set_xlabel("rollout (engine), nats")
    axes.set_ylabel("trainer, nats")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return _png(figure)


def _by_position(case: Case) -> bytes | None:
    return _profile(case, "position", "position in the completion, tokens", "Drift by position")


def _by_entropy(case: Case) -> bytes | None:
    return _profile(case, "entropy", "trainer's entropy at the token, nats", "Drift by entropy")


def _profile(case: Case, name: str, xlabel: str, title: str) -> bytes | None:
    """Mean |Δ| and mean Δ over equally filled bins of another quantity, with standard errors."""
    figure, axes = _figure(4.2)
    drawn = False
    for label, sample, (colour, marker) in _parts(case):
        x, delta = np.array(getattr(sample, name)), _delta(sample)
        known = np.isfinite(x)
        if known.sum() < 10:
            continue
        x, delta = x[known], delta[known]
        edges = np.unique(np.quantile(x, np.linspace(0, 1, min(12, len(x) // 5) + 1)))
        at = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(0, len(edges) - 2))
        bins = [(x[at == i].mean(), delta[at == i]) for i in range(max(1, len(edges) - 1)) if (at == i).any()]
        middle = [m for m, _ in bins]
        error = [1.96 * np.abs(d).std() / np.sqrt(len(d)) for _, d in bins]
        axes.errorbar(middle, [np.abs(d).mean() for _, d in bins], yerr=error, color=colour, marker=marker,
                      linewidth=1.5, markersize=5, capsize=2, label=f"mean |Δ|, {label}")  # fmt: skip
        axes.plot(middle, [d.mean() for _, d in bins], color=colour, marker=marker, linewidth=1.2, markersize=4,
                  markerfacecolor="white", linestyle=":", label=f"mean Δ, {label}")  # fmt: skip
        drawn = True
    if not drawn:
        return None
    axes.axhline(0, color=_GREY, linewidth=1)
    axes.set_title(f"{title}, of {case.of}", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("nats")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return _png(figure)


def draw_comparison(names: Sequence[str], runs: Sequence[Columns], stats: Mapping[str, str]) -> bytes | None:
    """The same curves side by side: a panel a statistic, a line a run, each run's floor dotted in its colour."""
    kept = [s for s in stats if any(np.isfinite(_column(c, s)).any() for c in runs)]
    if not kept:
        return None
    height = (len(kept) + 1) // 2
    figure, axes = _figure(1.0 + 2.5 * height, rows=height, columns=2)
    colours = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY, _BLACK, _GREY)
    dashes = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)))
    for panel, stat in zip(axes, kept, strict=False):
        positive = True
        for i, c in enumerate(runs):
            values, floor = _column(c, stat), _column(c, f"floor/{stat}")
            colour = colours[i % len(colours)]
            known = values[np.isfinite(values)]
            positive &= bool((known > 0).all())
            one = "o" if len(c.steps) < 3 else None
            name = _cut(_plain(names[i]), 40) if panel is axes[0] else None
            panel.plot(np.array(c.steps), values, color=colour, linestyle=dashes[i % len(dashes)], linewidth=1.6,
                       marker=one, markersize=4, label=name)  # fmt: skip
            if np.isfinite(floor).any():
                said = "noise floor, in its run's colour" if panel is axes[0] and i == 0 else None
                panel.plot(np.array(c.steps), floor, color=colour, linestyle=":", linewidth=1.1, alpha=0.8, label=said)
        if positive and stat not in ("ess", "reward/mean", "entropy/trainer"):
            panel.set_yscale("log")
        panel.set_title(stats[stat], fontsize=10, parse_math=False)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.tick_params(which="both", labelsize=8)
    for panel in axes[len(kept) :]:
        panel.set_visible(False)
    for panel in axes[max(0, len(kept) - 2) : len(kept)]:
        panel.set_xlabel("optimizer step", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return _png(figure)


def _parts(case: Case) -> list[tuple[str, Sample, tuple[str, str]]]:
    onset = case.columns.onset
    told = (f"before step {onset}", f"from step {onset} on") if onset is not None else (case.of, case.of)
    if case.of != "sampled tokens":
        told = (case.of, case.of)
    found = [(told[0], case.before, (_BLUE, "o")), (told[1], case.after, (_VERMILION, "^"))]
    return [part for part in found if len(part[1])]


def _delta(sample: Sample) -> np.ndarray:
    return np.array(sample.trainer_logprob) - np.array(sample.rollout_logprob)


def _column(columns: Columns, name: str, instead: str = "") -> np.ndarray:
    """A column; ``instead`` where nothing of it was measured; NaN where there is none."""
    values = np.array(columns.values.get(name, ()), dtype=float)
    if instead and not np.isfinite(values).any():
        values = np.array(columns.values.get(instead, ()), dtype=float)
    return values if len(values) else np.full(len(columns.steps), np.nan)


def _curve(axes: Any, steps: np.ndarray, values: np.ndarray, colour: str, style: str, label: str) -> None:
    if np.isfinite(values).any():
        lone = "o" if np.isfinite(values).sum() == 1 else None  # a line needs two points
        shown = np.where(values > 0, values, np.nan)
        axes.plot(steps, shown, color=colour, linestyle=style, linewidth=1.7, marker=lone, markersize=4, label=label)


def _log_limits(axes: Any, *columns: np.ndarray) -> None:
    shown = np.concatenate(columns)
    shown = shown[np.isfinite(shown) & (shown > 0)]
    axes.set_yscale("log")
    axes.set_ylim(shown.min() / 2, shown.max() * 2)


def _figure(height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    return figure, axes[0] if len(axes) == 1 else axes
