"""Draw the rooms of the package and their imports: docs/images/rooms.svg.

    python docs/figures/rooms.py

The rooms and the arrows come from the imports in src. A room is drawn above all that it imports.
An arrow is left out where a chain of other arrows says the same. Only the columns and the captions
are chosen here; tests/test_rooms.py fails if the picture is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from test_rooms import FLOOR, SRC, imported, imported_room, room_of  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "rooms.svg"
ROOMS = {  # the column, and a caption of one or two lines
    "__main__": (2, "python -m doraxp"),
    "cli": (2, "the commands"),
    "bench": (1, "time and memory,\nbeside PEFT"),
    "demo": (3, "a network learns\nturned digits"),
    "_terminal": (2, "tables, progress,\npictures"),
    "doraxp_pytest": (3, "fixtures for pytest"),
    "testing": (2, "cases, reference,\nbounds, diagnosis"),
    "doraxp": (2, "__init__.py:\nthe public names"),
    "checkpoint": (4, "files of adapters and\nmodels, their merge"),
    "jax": (0, "under jit, vmap, grad"),
    "torch": (1, "under autograd,\nand for PEFT"),
    "layers": (2, "layers with a state,\nadapters of a model"),
    "_core": (2, "the math of one layer"),
    "optim": (3, "optimizers, schedules"),
    "backends": (2, "operations of each\narray library, and V"),
    "_base": (2, "types, scalars,\nsums over ranks"),
}
WIDTH, HEIGHT, ACROSS, DOWN = 144, 54, 154, 82
STYLE = """
    rect.page { fill: white } rect.room { fill: #eef3fb; stroke: #35507a }
    path { fill: none; stroke: #35507a; marker-end: url(#head) } marker path { fill: #35507a }
    text { font: 11px sans-serif; text-anchor: middle; fill: #1d2733 }
    text.name { font: bold 13px monospace }
"""


class Place(NamedTuple):
    """The box of a room in the picture, by its middle."""

    x: float
    y: float

    @property
    def top(self) -> float:
        """The upper edge."""
        return self.y - HEIGHT / 2

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.y + HEIGHT / 2

    def side(self, other: float) -> float:
        """Return the edge that faces a column."""
        return self.x + (WIDTH / 2 if other > self.x else -WIDTH / 2)


def imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports from."""
    found: dict[str, set[str]] = {room: set() for room in FLOOR}
    for path in SRC.rglob("*.py"):
        room = room_of(path)
        names = (name for _, name in imported(path.read_text("utf-8")))
        found[room] |= {imported_room(name) for name in names} - {room}
    return found


def reached(room: str, graph: Mapping[str, set[str]]) -> set[str]:
    """Return the rooms below a room, over any number of arrows."""
    return graph[room].union(*(reached(other, graph) for other in graph[room]))


def without_detours(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Leave out each arrow that a chain of others stands for."""
    return {
        room: others - set().union(*(reached(other, graph) for other in others))
        for room, others in graph.items()
    }


def height(room: str, graph: Mapping[str, set[str]]) -> int:
    """Return the length of the longest chain of arrows from a room."""
    return max((1 + height(other, graph) for other in graph[room]), default=0)


def arrow(start: Place, end: Place) -> str:
    """Return the path of an arrow: straight down or over one row, else along and then down."""
    if start.x == end.x or end.y - start.y == DOWN:
        return f"M {start.x:g} {start.bottom:g} L {end.x:g} {end.top - 2:g}"
    return f"M {start.side(end.x):g} {start.y:g} H {end.x:g} V {end.top - 2:g}"


def drawn() -> str:
    """Return the picture."""
    graph = imports()
    heights = {room: height(room, graph) for room in graph}
    rows = max(heights.values())
    places = {
        room: Place(ACROSS * (column + 0.5), DOWN * (rows - heights[room] + 0.5))
        for room, (column, _) in ROOMS.items()
    }
    width, tall = 5 * ACROSS, (rows + 1) * DOWN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" width="{width}">',
        "<title>The rooms of doraxp; an arrow points to a room that is imported</title>",
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M 0 0 L 8 4 L 0 8 z"/></marker>',
        f'<rect class="page" width="{width}" height="{tall}" rx="12"/>',
    ]
    for room, others in without_detours(graph).items():
        lines += [f'<path d="{arrow(places[room], places[o])}"/>' for o in sorted(others)]
    for room, (_, caption) in ROOMS.items():
        x, y = places[room]
        lines.append(
            f'<rect class="room" x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="5"/>'
        )
        words = caption.split("\n")
        first = y - 7 if len(words) == 2 else y - 3
        lines.append(f'<text class="name" x="{x:g}" y="{first:g}">{room}</text>')
        for number, line in enumerate(words, start=1):
            lines.append(f'<text x="{x:g}" y="{first + 2 + 13 * number:g}">{escape(line)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(drawn(), "utf-8")
