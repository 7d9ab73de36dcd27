"""The pages on the code name files, functions and operations that exist."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import updated
from test_rooms import FLOOR

import doraxp
from doraxp.backends import Operations
from doraxp.backends._cupy.operations import CupyOperations
from doraxp.backends._dask import DaskOperations
from doraxp.backends._jax import JaxOperations
from doraxp.backends._layers import LayerOperations
from doraxp.backends._numpy import NumpyOperations
from doraxp.backends._torch import TorchOperations
from doraxp.checkpoint._engine import load_engine
from doraxp.checkpoint._rows import Term, merged_blocks

ROOT = Path(__file__).parents[1]
MAP = "docs/explanation/architecture.md"
GUIDE = "docs/explanation/contributing.md"  # it includes CONTRIBUTING.md
PAGES = {name: (ROOT / name).read_text("utf-8") for name in (MAP, GUIDE)}
PAGES[GUIDE] += (ROOT / "CONTRIBUTING.md").read_text("utf-8")
PAGE = PAGES[MAP]
PATH = re.compile(r"(?:[\w.]+/)+[\w.]+\.\w+|\w+\.(?:py|toml|md)")
NAME = re.compile(r"_{0,2}[A-Za-z]\w*(?:\.\w+)*")
OVERRIDES = {
    "NumPy": NumpyOperations,
    "PyTorch": TorchOperations,
    "JAX": JaxOperations,
    "Dask": DaskOperations,
    "CuPy": CupyOperations,
}
OPERATIONS = [
    name
    for kind in (Operations, LayerOperations)
    for name, method in vars(kind).items()
    if inspect.isfunction(method) and not name.startswith("_")
]
OTHER_NAMES = {"doraxp", "backends.operations", "test", "lint", "nox", "cubed", "ndonnx", "sparse"}
"""Names on the pages that a module, a lane or a group of pyproject.toml has, not a definition."""


def spans(text: str) -> list[str]:
    """Return the code between single backticks."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<![`}])`([^`\n]+)`(?!`)", plain)


def found(name: str) -> Path | None:
    """Return the file that a page means, or None."""
    known = (ROOT / name, ROOT / "src" / "doraxp" / name)
    return next((path for path in known if path.exists()), None)


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """Return the names that a Python file defines; those of methods also as `Class.method`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.ClassDef(name=name, body=body):
                names |= {name, *(f"{name}.{one}" for part in body for one in bound(part))}
            case ast.arg(arg=name):
                names.add(name)
        names |= bound(node)
    return frozenset(names)


def bound(node: ast.AST) -> set[str]:
    """Return the names that a statement binds."""
    match node:
        case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


def rows(page: str) -> list[list[str]]:
    """Return the cells of all tables, row by row."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])]
        for line in page.splitlines()
        if line.startswith("|")
    ]


def table(header: str) -> list[list[str]]:
    """Return the rows of the first table below a line that begins with `header`."""
    lines = PAGE[PAGE.index(f"\n{header}") :].split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return rows("\n".join(lines[first + 2 : last]))


def operations_in(header: str) -> list[str]:
    """Return the operations in the last column of a table, from top to bottom."""
    return [name for row in table(header) for name in spans(row[-1]) if name in OPERATIONS]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_exists(page):
    names = [span for span in spans(PAGES[page]) if PATH.fullmatch(span) and "NAME" not in span]
    assert len(names) > 20
    names += re.findall(r"python (\S+\.py)", PAGES[page])
    assert [name for name in names if found(name) is None] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_defined(page):
    files = [*(ROOT / "src").rglob("*.py"), ROOT / "tests" / "backends.py", ROOT / "noxfile.py"]
    known = OTHER_NAMES | set(FLOOR) | {f"doraxp.{name}" for name in doraxp.__all__}
    known = known.union(*(definitions(path) for path in files))
    names = {span for span in spans(PAGES[page]) if NAME.fullmatch(span) and found(span) is None}
    assert len(names) > 10
    assert sorted(names - known) == []


def test_every_function_of_a_table_is_in_its_file():
    cells = [spans(cell) for row in rows(PAGE) for cell in row]
    pairs = [cell for cell in cells if len(cell) == 2 and PATH.fullmatch(cell[0])]
    assert len(pairs) > 40
    for path, name in pairs:
        assert name in definitions(found(path)), f"{name} in {path}"


def test_the_rooms_are_those_of_the_floors():
    assert {cells[0].strip("`") for cells in table("`tests/test_rooms.py`")} == set(FLOOR)


def test_the_operations_are_those_of_the_seam():
    written = {row[0].strip("`"): row[2] for row in table("**`Operations`**")}
    assert list(written) == OPERATIONS
    for name, cell in written.items():
        overriding = [
            library
            for library, kind in OVERRIDES.items()
            if getattr(kind, name) is not getattr(Operations, name)
        ]
        assert cell == ", ".join(overriding), name


@pytest.fixture
def calls(monkeypatch):
    """The operations that are called from now on, except those that operations call themselves."""
    names, depth = [], 0

    def recorded(name, method):
        def call(*args, **kwargs):
            nonlocal depth
            names.extend([name] if depth == 0 else [])
            depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                depth -= 1

        return call

    for name, method in inspect.getmembers(NumpyOperations, inspect.isfunction):
        if name in OPERATIONS:
            monkeypatch.setattr(NumpyOperations, name, recorded(name, method))
    return names


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    weight, config = rng.standard_normal((6, 8)), doraxp.Config(2)
    adapter = doraxp.init(weight, config, seed=0)
    return weight, adapter._replace(lora_b=rng.standard_normal((6, 2))), config


def test_the_way_of_a_weight_calls_these_operations(layer, calls):
    prepared = doraxp.prepare(*layer)
    assert calls == operations_in("### prepare")
    calls.clear()
    y, cache = doraxp.forward(np.ones((5, 8)), *layer, prepared=prepared)
    assert calls == operations_in("### forward")
    calls.clear()
    doraxp.backward(y, cache)
    assert calls == operations_in("### backward")
    calls.clear()
    doraxp.merge(*layer)
    assert calls == ["merge_and_measure"]


def test_the_way_of_a_tensor_calls_these_operations(layer, calls):
    weight, adapter, config = layer

    class Source:
        tensor = SimpleNamespace(shape=weight.shape)

        def read(self, rows, empty):
            return weight[rows]

    adapted = updated(doraxp.AdaptedLayer(adapter, config, doraxp.LayerKind(), weight.shape))
    (block,) = merged_blocks("w", Source(), [Term(adapted)], load_engine("numpy"), "float64")
    assert calls == operations_in("## The way of a tensor")
    np.testing.assert_allclose(block.merged, doraxp.merge(*layer), rtol=1e-12)


def test_a_name_that_does_not_exist_is_missed():
    assert found("backends/_nothing.py") is None
    path = ROOT / "src" / "doraxp" / "backends" / "_direction.py"
    assert "Factored.outputs" in definitions(path)
    assert not {"Factored.nothing", "nothing"} & definitions(path)
