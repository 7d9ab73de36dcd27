"""The common style of all pictures: resolution, grid, theme and file format. By matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from doraxp._terminal.palette import GREY, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture


CORNER, MARGIN = 18, 0.1
"""The radius of a corner in pixels, and the margin in inches."""


def new_picture(width: float, height: float) -> Picture:
    """Return an empty picture; width and height are in inches."""
    from matplotlib.figure import Figure as Picture
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=MARGIN)
    return Picture(figsize=(width, height), dpi=150, layout=layout)


def draw_grid(axes: Any, **options: Any) -> None:
    """Draw a pale grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.3, **options)
    axes.spines[["top", "right"]].set_visible(False)


def save(picture: Picture, path: Path, theme: Theme = LIGHT) -> None:
    """Save a picture as PNG, in the colours of a theme."""
    _dress(picture, theme)
    picture.savefig(path, format="png")


def _dress(picture: Picture, theme: Theme) -> None:
    """Give paper and ink to all that is neither a curve nor a mark."""
    from matplotlib.patches import FancyBboxPatch
    from matplotlib.text import Text
    from matplotlib.transforms import IdentityTransform

    # A card with round corners, so a light picture looks well on a dark page too.
    picture.patch.set_alpha(0)
    style = f"round,pad=0,rounding_size={CORNER}"
    card = FancyBboxPatch((0, 0), *picture.bbox.size, style, transform=IdentityTransform())
    card.set(facecolor=theme.paper, linewidth=0, zorder=-1)
    picture.add_artist(card)
    for text in picture.findobj(Text):
        text.set_color(theme.ink)
    legends = [axes.get_legend() for axes in picture.axes]
    for legend in (*legends, *picture.legends):
        if legend is not None:
            legend.get_frame().set(facecolor=theme.paper, edgecolor=GREY)
    for axes in picture.axes:
        axes.set_facecolor(theme.paper)
        axes.spines[:].set_color(theme.ink)
        axes.tick_params(which="both", colors=theme.ink, grid_color=GREY)
