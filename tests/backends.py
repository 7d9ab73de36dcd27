"""Lanes: for each array library, how a test makes an array, calls a function and reads values.

`pytest --backend jax` chooses a backend by name. Some backends have two lanes, and their name
runs the harder one too: read-only NumPy, the strictest array-api-strict (no extensions, no boolean
indexing, no data-dependent shapes), and JAX under `jax.jit`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import array_api_compat.numpy
import cuda_host
import ml_dtypes  # tells NumPy of bfloat16
import numpy as np
import pytest
from limits import LIMITS

from doraxp.backends import array_namespace, available, operations
from doraxp.backends._cupy.operations import CupyOperations


class Lane:
    """The lane of NumPy. Other lanes override the methods that differ."""

    name = "numpy"
    backend = "numpy"
    distribution = "numpy"
    """The name of the package that installs the library."""
    fuses = False
    """Whether a compiler may round a product and a sum together: two programs then differ."""

    def namespace(self) -> Any:
        return array_namespace(self.asarray(np.zeros(1)))

    def asarray(self, values: np.ndarray) -> Any:
        """Return `values` as a new array of this library with the same dtype."""
        return np.array(values)

    def numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def read(self, arrays: list[Any]) -> list[np.ndarray]:
        """Return arrays of NumPy; a lazy library computes what they share once."""
        return [self.numpy(array) for array in arrays]

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` the way that this lane tests every public function."""
        return function(*args, **kwargs)

    @property
    def limits(self) -> Mapping[str, str]:
        """The limits of the library, with their reasons."""
        names = (getattr(kind, "name", "") for kind in type(self).__mro__)
        return next(LIMITS[name] for name in names if name in LIMITS)

    def has(self, dtype: str) -> bool:
        return dtype not in self.limits

    def limit(self, feature: str, dtype: str) -> str | None:
        """Return why a feature is not right in a dtype; None where it is."""
        asked = ("*", dtype, feature, f"{feature}, {dtype}")
        return next((self.limits[key] for key in asked if key in self.limits), None)

    def compiled(self, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[Any]:
        """Trace `function` of a list of arrays without values, and return what the graph computes.

        Raises
        ------
        NotImplementedError
            The library has no graphs, or none that this lane makes.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def library(self) -> Iterator[None]:
        """Enter the context in which `doraxp.testing.Library` is this lane's library."""
        yield


class ReadOnlyNumpy(Lane):
    name = "numpy-readonly"

    def asarray(self, values: np.ndarray) -> Any:
        array = np.array(values)
        array.setflags(write=False)
        return array


class Strict(Lane):
    name = "strict"
    backend = "array_api_strict"
    distribution = "array-api-strict"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with np.errstate(over="ignore"):  # NumPy computes, and warns where the guard recomputes
            yield

    def asarray(self, values: np.ndarray) -> Any:
        import array_api_strict

        return array_api_strict.asarray(np.array(values))

    def numpy(self, array: Any) -> np.ndarray:
        return np.from_dlpack(array)


class Strictest(Strict):
    name = "strictest"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        from array_api_strict import ArrayAPIStrictFlags

        flags = ArrayAPIStrictFlags(
            boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
        )
        with super().active(), flags:
            yield


class StrictDraft(Strict):
    """array-api-strict with the draft of the next standard."""

    name = "strict-draft"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        from array_api_strict import ArrayAPIStrictFlags

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .* is in draft status", UserWarning)
            with super().active(), ArrayAPIStrictFlags(api_version="2026.12"):
                yield


class Torch(Lane):
    name = "torch"
    backend = distribution = "torch"

    def asarray(self, values: np.ndarray) -> Any:
        import torch

        if values.dtype.name == "bfloat16":
            return torch.tensor(values.astype(np.float32)).to(torch.bfloat16)
        return torch.tensor(np.array(values))

    def compiled(self, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[Any]:
        """Trace by TorchDynamo, and compute the graph without a compiler of kernels."""
        import torch

        graph = torch.compile(function, fullgraph=True, backend="eager")
        return graph(list(map(self.asarray, arrays)))

    def numpy(self, array: Any) -> np.ndarray:
        import torch

        if array.dtype == torch.bfloat16:
            return array.to(torch.float32).numpy().astype(ml_dtypes.bfloat16)
        return array.numpy()


class Jax(Lane):
    name = "jax"
    backend = distribution = "jax"

    def asarray(self, values: np.ndarray) -> Any:
        import jax.numpy

        return jax.numpy.array(values)

    def compiled(self, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[Any]:
        import jax

        return jax.jit(function)(list(map(self.asarray, arrays)))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        import jax

        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            yield


class JaxJit(Jax):
    name = "jax-jit"
    fuses = True

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` under jit. Arrays among the arguments are traced, the rest is static."""
        import jax

        leaves, tree = jax.tree_util.tree_flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        static = tuple(None if isinstance(leaf, jax.Array) else Static(leaf) for leaf in leaves)
        return jitted(function, tree, static)(arrays)


class Static:
    """A static argument. 1, 1.0 and True differ, and any two objects of other classes differ."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _key(self) -> Any:
        plain = isinstance(self.value, bool | int | float | str)
        return (type(self.value), repr(self.value)) if plain else id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@functools.lru_cache(maxsize=256)
def jitted(function: Callable[..., Any], tree: Any, static: tuple[Static | None, ...]) -> Any:
    """Return the jitted `function` of its arrays; tests with equal static arguments share it."""
    import jax

    def call(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if leaf is None else leaf.value for leaf in static]
        args, kwargs = jax.tree_util.tree_unflatten(tree, filled)
        return function(*args, **kwargs)

    return jax.jit(call)


class Dask(Lane):
    name = "dask"
    backend = distribution = "dask"

    def asarray(self, values: np.ndarray) -> Any:
        import dask.array

        chunks = tuple(max(1, -(-size // 2)) for size in values.shape)
        return dask.array.from_array(np.array(values), chunks=chunks)

    def numpy(self, array: Any) -> np.ndarray:
        # To optimise a graph takes longer than to compute these small ones. `read` does it.
        return np.asarray(array.compute(scheduler="synchronous", optimize_graph=False))

    def read(self, arrays: list[Any]) -> list[np.ndarray]:
        import dask

        return [np.asarray(one) for one in dask.compute(*arrays, scheduler="synchronous")]

    def compiled(self, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[Any]:
        return self.run(function, list(map(self.asarray, arrays)))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Build the graph; a computation of it fails."""
        import dask

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("a public function computed a Dask graph")

        with dask.config.set(scheduler=refuse):
            return function(*args, **kwargs)

    def has(self, dtype: str) -> bool:
        return dtype != "bfloat16"


class Cupy(Lane):
    name = "cupy"
    backend = "cupy"
    distribution = "cupy-cuda13x"

    def asarray(self, values: np.ndarray) -> Any:
        import cupy

        return cupy.array(values)

    def numpy(self, array: Any) -> np.ndarray:
        return array.get()


class HostCuda(Lane):
    """CuPy's operations on an emulated device, made from a C++ compiler and NumPy."""

    name = "cuda-host"

    def asarray(self, values: np.ndarray) -> Any:
        return np.array(values).view(cuda_host.DeviceArray)

    def numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array).view(np.ndarray)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function`; a read of values fails."""
        with cuda_host.forbid_reading():
            return function(*args, **kwargs)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        xp = array_api_compat.numpy
        ops = CupyOperations(xp, cuda_host.HostCuda())
        with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
            patch.setattr("doraxp.backends._boundary._operations_of", lambda _: ops)
            patch.setattr(CupyOperations, "check_device", lambda *_: None)
            yield

    @contextlib.contextmanager
    def library(self) -> Iterator[None]:
        """Compute with NumPy's own arrays on the emulated device too."""
        ops = operations(weight=self.asarray(np.zeros((1, 1))))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("doraxp.backends._boundary._NUMPY", ops)
            yield


class Mlx(Lane):
    name = "mlx"
    backend = distribution = "mlx"

    def compiled(self, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[Any]:
        import mlx.core as mx

        return mx.compile(function)(list(map(self.asarray, arrays)))

    def asarray(self, values: np.ndarray) -> Any:
        import mlx.core as mx

        name = values.dtype.name
        if name == "bfloat16":
            values = values.astype(np.float32)
        return mx.array(np.array(values), dtype=getattr(mx, "bool_" if name == "bool" else name))

    def numpy(self, array: Any) -> np.ndarray:
        import mlx.core as mx

        if array.dtype == mx.bfloat16:
            return np.array(array.astype(mx.float32)).astype(ml_dtypes.bfloat16)
        return np.array(array)


class Sparse(Lane):
    name = "sparse"
    backend = distribution = "sparse"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with np.errstate(all="ignore"):  # sparse computes its fill values by NumPy, 0 / 0 too
            yield

    def asarray(self, values: np.ndarray) -> Any:
        import sparse

        return sparse.asarray(np.array(values))

    def numpy(self, array: Any) -> np.ndarray:
        return array.todense()


class Ndonnx(Lane):
    name = "ndonnx"
    backend = distribution = "ndonnx"

    def asarray(self, values: np.ndarray) -> Any:
        import ndonnx

        return ndonnx.asarray(np.array(values))

    def numpy(self, array: Any) -> np.ndarray:
        return array.unwrap_numpy()

    def compiled(self, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[Any]:
        """Build a model of arguments without values, and compute it by ONNX Runtime."""
        import ndonnx
        import onnxruntime

        names = [f"x{i}" for i in range(len(arrays))]
        symbols = {
            name: ndonnx.argument(shape=array.shape, dtype=getattr(ndonnx, array.dtype.name))
            for name, array in zip(names, arrays, strict=True)
        }
        results = function(list(symbols.values()))
        model = ndonnx.build(symbols, {f"y{i}": array for i, array in enumerate(results)})
        session = onnxruntime.InferenceSession(model.SerializeToString())
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return list(map(self.asarray, outputs))


class Cubed(Lane):
    name = "cubed"
    backend = distribution = "cubed"

    def asarray(self, values: np.ndarray) -> Any:
        import cubed.array_api

        return cubed.array_api.asarray(np.array(values))

    def numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array.compute())

    def read(self, arrays: list[Any]) -> list[np.ndarray]:
        import cubed

        return [np.asarray(one) for one in cubed.compute(*arrays)]

    def compiled(self, function: Callable[..., Any], arrays: list[np.ndarray]) -> list[Any]:
        return self.run(function, list(map(self.asarray, arrays)))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Build the plan; a computation of it fails."""
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr("cubed.Array.compute", None)
            warnings.simplefilter("ignore", DeprecationWarning)  # cubed imports numpy.core
            return function(*args, **kwargs)

    def has(self, dtype: str) -> bool:
        return dtype != "bfloat16"


class Blosc2(Lane):
    name = "blosc2"
    backend = distribution = "blosc2"

    def asarray(self, values: np.ndarray) -> Any:
        import blosc2

        return blosc2.asarray(np.array(values))


LANES: dict[str, tuple[Lane, ...]] = {
    "numpy": (Lane(), ReadOnlyNumpy()),
    "strict": (Strict(), Strictest()),
    "strict-draft": (StrictDraft(),),
    "torch": (Torch(),),
    "jax": (Jax(), JaxJit()),
    "dask": (Dask(),),
    "cupy": (Cupy(),),
    "cuda-host": (HostCuda(),),
    "mlx": (Mlx(),),
    "sparse": (Sparse(),),
    "ndonnx": (Ndonnx(),),
    "cubed": (Cubed(),),
    "blosc2": (Blosc2(),),
}

ON_REQUEST = {"cuda-host", "mlx", "sparse", "ndonnx", "cubed", "blosc2", "strict-draft"}
"""Lanes that run only when they are named: one needs a C++ compiler, the others run few files."""


def reason_against(lane: Lane) -> str | None:
    """Return the reason why this machine cannot run `lane`, or None where it can."""
    for status in available():
        if status.name == lane.backend:
            return None if status.usable else status.detail
    return None if importlib.util.find_spec(lane.backend) else "not installed"
