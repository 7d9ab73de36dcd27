"""Draw one row of a weight under DoRA: docs/images/dora.svg and dora-dark.svg.

    python docs/figures/dora.py

There are three panels. The row w of W has a magnitude m and a direction. LoRA adds s b A, with b
the row of B, which changes both at once. DoRA keeps the direction of the sum v and trains m by
itself. tests/test_pictures.py fails if a picture is out of date.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

from doraxp._terminal.palette import BLUE, DARK, GREY, LIGHT, VERMILION, Theme

IMAGES = Path(__file__).resolve().parents[1] / "images"
PICTURES = {"dora.svg": LIGHT, "dora-dark.svg": DARK}
WIDTH, HEIGHT, PANEL = 720, 316, 240
FEET = 226
"""The height of the point at which all arrows start."""
LEFT = 28
ROW = (128.0, -48.0)
"""w, in pixels; down is positive."""
UPDATE = (-14.0, -112.0)
"""s b A."""
MAGNITUDE = 186.0
UNIT = 66.0
"""The length 1, in pixels."""


class Panel(NamedTuple):
    """The origin of a panel's arrows, and the words below."""

    x: float
    title: str
    lines: tuple[str, ...]


PANELS = (
    Panel(LEFT, "One row of W", ("w = m · w / ‖w‖", "its magnitude m and its direction")),
    Panel(LEFT + PANEL, "LoRA adds an update", ("v = w + s b A", "turned and stretched at once")),
    Panel(
        LEFT + 2 * PANEL,
        "DoRA sets the magnitude",
        ("w′ = m · v / ‖v‖", "direction and magnitude apart"),
    ),
)
UPDATED = (ROW[0] + UPDATE[0], ROW[1] + UPDATE[1])


def scaled(vector: tuple[float, float], length: float) -> tuple[float, float]:
    """Return the vector of this direction and this length."""
    factor = length / math.hypot(*vector)
    return vector[0] * factor, vector[1] * factor


def arrow(x: float, y: float, vector: tuple[float, float], colour: str, more: str = "") -> str:
    """Return an arrow from (x, y), with its head."""
    length = math.hypot(*vector)
    along = (vector[0] / length, vector[1] / length)
    tip = (x + vector[0], y + vector[1])
    neck = (tip[0] - 11 * along[0], tip[1] - 11 * along[1])
    wings = " ".join(
        f"{neck[0] + side * 5 * along[1]:.1f},{neck[1] - side * 5 * along[0]:.1f}"
        for side in (1, -1)
    )
    return (
        f'<path d="M {x:.1f} {y:.1f} L {neck[0]:.1f} {neck[1]:.1f}" stroke="{colour}" '
        f'stroke-width="2.5"{more}/>'
        f'<polygon points="{tip[0]:.1f},{tip[1]:.1f} {wings}" fill="{colour}"/>'
    )


def label(x: float, y: float, text: str, anchor: str = "start") -> str:
    """Return the name of a vector, in the colour of the page's text."""
    return f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def arc(x: float, start: tuple[float, float], end: tuple[float, float], style: str) -> str:
    """Return the part of the unit circle around (x, FEET) from one direction to another."""
    (x1, y1), (x2, y2) = scaled(start, UNIT), scaled(end, UNIT)
    sweep = int(start[0] * end[1] - start[1] * end[0] > 0)
    return (
        f'<path d="M {x + x1:.1f} {FEET + y1:.1f} A {UNIT:g} {UNIT:g} 0 0 {sweep} '
        f'{x + x2:.1f} {FEET + y2:.1f}" {style}/>'
    )


def circle(x: float) -> str:
    """Return the upper right quarter of the unit circle, on which directions lie."""
    style = f'stroke="{GREY}" stroke-width="1.5" stroke-dasharray="2 4"'
    return arc(x, (1.0, 0.0), (0.0, -1.0), style)


def row(x: float, dashes: str = "") -> str:
    """Return w of the base."""
    return arrow(x, FEET, ROW, GREY, dashes) + label(x + ROW[0] + 8, FEET + ROW[1] + 4, "w")


def parted(x: float, vector: tuple[float, float], colour: str, name: str) -> str:
    """Return a vector whose part up to the circle, the direction, is bold."""
    tip = scaled(vector, UNIT)
    return (
        f'<path d="M {x:.1f} {FEET} L {x + tip[0]:.1f} {FEET + tip[1]:.1f}" '
        f'stroke="{colour}" stroke-width="6"/>'
        + arrow(x, FEET, vector, colour)
        + label(x + vector[0] + 8, FEET + vector[1] + 4, name)
    )


def before(x: float) -> list[str]:
    """Return the row of the base, as DoRA takes it apart."""
    return [
        circle(x),
        parted(x, ROW, GREY, "w"),
        label(x + 74, FEET - 62, "magnitude m"),
        label(x + 22, FEET + 20, "direction"),
    ]


def added(x: float) -> list[str]:
    """Return LoRA's sum."""
    return [
        row(x),
        arrow(x + ROW[0], FEET + ROW[1], UPDATE, VERMILION, ' stroke-dasharray="6 4"'),
        label(x + ROW[0] + 4, FEET + ROW[1] - 56, "s b A"),
        arrow(x, FEET, UPDATED, VERMILION),
        label(x + UPDATED[0] + 8, FEET + UPDATED[1] + 2, "v"),
    ]


def stretched(x: float) -> list[str]:
    """Return DoRA's row: in the direction of v, of the length m."""
    return [
        circle(x),
        row(x),
        arc(x, ROW, UPDATED, f'stroke="{BLUE}" stroke-width="4"'),
        label(x + 66, FEET - 66, "A and B turn it"),
        parted(x, scaled(UPDATED, MAGNITUDE), BLUE, "w′"),
        label(x + 90, FEET - 104, "m stretches it"),
    ]


def drawn(theme: Theme) -> str:
    """Return the picture."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" role="img">',
        "<title>A row of W, LoRA's update of it, and DoRA's: B A turns it, m stretches it</title>",
        f"<style>text {{ font: 15px sans-serif; fill: {theme.ink} }}"
        " text.title { font-weight: bold; font-size: 16px }"
        " text.name { font-style: italic } path { fill: none }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{theme.paper}"/>',
    ]
    for panel, content in zip(PANELS, (before, added, stretched), strict=True):
        middle = panel.x + 94
        lines += content(panel.x)
        lines.append(f'<circle cx="{panel.x}" cy="{FEET}" r="3.5" fill="{theme.ink}"/>')
        words = ((28, "title", panel.title), (272, "", panel.lines[0]), (296, "", panel.lines[1]))
        for y, kind, text in words:
            lines.append(
                f'<text class="{kind}" x="{middle}" y="{y}" text-anchor="middle">{text}</text>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    """Write both pictures."""
    for name, theme in PICTURES.items():
        (IMAGES / name).write_text(drawn(theme), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
