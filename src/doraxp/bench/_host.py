"""The contestants on the host: bare products and doraxp, on one array library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from doraxp._base.types import Adapter
from doraxp._terminal.runtimes import Runtime, runtime
from doraxp.bench._contestant import Contestant
from doraxp.bench._ways import Way, ways
from doraxp.bench._workloads import Inputs, Workload, draw


def contestants(task: str, workload: Workload, library: str) -> Iterator[Contestant]:
    """Yield the contestants of an array library, the bare product first."""
    run = runtime(library)
    inputs = _in_library(draw(workload), run)
    for way in ways(task, inputs, workload.config):
        yield Contestant(way.name, library, way.kind, _call(way, run), way.answer)


def _call(way: Way, run: Runtime) -> Callable[[], Any]:
    function = run.compiled(way.function)
    return lambda: run.wait(function(*way.arrays))


def _in_library(inputs: Inputs, run: Runtime) -> Inputs:
    weight, adapter, x, dy = inputs
    copy = run.asarray(weight)
    if not str(copy.dtype).endswith(str(weight.dtype)):
        raise ValueError(
            f"{run.name} made {copy.dtype} of {weight.dtype}: JAX needs JAX_ENABLE_X64=1 for it"
        )
    return Inputs(copy, Adapter(*map(run.asarray, adapter)), run.asarray(x), run.asarray(dy))
