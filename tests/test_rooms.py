"""The rooms of the package stand on floors, and a module imports only from the floors below.

It imports from another room through that room's package, and never a private module in it.
docs/figures/rooms.py draws the rooms and their imports.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
FLOORS = (
    ("__main__", "doraxp_pytest"),
    ("cli",),
    ("bench", "demo"),
    ("_terminal",),
    ("checkpoint",),
    ("testing",),
    ("torch", "jax"),
    ("doraxp",),  # __init__.py: the names of the rooms below, for users
    ("layers",),
    ("optim",),
    ("_core",),
    ("backends",),
    ("_base",),
)
"""From top to bottom. Each room is a folder or a module of src/doraxp; two are modules beside."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OUTSIDE = sorted(
    str(path.relative_to(ROOT))
    for folder in ("benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
MODULES = pytest.mark.parametrize(
    "path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC))
)


def room_of(path: Path) -> str:
    """Return the room of a source file."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return parts[1] if parts[0] == "doraxp" and parts[1] != "__init__" else parts[0]


def imported(source: str) -> list[tuple[int, str]]:
    """Return the line and the dotted name of everything that is imported from the package."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "doraxp"]


def imported_room(name: str) -> str:
    """Return the room of an imported name."""
    _, *inner = name.split(".")
    return inner[0] if inner and inner[0] in FLOOR else "doraxp"


def upward(source: str, room: str) -> list[str]:
    """Return the imports of a module in a room that come from the same floor or from above."""
    return [
        f"{line}: {room} must not import {name}"
        for line, name in imported(source)
        if (other := imported_room(name)) != room and FLOOR[other] <= FLOOR[room]
    ]


def past_the_door(source: str, room: str) -> list[str]:
    """Return the imports of private modules and names in other rooms.

    The underscore of a room's own name keeps users out, not the other rooms.
    """
    return [
        f"{line}: {room} must not import {name}: it is private to its room"
        for line, name in imported(source)
        if imported_room(name) != room and any(is_private(part) for part in name.split(".")[2:])
    ]


def is_private(part: str) -> bool:
    """Return True for `_name`, and False for `__version__`."""
    return part.startswith("_") and not part.endswith("__")


def private(source: str) -> list[str]:
    """Return the imports of private modules and private names."""
    return [
        f"{line}: {name} is private"
        for line, name in imported(source)
        if any(is_private(part) for part in name.split("."))
    ]


def test_every_room_is_in_the_table():
    entries = {path for path in (SRC / "doraxp").iterdir() if path.name != "__pycache__"}
    rooms = {path.stem for path in entries if path.is_dir() or path.suffix == ".py"}
    assert {*rooms - {"__init__"}, "doraxp", "doraxp_pytest"} == set(FLOOR)


@MODULES
def test_imports_run_down(path):
    assert upward(path.read_text("utf-8"), room_of(path)) == []


@MODULES
def test_a_room_is_entered_through_its_package(path):
    assert past_the_door(path.read_text("utf-8"), room_of(path)) == []


def test_the_picture_of_the_rooms_is_that_of_the_imports():
    path = ROOT / "docs" / "figures" / "rooms.py"
    spec = importlib.util.spec_from_file_location("rooms", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert set(script.ROOMS) == set(FLOOR)
    assert script.PICTURE.read_text("utf-8") == script.drawn(), "run python docs/figures/rooms.py"


@pytest.mark.parametrize("name", OUTSIDE)
def test_benchmarks_and_examples_import_public_names(name):
    assert private((ROOT / name).read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("_core", "import doraxp.layers"),
        ("_core", "def f():\n    from doraxp import torch"),
        ("layers", "from doraxp import forward"),
        ("layers", "import doraxp"),
        ("optim", "from doraxp.layers._dora import DoRALayer"),
        ("torch", "from doraxp.jax import merge"),
        ("bench", "from doraxp.demo import experiment"),
        ("_base", "from doraxp.backends import available"),
    ],
)
def test_an_import_from_above_is_found(room, source):
    (found,) = upward(source, room)
    assert f"{room} must not import doraxp" in found


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("layers", "from doraxp.layers._dora import DoRALayer"),
        ("layers", "from doraxp._core import linear"),
        ("testing", "import doraxp\nfrom doraxp import backends"),
        ("cli", "import doraxp_pytest, numpy"),
        ("doraxp", "from doraxp import backends"),
    ],
)
def test_an_import_from_below_or_from_the_same_room_is_right(room, source):
    assert upward(source, room) == []


@pytest.mark.parametrize(
    "source",
    [
        "import doraxp._base.types",
        "from doraxp.cli._bench import memory",
        "from doraxp.testing import _compare",
        "from doraxp.backends import _dtype_name",
    ],
)
def test_an_import_of_a_private_name_is_found(source):
    assert len(private(source)) == 1
    assert private("import doraxp\nfrom doraxp import __version__, torch") == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cli", "from doraxp.testing._vectors import write_vectors"),
        ("cli", "from doraxp.testing import _vectors"),
        ("checkpoint", "import doraxp.layers._dora"),
        ("layers", "from doraxp._core.matrix import _inputs"),
        ("_core", "from doraxp.backends._numpy import NumpyOperations"),
    ],
)
def test_an_import_past_the_door_is_found(room, source):
    (found,) = past_the_door(source, room)
    assert found.endswith("it is private to its room")


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cli", "from doraxp.testing import write_vectors"),
        ("testing", "from doraxp.testing._vectors import write_vectors"),
        ("layers", "from doraxp._core.linear import forward"),
        ("_terminal", "from doraxp import __version__"),
    ],
)
def test_an_import_through_the_door_is_right(room, source):
    assert past_the_door(source, room) == []
