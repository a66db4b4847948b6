"""What all pictures share: colours, an empty figure, its PNG of 800 pixels in width. matplotlib comes with the first.

Colours of Okabe and Ito, and never colour alone: statuses have markers of their own, lines their dashes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["canvas", "draw", "legend", "png"]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"

BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#767676"

T = TypeVar("T")


def canvas(height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None) -> tuple[Any, Any]:
    """A figure and its axes: one, or an array of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    return figure, axes[0] if len(axes) == 1 else axes


def legend(figure: Any, columns: int, entries: Mapping[str, Any] | None = None, size: float = 9) -> None:
    """Below the axes. ``entries``: what to show by label, instead of all that has one."""
    shown = () if entries is None else (entries.values(), entries.keys())
    figure.legend(*shown, loc="outside lower center", ncols=columns, fontsize=size, frameon=False)


def png(figure: Any) -> bytes:
    """The figure as a file's content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def draw(pictures: Mapping[str, Callable[[T], bytes | None]], of: T) -> tuple[dict[str, bytes], str]:
    """PNGs by file name, and why some are missing. None from a picture: there is nothing to show."""
    drawn: dict[str, bytes] = {}
    notes = []
    for name, one in pictures.items():
        try:
            if (content := one(of)) is not None:
                drawn[name] = content
        except ImportError as e:
            return {}, f"No pictures: matplotlib can't be imported ({e}). Run: pip install 'trl-parity[report]'."
        except Exception as e:  # a picture must not cost the report
            notes.append(f"{name} could not be drawn ({type(e).__name__}: {str(e)[:200]}).")
    return drawn, " ".join(notes)
