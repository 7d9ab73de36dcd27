"""The ratios and the times, as tables by rich and as nested figures for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from doraxp.cli._bench.curves import SWEEPS, Curve, exponents
from doraxp.cli._bench.measure import Measured
from doraxp.cli._bench.peft import LIBRARY as PEFT

Ratio = tuple[float, float, float]


def ratios(one: Measured, task: list[Measured]) -> dict[str, Ratio | None]:
    """Return how a contestant compares with others of its task, as quartiles over the rounds."""
    own = "torch" if one.library == PEFT else one.library
    bare, own_bare = (_find(task, library, "bare") for library in ("numpy", own))
    if own_bare is None and one.library == PEFT:  # on a GPU
        own_bare = _find(task, "cupy", "bare")
    theirs = _find(task, PEFT, "detached")
    ours = one.library != PEFT and one.kind in ("exact", "detached")
    return {
        "over_bare_numpy": one.over(bare) if bare else None,
        "over_own_bare": one.over(own_bare) if own_bare else None,
        "peft_over_it": theirs.over(one) if theirs and ours else None,
    }


def by_task(results: list[Measured]) -> Iterator[tuple[Any, list[Measured]]]:
    """Yield case and task with all that did it."""
    for key, group in groupby(results, lambda one: (one.case, one.task)):
        yield key, list(group)


def print_tables(results: list[Measured], console: Console) -> None:
    """Print the ratios of each case, then times and memory."""
    for case, group in groupby(results, lambda one: one.case):
        of_case = list(group)
        headings = ("÷ NumPy's\nbare", "÷ its own\nbare", "PEFT's\n÷ it")
        table = _table(f"Ratios of time, {case}", headings)
        for _, task in by_task(of_case):
            for one in task:
                shown = map(_ratio, ratios(one, task).values())
                table.add_row(*_labels(one, task), *shown, end_section=one is task[-1])
        console.print(table, "")
    on_host = ("host\nms",) if any(one.host_seconds for one in results) else ()
    for case, group in groupby(results, lambda one: one.case):
        headings = ("median\nms", "quartiles\nms", *on_host, "peak\nMiB")
        table = _table(f"Times and memory, {case}", headings)
        for _, task in by_task(list(group)):
            for one in task:
                low, median, high = (f"{1e3 * second:.3g}" for second in one.quartiles)
                peak = "–" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:.1f}"
                host = [f"{1e3 * one.host_seconds:.3g}"] if one.host_seconds else []
                cells = (median, f"{low}–{high}", *host, peak)
                table.add_row(*_labels(one, task), *cells, end_section=one is task[-1])
        console.print(table, "")


def print_exponents(found: dict[str, Curve], console: Console) -> None:
    """Print, by sweep and contestant, seconds at both ends, and the exponents."""
    headings = ("first\nms", "last\nms", "time\nexponent", "memory\nexponent")
    for name, curve in found.items():
        table = _table(f"A step over {name} {SWEEPS[name][0]} to {SWEEPS[name][-1]}", headings)
        for points, fit in zip(curve.values(), exponents(name, curve), strict=True):
            ends = (f"{1e3 * points[i].quartiles[1]:.3g}" for i in (0, -1))
            fits = ("–" if fit[key] is None else f"{fit[key]:.2f}" for key in ("time", "memory"))
            first = points is next(iter(curve.values()))
            labels = ("step" if first else "", str(fit["contestant"]), str(fit["library"]))
            table.add_row(*labels, *ends, *fits)
        console.print(table, "")
    console.print("Exponents: p of xᵖ, fitted to the upper half of each sweep.")


def figures(results: list[Measured]) -> list[dict[str, Any]]:
    """Return all that was measured, in the types of JSON."""
    return [
        {
            "case": asdict(one.case),
            "task": one.task,
            "contestant": one.name,
            "library": one.library,
            "seconds": one.seconds,
            "seconds_quartiles": one.quartiles,
            "host_seconds": one.host_seconds,
            "peak_bytes": one.peak_bytes,
            **ratios(one, task),
        }
        for _, task in by_task(results)
        for one in task
    ]


def _find(task: list[Measured], library: str, kind: str) -> Measured | None:
    return next((one for one in task if (one.library, one.kind) == (library, kind)), None)


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in ("task", "contestant", "library"):
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _labels(one: Measured, task: list[Measured]) -> tuple[str, str, str]:
    return (one.task if one is task[0] else "", one.name, one.library)


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    low, median, high = ratio
    places = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{places}f} ±{(high - low) / 2:.{places}f}"
