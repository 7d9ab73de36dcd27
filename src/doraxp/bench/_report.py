"""The ratios of the times, and all figures in the types of JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

from doraxp._terminal.runtimes import versions
from doraxp.bench import _cuda, _device, _gpu
from doraxp.bench._curves import Curve, exponents
from doraxp.bench._machine import blas_kernels, threads
from doraxp.bench._measure import Measured
from doraxp.bench._peft import LIBRARY as PEFT

Ratio = tuple[float, float, float]


def ratios(one: Measured, task: list[Measured]) -> dict[str, Ratio | None]:
    """Return a contestant's ratios to others of its task, as quartiles over the rounds."""
    own = "torch" if one.library == PEFT else one.library
    bare, own_bare = (_find(task, library, "bare") for library in ("numpy", own))
    if own_bare is None and one.library == PEFT:  # on a GPU
        own_bare = _find(task, "cupy", "bare")
    theirs = _find(task, PEFT, "detached")
    is_dora = one.kind in ("exact", "detached")
    return {
        "over_bare_numpy": one.over(bare) if bare else None,
        "over_own_bare": one.over(own_bare) if own_bare else None,
        "peft_over_it": theirs.over(one) if theirs and theirs is not one and is_dora else None,
    }


def by_task(results: list[Measured]) -> Iterator[tuple[Any, list[Measured]]]:
    """Yield the workload and the task, together with all results of both."""
    for key, group in groupby(results, lambda one: (one.workload, one.task)):
        yield key, list(group)


def report(
    results: list[Measured],
    libraries: list[str],
    missing: dict[str, str],
    curves: Mapping[str, Curve],
) -> dict[str, Any]:
    """Return all figures and the conditions of the run, in the types of JSON."""
    took_part = dict.fromkeys([*libraries, *(one.library for one in results)])
    names = [name.lower() for name in took_part]
    modules = dict.fromkeys(["numpy", *names, *(["torch"] if "peft" in names else [])])
    head: dict[str, Any] = {
        "versions": versions(*modules),
        "threads": threads(),
        "blas_kernels": blas_kernels(),
        "missing": missing,
    }
    if (device := device_of(results)) is not None:
        head["device"] = device
    if curves:
        head["exponents"] = {name: exponents(name, curve) for name, curve in curves.items()}
    return {**head, "results": _figures(results)}


def device_of(results: list[Measured]) -> dict[str, Any] | None:
    """Return the description of the device that has done the work, or None for the host."""
    if any(one.library == _gpu.LIBRARY for one in results):
        return _device.description()
    return _cuda.description() if any(one.workload.device == "cuda" for one in results) else None


def _figures(results: list[Measured]) -> list[dict[str, Any]]:
    return [
        {
            "case": asdict(one.workload),
            "task": one.task,
            "contestant": one.name,
            "library": one.library,
            "seconds": one.seconds,
            "seconds_quartiles": one.quartiles,
            "host_seconds": one.host_seconds,
            "peak_bytes": one.peak_bytes,
            "errors": one.errors,
            **ratios(one, task),
        }
        for _, task in by_task(results)
        for one in task
    ]


def _find(task: list[Measured], library: str, kind: str) -> Measured | None:
    return next((one for one in task if (one.library, one.kind) == (library, kind)), None)
