"""The pages on installation and compatibility say the same as pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGE = (ROOT / "docs" / "tutorials" / "install.md").read_text("utf-8")
ROWS = {
    extra: cells.split(" | ")
    for extra, cells in re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE)
}


def named(need: str) -> str:
    """Return the name in a requirement; doraxp[checkpoint] is an extra."""
    own = re.fullmatch(r"doraxp\[(\w+)\]", need)
    return f"the extra `{own[1]}`" if own else re.split("[<>=;]", need)[0]


def test_the_table_has_every_extra():
    assert set(ROWS) == set(EXTRAS)


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_row_names_the_packages_of_the_extra(extra):
    _, packages = ROWS[extra]
    assert packages.split(", ") == [named(need) for need in EXTRAS[extra]]


def test_the_versions_of_python_are_those_of_the_classifiers():
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    first, *_ = versions
    *others, last = versions
    assert f"Python {first} or newer, and CI runs it on {', '.join(others)} and {last}" in PAGE
    assert PROJECT["requires-python"] == f">={first}"


def test_the_page_on_compatibility_has_the_lowest_versions():
    page = (ROOT / "docs" / "reference" / "compatibility.md").read_text("utf-8")
    table = re.findall(r"^\| ([\w ,-]+) \| ([\d.][^|]*) \|", page, re.MULTILINE)
    written = {
        name: re.findall(r"\d[\d.]*", floor)[0]
        for names, floors in table
        for name, floor in zip(names.split(", "), re.split(", ", floors), strict=True)
    }
    needs = [*PROJECT["dependencies"], *(need for needs in EXTRAS.values() for need in needs)]
    lowest = {named(need): need.split(">=")[1].split(";")[0] for need in needs if ">=" in need}
    assert written == {
        "Python": PROJECT["requires-python"].removeprefix(">="),
        "NumPy": "2.0",
        "array-api-compat": lowest["array-api-compat"],
        "PyTorch": lowest["torch"],
        "JAX": lowest["jax"],
        "CuPy": lowest["cupy-cuda13x"],
        "Dask": lowest["distributed"],
    }
    assert PROJECT["dependencies"][:2] == [
        "numpy>=2.0; python_version < '3.13'",
        "numpy>=2.1; python_version >= '3.13'",
    ]
    assert "2.0; 2.1 on Python 3.13" in page
