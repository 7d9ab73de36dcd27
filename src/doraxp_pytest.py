"""The pytest plugin: the catalogue's cases and the array libraries, as fixtures.

    dora_case      one case; a test that asks for it runs once for each, with its name as the id
    dora_cases     all cases, as a tuple
    dora_backend   one array library; a test runs once for each of `--dora-backend`, or else for
                   each that can be used here

Where doraxp is installed, pytest imports this module at every start. So the module is outside of
the package, which imports NumPy, and imports the package only when a test asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from doraxp.testing import Case, Library


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare `--dora-backend`."""
    parser.getgroup("doraxp").addoption(
        "--dora-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="array library for the fixture dora_backend, by its name in "
        "doraxp.backends.available(); repeatable (default: all that can be used here)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a library of `--dora-backend` that cannot run here."""
    if names := config.getoption("dora_backend"):
        from doraxp.testing import check_usable

        try:
            check_usable(names)
        except (RuntimeError, ValueError) as error:
            raise pytest.UsageError(f"--dora-backend: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once for each case and each library, unless its own marks choose them."""
    wanted = set(metafunc.fixturenames) - _chosen(metafunc)
    if "dora_case" in wanted:
        from doraxp.testing import catalogue

        metafunc.parametrize("dora_case", catalogue(), indirect=True)
    if "dora_backend" in wanted:
        from doraxp import backends

        names = metafunc.config.getoption("dora_backend") or [
            status.name for status in backends.available() if status.usable
        ]
        metafunc.parametrize("dora_backend", list(dict.fromkeys(names)), indirect=True)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a test after its case."""
    return getattr(val, "name", None) if argname == "dora_case" else None


def _chosen(metafunc: pytest.Metafunc) -> set[str]:
    """Return the names that the test's own marks parametrise."""
    chosen: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        chosen.update(names.replace(",", " ").split() if isinstance(names, str) else names)
    return chosen


@pytest.fixture
def dora_case(request: pytest.FixtureRequest) -> Case:
    """One case of doraxp.testing.catalogue(); the test runs once for each."""
    case: Case = request.param
    return case


@pytest.fixture(scope="session")
def dora_cases() -> tuple[Case, ...]:
    """All cases of doraxp.testing.catalogue()."""
    from doraxp.testing import catalogue

    return catalogue()


@pytest.fixture
def dora_backend(request: pytest.FixtureRequest) -> Iterator[Library]:
    """One array library, ready to compute; the test runs once for each."""
    import numpy as np

    from doraxp.testing import Library

    library = Library(request.param)
    with library.active(), np.errstate(all="ignore"):  # an overflow shows in the numbers
        yield library
