"""Figures without a window system: made, filled by the caller, saved atomically."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.utils.files import atomic_write

if TYPE_CHECKING:  # matplotlib is imported only when a figure is made
    from matplotlib.figure import Figure


def figure_of(width: float, height: float, **options: Any) -> tuple["Figure", Any]:
    """(figure, axes) of matplotlib, in inches; `options` go to `subplots`."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**options)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
