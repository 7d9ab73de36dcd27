"""How the cost of a step grows with tokens, rank and size.

operations of an exact step, T tokens:   y and dx         4 T·out·in
W Aᵀ, q's part   4 rank·out·in
low-rank part    6 T·rank·(out + in)
bytes it must hold beyond its inputs:    y, z, dz, dx     T·(3 out + in) elements
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from doraxp.cli._bench.cases import Case, numpy_dtype
from doraxp.cli._bench.measure import Measured

TASK = "step"
SWEEPS: dict[str, tuple[int, ...]] = {
    "tokens": (1, 4, 16, 64, 256, 1024, 4096),
    "rank": (1, 4, 16, 64, 256),
    "size": (512, 1024, 2048, 4096, 8192),
}
Curve = dict[tuple[str, str], list[Measured]]
"""By library and name of the contestant, in the order of the sweep."""


def cases(base: Case) -> Iterator[tuple[str, int, Case]]:
    """Yield each sweep's name, value and case; all but that value are the base's."""
    for name, values in SWEEPS.items():
        for value in values:
            change: dict[str, Any] = {name: value}
            if name == "size":
                change = {"out": value, "inner": value}
            yield name, value, replace(base, **change)


def operations(case: Case) -> int:
    """Return the floating-point operations of an exact step: a product of two counts as two."""
    both = case.out + case.inner
    dense = 4 * (case.tokens + case.rank) * case.out * case.inner
    return dense + 6 * case.tokens * case.rank * both


def held_bytes(case: Case) -> int:
    """Return the bytes that an exact step holds at once beyond its inputs: y, z, dz and dx."""
    item = 8 if numpy_dtype(case.dtype) == np.float64 else 4
    return case.tokens * (3 * case.out + case.inner) * item


def exponent(xs: tuple[int, ...], ys: list[float]) -> float:
    """Return the p of y ∝ xᵖ that fits the upper half of the sweep, by least squares of the logs.

    The lower half is overhead, and the reading of the weight.
    """
    half = len(xs) // 2
    slope, _ = np.polyfit(np.log(xs[half:]), np.log(ys[half:]), 1)
    return float(slope)


def collect(base: Case, results: list[Measured]) -> dict[str, Curve]:
    """Return each sweep's curves out of what was measured."""
    found: dict[str, Curve] = {}
    for name, _, case in cases(base):
        curve = found.setdefault(name, {})
        for one in results:
            if one.case == case:
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
