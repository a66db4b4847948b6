"""The picture of a run's rewards beside their baseline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..files import write_atomic
from ..metrics.rewards import (
    MIN_REWARDS,
    RewardBaseline,
    _comparable,
    _finite,
)
from .drawing import BLACK, BLUE, VERMILION, canvas, legend, png
from .format import cut

__all__ = ["plot_rewards"]


def plot_rewards(baseline: RewardBaseline, rewards: Iterable[float], path: str | Path) -> None:
    """Both empirical distribution functions and their largest gap, as a PNG 800 pixels wide, written whole."""
    try:
        figure, axes = canvas(4.8)
    except ImportError as e:
        raise ConfigError(
            "plotting rewards needs matplotlib, which is not installed. Run: pip install 'trl-parity[report]'."
        ) from e
    run = _finite(rewards)
    x, y = _comparable(run), _comparable(baseline.rewards)
    pooled = np.unique(np.concatenate([x, y]))
    margin = 0.05 * (pooled[-1] - pooled[0]) or 0.5
    left, right = pooled[0] - margin, pooled[-1] + margin
    name = cut(" ".join(baseline.name.split()), 32)  # longer ones leave the picture
    label = f"baseline {name}".rstrip().replace("$", r"\$")
    for values, colour, style, who in ((y, BLUE, "--", label), (x, VERMILION, "-", "this run")):
        if n := values.size:
            at = np.concatenate([[left], values, [right]])
            share = np.concatenate([np.arange(n + 1) / n, [1.0]])
            axes.step(at, share, where="post", color=colour, linestyle=style, linewidth=2, label=f"{who} (n={n})")
    comparison = baseline.compare(run)
    if comparison is None:
        means = f"mean of the baseline {baseline.rewards.mean():.4g}"
        test = f"{run.size} finite rewards of this run: too few to compare (at least {MIN_REWARDS})"
    else:
        means = f"mean of this run {comparison.mean:.4g}, of the baseline {comparison.baseline_mean:.4g}"
        p = "p < 0.0001" if comparison.p_value < 1e-4 else f"p = {comparison.p_value:.2g}"
        test = f"Cliff's delta {comparison.effect_size:+.3f}, KS {comparison.ks:.3f} ({p})"
        if comparison.ks > 0:
            _mark_gap(axes, x, y, pooled)
    axes.set_title(f"Rewards: {means}\n{test}", fontsize=11)
    axes.set_xlabel("reward")
    axes.set_ylabel("share of rewards at or below")
    axes.set_xlim(left, right)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    legend(figure, 2)
    write_atomic(Path(path), png(figure))


def _mark_gap(axes: Any, x: np.ndarray, y: np.ndarray, pooled: np.ndarray) -> None:
    """Where the two functions are furthest apart: not at the last value, where both are 1."""
    run, baseline = (np.searchsorted(values, pooled, side="right") / values.size for values in (x, y))
    gap = int(np.argmax(np.abs(run - baseline)))
    at = [(pooled[gap] + pooled[gap + 1]) / 2] * 2
    axes.plot(at, [run[gap], baseline[gap]], color=BLACK, linestyle=":", linewidth=2, label="largest gap (KS)")
