"""How the cost of a step grows with tokens, rank and size.

operations of an exact step of T tokens     y and dx          4 T·out·in
                                            W Aᵀ, q's part    4 rank·out·in
                                            low-rank part     6 T·rank·(out + in)
elements that it holds beyond its inputs    y, z, dz, dx      T·(3 out + in)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from doraxp.bench._measure import Measured
from doraxp.bench._workloads import Workload, numpy_dtype

TASK = "step"
SWEEPS: dict[str, tuple[int, ...]] = {
    "tokens": (1, 4, 16, 64, 256, 1024, 4096),
    "rank": (1, 4, 16, 64, 256),
    "size": (512, 1024, 2048, 4096, 8192),
}
Curve = dict[tuple[str, str], list[Measured]]
"""The points of each contestant, by library and name, in the order of the sweep."""


def workloads(base: Workload) -> Iterator[tuple[str, Workload]]:
    """Yield the name and the workload of each point; each changes one size of the base."""
    for name, values in SWEEPS.items():
        for value in values:
            change: dict[str, Any] = {name: value}
            if name == "size":
                change = {"out": value, "inner": value}
            yield name, replace(base, **change)


def operations(workload: Workload) -> int:
    """Return the number of floating-point operations, additions too, of an exact step."""
    both = workload.out + workload.inner
    dense = 4 * (workload.tokens + workload.rank) * workload.out * workload.inner
    return dense + 6 * workload.tokens * workload.rank * both


def held_bytes(workload: Workload) -> int:
    """Return the bytes of y, z, dz and dx, which an exact step holds beyond its inputs."""
    item = 8 if numpy_dtype(workload.dtype) == np.float64 else 4
    return workload.tokens * (3 * workload.out + workload.inner) * item


def exponent(xs: tuple[int, ...], ys: list[float]) -> float:
    """Return the p of y ∝ xᵖ that fits the upper half of a sweep, by least squares of the logs.

    In the lower half, the fixed cost of a call and the reading of the weight prevail.
    """
    half = len(xs) // 2
    slope, _ = np.polyfit(np.log(xs[half:]), np.log(ys[half:]), 1)
    return float(slope)


def collect(base: Workload, results: list[Measured]) -> dict[str, Curve]:
    """Return the curves of each sweep around a base, out of all results."""
    found: dict[str, Curve] = {}
    for name, workload in workloads(base):
        curve = found.setdefault(name, {})
        for one in results:
            if one.workload == workload:
                curve.setdefault((one.library, one.name), []).append(one)
    return found


def exponents(name: str, curve: Curve) -> list[dict[str, Any]]:
    """Return, for each contestant of a sweep, the exponents of time and memory."""
    xs, fitted = SWEEPS[name], []
    for (library, contestant), points in curve.items():
        peaks = [float(one.peak_bytes or 0) for one in points]
        fitted.append(
            {
                "library": library,
                "contestant": contestant,
                "time": exponent(xs, [one.quartiles[1] for one in points]),
                "memory": exponent(xs, peaks) if all(peaks) else None,
            }
        )
    return fitted
