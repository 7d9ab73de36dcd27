"""The common style of all pictures: colours, resolution, grid and file format. By matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)


def new_picture(width: float, height: float) -> Picture:
    """Return an empty picture; width and height are in inches."""
    from matplotlib.figure import Figure as Picture

    return Picture(figsize=(width, height), dpi=150, layout="constrained")


def draw_grid(axes: Any, **options: Any) -> None:
    """Draw a pale grid."""
    axes.grid(alpha=0.3, **options)


def save(picture: Picture, path: Path) -> None:
    """Save a picture as PNG."""
    picture.savefig(path, format="png")
