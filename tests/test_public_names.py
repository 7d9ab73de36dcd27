"""`__all__` of each public module names exactly what is public there, and the reference has it.

The files are read, not imported: the bridges need PyTorch and JAX.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
SCRIPT = importlib.util.spec_from_file_location("api_tables", ROOT / "docs" / "api_tables.py")
api_tables = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(api_tables)
ENTRIES = api_tables.ROW.findall(api_tables.API.read_text("utf-8"))
FOR_USERS = (
    "doraxp",
    "doraxp.backends",
    "doraxp.checkpoint",
    "doraxp.jax",
    "doraxp.layers",
    "doraxp.optim",
    "doraxp.testing",
    "doraxp.torch",
)

MODULES = {module: {} for module in FOR_USERS} | {"doraxp": {"backends": 0}}
"""The public names that the reference describes as a module, and not on a page of their own."""


def file_of(module: str) -> Path:
    path = SRC.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_modules() -> list[str]:
    """Return the modules that have an `__all__` and no underscore in their dotted names."""
    dotted = {
        ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        for path in SRC.rglob("*.py")
        if "__all__" in assigned(path.read_text("utf-8"))
    }
    return sorted(name for name in dotted if not any(p[0] == "_" for p in name.split(".")))


def assigned(source: str) -> dict[str, ast.expr]:
    """Return the values that a module gives to names."""
    return {
        target.id: node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def listed(source: str) -> list[str]:
    """Return the names in a module's `__all__`."""
    return ast.literal_eval(assigned(source)["__all__"])


def defined(source: str) -> set[str]:
    """Return the functions, classes and values that a module defines itself."""
    found = set(assigned(source))
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def imported(source: str) -> dict[str, str]:
    """Return the names that a module imports from the package, with the modules they are from."""
    return {
        alias.asname or alias.name: str(node.module)
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def origin(module: str, name: str) -> tuple[str, str]:
    """Return the module that defines a public name, and the name: some modules pass names on."""
    source = imported(file_of(module).read_text("utf-8")).get(name, module)
    return (module, name) if source == module else origin(source, name)


def faults(source: str) -> list[str]:
    """Return how `__all__` differs from the public names of a module."""
    names = listed(source)
    wrong = [f"{name} is listed twice" for name in sorted(set(names)) if names.count(name) > 1]
    exists = defined(source) | set(imported(source))
    wrong += [f"{name} does not exist" for name in names if name not in exists]
    wrong += [f"{name} is private" for name in names if name.startswith("_")]
    public = {name for name in defined(source) if not name.startswith("_")}
    return wrong + [f"{name} is missing" for name in sorted(public - set(names))]


@pytest.mark.parametrize("module", public_modules())
def test_all_names_exactly_what_is_public(module):
    assert faults(file_of(module).read_text("utf-8")) == []


@pytest.mark.parametrize("module", FOR_USERS)
def test_the_reference_describes_every_public_name_once(module):
    names = sorted(listed(file_of(module).read_text("utf-8")))
    described = [origin(*entry.rsplit(".", 1)) for entry in ENTRIES]
    counts = {name: described.count(origin(module, name)) for name in names}
    assert {name: count for name, count in counts.items() if count != 1} == MODULES[module]


def test_every_entry_of_the_reference_is_public():
    for entry in ENTRIES:
        module, _, name = entry.rpartition(".")
        assert entry in FOR_USERS or name in listed(file_of(module).read_text("utf-8")), entry


def test_the_descriptions_of_the_reference_are_those_of_the_docstrings():
    """Where this test fails, run `python docs/api_tables.py`."""
    assert api_tables.API.read_text("utf-8") == api_tables.page()


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("__all__ = ['f', 'f']\ndef f(): pass", "f is listed twice"),
        ("__all__ = ['f']", "f does not exist"),
        ("__all__ = ['_f']\ndef _f(): pass", "_f is private"),
        ("__all__ = []\ndef f(): pass", "f is missing"),
        ("__all__ = []\nclass F: pass", "F is missing"),
        ("__all__ = []\nF: int = 1", "F is missing"),
        ("__all__ = []\nF = 1", "F is missing"),
    ],
)
def test_a_wrong_list_is_found(source, fault):
    assert faults(source) == [fault]
    assert faults("from a import b\n__all__ = ['b', 'c']\ndef c(): pass\n_d = 1") == []
