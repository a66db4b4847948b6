"""Pictures of a report's sampled tokens, or of those of the worst sequences: histogram, scatter, profiles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .drawing import BLACK, BLUE, GREY, VERMILION, canvas, legend, png

if TYPE_CHECKING:
    from ..results.reader import Sample
    from .summary import Summary

__all__ = ["draw_by_entropy", "draw_by_position", "draw_histogram", "draw_scatter"]

_BAND = math.log(1.1)  # ratio/out_of_band

_DOTS = 1500  # of a scatter


def draw_histogram(summary: Summary) -> bytes | None:
    """Shares of tokens by Δ, before and after the onset."""
    parts = _parts(summary)
    if not parts:
        return None
    deltas = [_delta(sample) for _, sample, _ in parts]
    size = np.abs(np.concatenate(deltas))
    reach = max(float(np.quantile(size, 0.995)) * 1.15, 1e-6)
    edges = np.linspace(-reach, reach, 61)
    figure, axes = canvas(4.2)
    styles = ((BLUE, 0.55, ""), (VERMILION, 0.0, "////")) if len(parts) > 1 else ((BLUE, 0.55, ""),)
    for (label, _, _), delta, (colour, alpha, hatch) in zip(parts, deltas, styles, strict=True):
        counts = np.histogram(np.clip(delta, -reach, reach), edges)[0] / len(delta)
        said = f"{label}: {len(delta):,} tokens, mean {delta.mean():+.3g}"
        look = {"fill": bool(alpha), "color": colour, "alpha": alpha or None, "hatch": hatch or None}
        axes.stairs(counts, edges, linewidth=1.4, label=said, **look)
        if alpha:
            axes.stairs(counts, edges, color=colour, linewidth=1.2)
    if reach > _BAND:
        for x, label in ((-_BAND, ""), (_BAND, "ratio 1/1.1 and 1.1")):
            axes.axvline(x, color=GREY, linestyle="--", linewidth=1.1, label=label or None)
    _shares(axes)
    beyond = int((size > reach).sum())
    notes = [f"{beyond:,} beyond the axis, in the end bins"] if beyond else []
    notes += [f"{summary.not_finite:,} not finite"] if summary.not_finite else []
    axes.set_title(f"Log-ratio of {summary.of}" + (f" ({'; '.join(notes)})" if notes else ""), fontsize=11)
    axes.set_xlabel("Δ = trainer - rollout log-prob, nats")
    axes.grid(alpha=0.3)
    legend(figure, 2)
    return png(figure)


def _shares(axes: Any) -> None:
    """The y axis: 0, then decades up to 1."""
    axes.set_ylabel("share of tokens")
    axes.set_yscale("symlog", linthresh=1e-3)
    top = axes.get_ylim()[1]
    ticks = [t for t in (0, 1e-3, 1e-2, 0.1, 1) if t <= top]
    axes.set_yticks(ticks, [f"{t:.3g}" if t < 1e-3 or t == 0 else f"{t:.1%}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, top)


def draw_scatter(summary: Summary) -> bytes | None:
    """Trainer's log-prob over the engine's; a diagonal where both agree."""
    parts = _parts(summary)
    if not parts:
        return None
    figure, axes = canvas(5.4)
    rng = np.random.default_rng(0)
    for label, sample, (colour, marker) in parts:
        x, y = np.array(sample.rollout_logprob), np.array(sample.trainer_logprob)
        keep = rng.permutation(len(x))[:_DOTS]
        look = {"marker": marker, "facecolors": "none", "edgecolors": colour, "linewidths": 0.8, "alpha": 0.7}
        axes.scatter(x[keep], y[keep], s=14, label=label, **look)
    every = np.concatenate([np.minimum(s.rollout_logprob, s.trainer_logprob) for _, s, _ in parts])
    low = 1.05 * min(float(np.quantile(every, 0.002)), -0.1)  # one far token must not squeeze the rest
    beyond = int((every < low).sum())
    axes.plot([low, 0], [low, 0], color=BLACK, linewidth=1, linestyle="--", label="agreement", zorder=1)
    axes.set_xlim(low, -0.02 * low)
    axes.set_ylim(low, -0.02 * low)
    axes.set_aspect("equal", adjustable="box")
    axes.set_title(f"Log-prob of {summary.of}" + (f" ({beyond} beyond the axes)" if beyond else ""), fontsize=11)
    axes.set_xlabel("rollout (engine), nats")
    axes.set_ylabel("trainer, nats")
    axes.grid(alpha=0.3)
    legend(figure, 3)
    return png(figure)


def draw_by_position(summary: Summary) -> bytes | None:
    """Drift along the completion."""
    return _profile(summary, "position", "position in the completion, tokens", "Drift by position")


def draw_by_entropy(summary: Summary) -> bytes | None:
    """Drift over how sure the trainer is."""
    return _profile(summary, "entropy", "trainer's entropy at the token, nats", "Drift by entropy")


def _profile(summary: Summary, name: str, xlabel: str, title: str) -> bytes | None:
    """Mean |Δ| and mean Δ over equally filled bins of another quantity, with standard errors."""
    figure, axes = canvas(4.2)
    drawn = False
    for label, sample, (colour, marker) in _parts(summary):
        x, delta = np.array(getattr(sample, name)), _delta(sample)
        known = np.isfinite(x)
        if known.sum() < 10:
            continue
        middle, parts = _bins(x[known], delta[known])
        size, error = [np.abs(d).mean() for d in parts], [1.96 * np.abs(d).std() / np.sqrt(len(d)) for d in parts]
        look: dict[str, Any] = {"color": colour, "marker": marker}
        axes.errorbar(
            middle, size, yerr=error, linewidth=1.5, markersize=5, capsize=2, label=f"mean |Δ|, {label}", **look
        )
        look |= {"markerfacecolor": "white", "linestyle": ":"}
        axes.plot(middle, [d.mean() for d in parts], linewidth=1.2, markersize=4, label=f"mean Δ, {label}", **look)
        drawn = True
    if not drawn:
        return None
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_title(f"{title}, of {summary.of}", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("nats")
    axes.grid(alpha=0.3)
    legend(figure, 2)
    return png(figure)


def _bins(x: np.ndarray, delta: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """Up to 12 bins of ``x``, equally filled: the mean of each, and its Δ."""
    edges = np.unique(np.quantile(x, np.linspace(0, 1, min(12, len(x) // 5) + 1)))
    at = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(0, len(edges) - 2))
    filled = [at == i for i in range(max(1, len(edges) - 1)) if (at == i).any()]
    return [float(x[of].mean()) for of in filled], [delta[of] for of in filled]


def _parts(summary: Summary) -> list[tuple[str, Sample, tuple[str, str]]]:
    """(label, tokens, colour and marker) before and after the onset, those there are."""
    onset = summary.columns.onset
    told = (summary.of, summary.of)
    if onset is not None and summary.of == "sampled tokens":
        told = (f"before step {onset}", f"from step {onset} on")
    found = [(told[0], summary.before, (BLUE, "o")), (told[1], summary.after, (VERMILION, "^"))]
    return [part for part in found if len(part[1])]


def _delta(sample: Sample) -> np.ndarray:
    return np.array(sample.trainer_logprob) - np.array(sample.rollout_logprob)
