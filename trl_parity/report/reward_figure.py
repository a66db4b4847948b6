"""The picture of a run's rewards beside their baseline."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import ConfigError
from ..files import write_atomic
from ..metrics.rewards import (
    BASELINE_COLOUR,
    GAP_COLOUR,
    MIN_REWARDS,
    RUN_COLOUR,
    RewardBaseline,
    _comparable,
    _finite,
)

__all__ = ["plot_rewards"]


def plot_rewards(baseline: RewardBaseline, rewards: Iterable[float], path: str | Path) -> None:
    """Both empirical distribution functions and their largest gap, as a PNG 800 pixels wide, written whole."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(
            "plotting rewards needs matplotlib, which is not installed. Run: pip install 'trl-parity[report]'."
        ) from e

    run = _finite(rewards)
    comparison = baseline.compare(run)
    x, y = _comparable(run), _comparable(baseline.rewards)
    pooled = np.unique(np.concatenate([x, y]))
    margin = 0.05 * (pooled[-1] - pooled[0]) or 0.5
    left, right = pooled[0] - margin, pooled[-1] + margin

    figure = Figure(figsize=(8, 4.8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    name = " ".join(baseline.name.split())
    name = name if len(name) <= 32 else name[:31] + "…"  # longer ones leave the picture
    label = f"baseline {name}".rstrip().replace("$", r"\$")
    for values, colour, style, who in (
        (y, BASELINE_COLOUR, "--", label),
        (x, RUN_COLOUR, "-", "this run"),
    ):
        if n := values.size:
            at = np.concatenate([[left], values, [right]])
            share = np.concatenate([np.arange(n + 1) / n, [1.0]])
            axes.step(at, share, where="post", color=colour, linestyle=style, linewidth=2, label=f"{who} (n={n})")
    if comparison is None:
        means = f"mean of the baseline {baseline.rewards.mean():.4g}"
        test = f"{run.size} finite rewards of this run: too few to compare (at least {MIN_REWARDS})"
    else:
        means = f"mean of this run {comparison.mean:.4g}, of the baseline {comparison.baseline_mean:.4g}"
        p = "p < 0.0001" if comparison.p_value < 1e-4 else f"p = {comparison.p_value:.2g}"
        test = f"Cliff's delta {comparison.effect_size:+.3f}, KS {comparison.ks:.3f} ({p})"
        run_share = np.searchsorted(x, pooled, side="right") / x.size
        baseline_share = np.searchsorted(y, pooled, side="right") / y.size
        gap = int(np.argmax(np.abs(run_share - baseline_share)))
        if comparison.ks > 0:  # then not at the last value, where both are 1
            axes.plot(
                [(pooled[gap] + pooled[gap + 1]) / 2] * 2,
                [run_share[gap], baseline_share[gap]],
                color=GAP_COLOUR,
                linestyle=":",
                linewidth=2,
                label="largest gap (KS)",
            )
    axes.set_title(f"Rewards: {means}\n{test}", fontsize=11)
    axes.set_xlabel("reward")
    axes.set_ylabel("share of rewards at or below")
    axes.set_xlim(left, right)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    png = io.BytesIO()
    canvas.print_png(png)
    write_atomic(Path(path), png.getvalue())
