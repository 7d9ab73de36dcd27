"""A pytest plugin that writes docs/reference/support.md: `nox -s support`, or `-p support_page`.

A run writes docs/reference/support/LANE.json for each lane that it ran in full, and then the page
of all these files.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from backends import LANES
from support import DTYPES, FEATURES

DOCS = Path(__file__).parent.parent / "docs" / "reference"
PAGE, FRAGMENTS = DOCS / "support.md", DOCS / "support"
INTRODUCTION = """\
# Libraries, dtypes and features

This page is generated: `nox -s support` runs each cell on its library and writes it. The cells of a
run are in `docs/reference/support/`, one file for each library. CI runs the cells again, and fails
where one of them differs from its declaration in `tests/limits.py`.

| cell | meaning |
|---|---|
| right | every number is within its bound of [`doraxp.testing`](../howto/testing.md) |
| refused | the package raises an error that says why |
| no | the library lacks the dtype or a function |

A number behind a cell is that of the reason, below the table. x, dy, the mask and the weight are in
the dtype of the row. The adapter and its steps are float32, with a float64 weight float64. A stored
weight of 16 bits has the bound of the precision in which the library computes, exact or mixed.

"jit, graph" is `jax.jit`, `mlx.core.compile`, a model of ONNX, or a graph that is complete before
the first number is computed.
"""
TITLES = {
    "numpy": "NumPy",
    "strict": "array-api-strict",
    "strict-draft": "array-api-strict, draft 2026.12",
    "torch": "PyTorch",
    "jax": "JAX",
    "dask": "Dask",
    "cuda-host": "CuPy, emulated by NumPy",
    "mlx": "MLX",
    "sparse": "sparse",
    "ndonnx": "ndonnx",
    "cubed": "cubed",
    "blosc2": "blosc2",
}
"""The lanes of the page, by name. The cells of CuPy run on an emulated device, not on a GPU."""
SHORT = {"right": "right", "refused": "refused", "not possible": "no"}
Fragment = Mapping[str, Any]
CELLS: list[tuple[Any, ...]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect a cell; with several processes, the one that reports collects all."""
    if report.when == "call" and report.passed:
        CELLS.extend(tuple(cell) for key, cell in report.user_properties if key == "cell")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the files and the page, in the process that reports."""
    if hasattr(session.config, "workerinput"):
        return
    FRAGMENTS.mkdir(exist_ok=True)
    for lane in dict.fromkeys(cell[0] for cell in CELLS):
        text = json.dumps(fragment([cell for cell in CELLS if cell[0] == lane]), indent=1)
        (FRAGMENTS / f"{lane}.json").write_text(f"{text}\n", "utf-8")
    if all((FRAGMENTS / f"{lane}.json").exists() for lane in TITLES):
        PAGE.write_text(page(read()), "utf-8")


def fragment(cells: list[tuple[Any, ...]]) -> Fragment:
    """Return the file of a lane: its library's version, and its cells by dtype and feature."""
    rows: dict[str, dict[str, str]] = {}
    for _, _, dtype, feature, state in sorted(cells, key=lambda cell: cell[2:4]):
        rows.setdefault(dtype, {})[feature] = state
    return {"version": cells[0][1], "python": platform.python_version(), "cells": rows}


def read() -> dict[str, Fragment]:
    """Return the file of each lane."""
    paths = {lane: FRAGMENTS / f"{lane}.json" for lane in TITLES}
    return {lane: json.loads(path.read_text("utf-8")) for lane, path in paths.items()}


def page(fragments: Mapping[str, Fragment]) -> str:
    """Return the text of the page."""
    return "\n".join([INTRODUCTION, *tables(fragments), ""])


def tables(fragments: Mapping[str, Fragment]) -> Iterable[str]:
    """Yield the lines of the table, of the sums and of the reasons."""
    cells = [
        cell for one in fragments.values() for row in one["cells"].values() for cell in row.values()
    ]
    count = {state: cells.count(state) for state in SHORT}
    yield (
        f"{len(cells)} cells on {len(fragments)} libraries: {count['right']} right, "
        f"{count['refused']} refused, {count['not possible']} not possible."
    )
    yield from (
        "",
        f"| library | dtype | {' | '.join(FEATURES)} |",
        "|---" * (len(FEATURES) + 2) + "|",
    )
    reasons: dict[str, int] = {}
    for lane, one in fragments.items():
        title = f"{TITLES[lane]} {one['version']}"
        for dtype in DTYPES:
            row = []
            for feature in FEATURES:
                reason = LANES[lane][0].limit(feature, dtype)
                row.append(shown(one["cells"][dtype][feature], reason, reasons))
            yield f"| {title} | {dtype} | {' | '.join(row)} |"
            title = ""
    yield ""
    for reason, number in reasons.items():
        yield f"{number}. {reason}"


def shown(state: str, reason: str | None, reasons: dict[str, int]) -> str:
    """Return a cell of the table. A new reason gets the next number."""
    if reason is None:
        return SHORT[state]
    return f"{SHORT[state]} ({reasons.setdefault(reason, len(reasons) + 1)})"
