"""The install page names every extra of pyproject.toml with what it installs."""

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
