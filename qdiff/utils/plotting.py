"""Figures of matplotlib without a window system, saved atomically."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.utils.files import atomic_write

if TYPE_CHECKING:  # importing matplotlib takes long, and most commands draw nothing
    from matplotlib.figure import Figure


def figure_of(width: float, height: float, **options: Any) -> tuple["Figure", Any]:
    """Make a figure.

    Args:
        width: inches.
        height: inches.
        options: arguments of `Figure.subplots`.

    Returns:
        The figure and its axes.
    """
    from matplotlib.figure import Figure  # pyplot would need a window system and holds global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**options)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
