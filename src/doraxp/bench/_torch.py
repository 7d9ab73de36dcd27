"""The contestants of PyTorch: its own bare products, and on a CPU doraxp's functions on tensors.

x has the weight's dtype, as it has in training, and dy has y's. Under autocast that is autocast's
dtype, and the products are made in it; doraxp's functions on tensors do not know autocast.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from doraxp._base.types import Adapter, Array
from doraxp._terminal.runtimes import runtime
from doraxp.bench._contestant import Contestant
from doraxp.bench._ways import bare, ways
from doraxp.bench._workloads import AUTOCAST, IN_PRODUCTS, Workload, stored

if TYPE_CHECKING:
    from torch import Tensor

LIBRARY = "torch"
TASKS = ("step", "evaluation")
"""The tasks that are measured under autocast and on a CUDA device."""
PLACES = {"cpu": "cpu", "cuda": "cuda"}
"""PyTorch's devices, by the device of a workload."""
Block: TypeAlias = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes a block to call a layer in."""


class Tensors(NamedTuple):
    """The `Inputs` of a workload as tensors."""

    weight: Tensor
    adapter: Adapter
    x: Tensor
    dy: Tensor


def contestants(task: str, workload: Workload) -> Iterator[Contestant]:
    """Yield the bare product first."""
    inputs: Any = tensors(workload)
    block = autocast(workload)
    own = bare(task, inputs)
    found = [own] if own is not None else []
    if workload.device == "cpu" and not workload.autocast:
        found += [way for way in ways(task, inputs, workload.config) if way.kind != "bare"]
    for way in found:

        def call(way: Any = way) -> Any:
            with block():
                return way.function(*way.arrays)

        is_rounded = way.kind == "bare" or task in IN_PRODUCTS  # a bare W Aᵀ rounds A
        tolerance = workload.roundings if is_rounded else None
        yield Contestant(
            way.name, LIBRARY, way.kind, call, way.answer, tolerance=tolerance, is_stored=True
        )


def tensors(workload: Workload) -> Tensors:
    """Return the inputs as tensors, x in the weight's dtype and dy in that of y."""
    weight, adapter, x, dy = stored(workload)
    place = PLACES[workload.device]
    gradient: Any = tensor(dy, place)
    if workload.autocast:
        gradient = gradient.to(getattr(importlib.import_module("torch"), AUTOCAST))
    leaves = Adapter(*(tensor(leaf, place) for leaf in adapter))
    return Tensors(tensor(weight, place), leaves, tensor(x, place), gradient)


def tensor(array: Array, place: str) -> Tensor:
    """Return a NumPy array as a tensor on a device of PyTorch's."""
    made: Any = runtime("torch").asarray(array)
    moved: Tensor = made.to(place)
    return moved


def autocast(workload: Workload) -> Block:
    """Return a function that makes the block of autocast, or one without effect."""
    if not workload.autocast:
        return contextlib.nullcontext
    torch = importlib.import_module("torch")
    return lambda: torch.autocast(PLACES[workload.device], getattr(torch, AUTOCAST))
