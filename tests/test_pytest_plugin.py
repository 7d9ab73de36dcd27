"""The pytest plugin: it costs nothing unused, runs a test per case and library, and refuses."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from doraxp.backends import Status
from doraxp.testing import catalogue

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
PLUGIN = ("-p", "doraxp_pytest", "-p", "no:cacheprovider")


@pytest.fixture
def run(pytester, monkeypatch):
    """Run a test file with a fresh import of the plugin, where only NumPy can be used.

    pytester removes the modules that a run imports first. PyTorch and JAX fail when they are
    imported a second time, so a run must not import them.
    """
    both = [Status("numpy", True, ""), Status("jax", False, "not installed: pip install jax")]
    monkeypatch.setattr("doraxp.backends.available", lambda: both)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delitem(sys.modules, "doraxp_pytest", raising=False)

    def run_file(source, *options):
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess(*PLUGIN, *options)

    return run_file


def test_the_entry_point_names_the_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"doraxp_pytest": "doraxp_pytest"}


def test_the_plugin_imports_nothing_until_it_is_used(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(importlib.util.find_spec("doraxp_pytest").origin).parent)
    )
    pytester.makepyfile(
        """
        import sys

        def test_nothing_is_imported(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("doraxp_pytest")
            assert not {"doraxp", "numpy", "array_api_compat"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)


def test_each_case_makes_a_test_with_its_name(run):
    names = [case.name for case in catalogue()]
    result = run("def test(dora_case): assert dora_case.reason", "-v")
    result.assert_outcomes(passed=len(names))
    for name in names:
        assert f"::test[{name}] PASSED" in result.stdout.str()


def test_dora_cases_is_a_tuple_of_all_cases(run):
    source = """
    import pytest

    def test(dora_cases):
        assert [case.name for case in dora_cases][:2] == ["tall", "wide"]
    """
    run(source).assert_outcomes(passed=1)


def test_without_the_option_all_usable_libraries_run(run):
    result = run("def test(dora_backend): assert dora_backend.name == 'numpy'", "-v")
    result.assert_outcomes(passed=1)
    assert "::test[numpy] PASSED" in result.stdout.str()


def test_with_the_option_each_named_library_runs_once(run):
    source = """
    import numpy as np

    def test(dora_backend):
        assert dora_backend.asarray([1.0], "float32").dtype == np.float32
    """
    run(source, "--dora-backend=numpy", "--dora-backend=numpy").assert_outcomes(passed=1)


@pytest.mark.parametrize("indirect", [False, True])
def test_a_test_may_choose_its_cases_itself(run, indirect):
    source = f"""
    import pytest
    from doraxp.testing import catalogue

    CASES = [case for case in catalogue() if case.arrays["weight"].ndim > 2]

    @pytest.mark.parametrize("size, dora_case", [(2, case) for case in CASES], {indirect=})
    def test(size, dora_case, dora_backend):
        assert dora_case in CASES

    @pytest.fixture
    def size(request):
        return request.param
    """
    cases = [case for case in catalogue() if case.arrays["weight"].ndim > 2]
    result = run(source, "-v")
    result.assert_outcomes(passed=len(cases))
    for case in cases:
        assert f"::test[numpy-2-{case.name}] PASSED" in result.stdout.str()


def test_a_test_may_choose_its_libraries_itself(run):
    source = """
    import pytest

    @pytest.mark.parametrize("dora_backend", ["numpy"], indirect=True)
    def test(dora_backend):
        assert dora_backend.name == "numpy"
    """
    run(source).assert_outcomes(passed=1)


def test_a_test_runs_inside_the_context_of_its_library(run):
    source = """
    import contextlib
    import pytest
    import doraxp.testing._libraries as libraries

    log = []

    @contextlib.contextmanager
    def active(library):
        log.append("in")
        yield
        log.append("out")

    @pytest.fixture(autouse=True, scope="session")
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(libraries.Library, "active", active)
            yield
            assert log == ["in", "out"]

    def test(dora_backend):
        assert log == ["in"]
    """
    run(source, "--dora-backend=numpy").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jax", "--dora-backend: jax cannot run here: not installed: pip install jax"),
        ("abacus", "--dora-backend: each name must be one of numpy, jax, got 'abacus'"),
    ],
)
def test_a_named_library_that_cannot_run_is_an_error(run, name, message):
    result = run("def test(): pass", f"--dora-backend={name}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str()


def test_the_example_of_the_page_runs(run):
    page = (ROOT / "docs" / "howto" / "testing.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n((?:(?!```).)*dora_case(?:(?!```).)*)```", page, re.DOTALL)
    run(example, "--dora-backend=numpy").assert_outcomes(passed=len(catalogue()))
