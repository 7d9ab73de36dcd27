"""The ratios, the times and the exponents as tables, by rich."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from doraxp._base.extras import require
from doraxp._terminal.tables import new_table
from doraxp.bench._curves import SWEEPS, Curve, exponents
from doraxp.bench._measure import Measured
from doraxp.bench._report import Ratio, by_task, ratios

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_tables(results: list[Measured], console: Console) -> None:
    """Print the ratios of each workload, then times and memory."""
    require("bench", "rich", of="the table of the bench")
    for workload, group in groupby(results, lambda one: one.workload):
        of_workload = list(group)
        headings = ("÷ NumPy's\nbare", "÷ its own\nbare", "PEFT's\n÷ it")
        table = _table(f"Ratios of time, {workload}", headings)
        for _, task in by_task(of_workload):
            for one in task:
                shown = map(_ratio, ratios(one, task).values())
                table.add_row(*_labels(one, task), *shown, end_section=one is task[-1])
        console.print(table, "")
    on_host = ("host\nms",) if any(one.host_seconds for one in results) else ()
    for workload, group in groupby(results, lambda one: one.workload):
        headings = ("median\nms", "quartiles\nms", *on_host, "peak\nMiB")
        table = _table(f"Times and memory, {workload}", headings)
        for _, task in by_task(list(group)):
            for one in task:
                low, median, high = (f"{1e3 * second:.3g}" for second in one.quartiles)
                peak = "–" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:.1f}"
                host = [f"{1e3 * one.host_seconds:.3g}"] if one.host_seconds else []
                cells = (median, f"{low}–{high}", *host, peak)
                table.add_row(*_labels(one, task), *cells, end_section=one is task[-1])
        console.print(table, "")


def print_exponents(curves: dict[str, Curve], console: Console) -> None:
    """Print the times of each contestant at both ends of each sweep, and its exponents."""
    require("bench", "rich", of="the table of the curves")
    headings = ("first\nms", "last\nms", "time\nexponent", "memory\nexponent")
    for name, curve in curves.items():
        table = _table(f"A step over {name} {SWEEPS[name][0]} to {SWEEPS[name][-1]}", headings)
        for points, fit in zip(curve.values(), exponents(name, curve), strict=True):
            ends = (f"{1e3 * points[i].quartiles[1]:.3g}" for i in (0, -1))
            fits = ("–" if fit[key] is None else f"{fit[key]:.2f}" for key in ("time", "memory"))
            first = points is next(iter(curve.values()))
            labels = ("step" if first else "", str(fit["contestant"]), str(fit["library"]))
            table.add_row(*labels, *ends, *fits)
        console.print(table, "")
    console.print("Exponents: p of xᵖ, fitted to the upper half of each sweep.")


def _table(title: str, headings: tuple[str, ...]) -> Table:
    labels = ("task", "contestant", "library")
    return new_table(labels, headings, title=title, title_justify="left")


def _labels(one: Measured, task: list[Measured]) -> tuple[str, str, str]:
    return (one.task if one is task[0] else "", one.name, one.library)


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    low, median, high = ratio
    places = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{places}f} ±{(high - low) / 2:.{places}f}"
