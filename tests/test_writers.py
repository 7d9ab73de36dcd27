"""Merge the adapters of real writers, and compare with the writers' own merges.

`nox -s writers` runs this file. It needs the group `writers`, so it runs where it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # of the writers


def pytest_generate_tests(metafunc):
    """Import the writers where they are asked for, and run a test for each of their cases."""
    cases = all_cases() if "writers" in (metafunc.config.getoption("backend") or ()) else []
    metafunc.parametrize("case", cases, ids=lambda case: f"{case.writer}-{case.name}")


def all_cases():
    package = importlib.import_module("writers")
    with warnings.catch_warnings(action="ignore"):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"writers.{module.name}")
        return importlib.import_module("writers.matrix").CASES


def test_merge_equals_that_of_the_writer(writers, case, tmp_path: Path, record_property):
    result = writers.judge(case, tmp_path)
    record_property("cell", (*case[:2], *result))
    assert result.state != "WRONG", result
    if case.refused is None:
        assert result.state == "right", result.text
    else:
        assert case.refused in result.text, f"right is a refusal that names {case.refused!r}"
