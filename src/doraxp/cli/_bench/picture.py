"""The pictures of `doraxp bench`, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from doraxp.cli._bench.curves import SWEEPS, Curve, held_bytes, operations
from doraxp.cli._bench.measure import Measured
from doraxp.cli._bench.report import by_task, ratios

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def save_ratios(results: list[Measured], path: Path) -> None:
    """Save, as PNG, each contestant's time ÷ its own library's bare one, a panel for each case."""
    panels: dict[str, list[tuple[str, tuple[float, float, float]]]] = {}
    for (case, task), group in by_task(results):
        for one in group:
            ratio = ratios(one, group)["over_own_bare"]
            if ratio is not None and one.kind != "bare":
                label = f"{task}: {one.name}, {one.library}"
                panels.setdefault(str(case), []).append((label, ratio))
    rows = sum(map(len, panels.values()))
    figure = Figure(figsize=(8, 1.2 * len(panels) + 0.28 * rows), dpi=150, layout="constrained")
    heights = [len(rows) + 1 for rows in panels.values()]
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, entries) in zip(grid[:, 0], panels.items(), strict=True):
        for row, (_, (low, median, high)) in enumerate(entries):
            axes.plot([low, high], [row, row], color=COLORS[5], linewidth=4)
            axes.plot(median, row, "o", color=COLORS[0], markersize=5)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(entries)), [label for label, _ in entries])
        axes.invert_yaxis()
        axes.set_xscale("log")
        _label_plainly(axes.xaxis)
        axes.set(title=title, xlabel="time ÷ that of its library's bare product, or copy")
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, format="png")


def save_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Save, as PNG, time and memory of a step over tokens, rank and size, beside the model's."""
    figure = Figure(figsize=(13, 7.5), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(curves), squeeze=False)
    for (above, below), (name, curve) in zip(grid.T, curves.items(), strict=True):
        xs = SWEEPS[name]
        for color, ((library, label), points) in zip(COLORS, curve.items(), strict=False):
            style = {"color": color, "marker": "o", "markersize": 4, "label": f"{label}, {library}"}
            above.plot(xs, [1e3 * one.quartiles[1] for one in points], **style)
            peaks = [(x, one.peak_bytes) for x, one in zip(xs, points, strict=True)]
            known = [(x, peak / 2**20) for x, peak in peaks if peak]
            below.plot(*(zip(*known, strict=True) if known else ((), ())), **style)
        exact = next(points for points in curve.values() if points[0].kind == "exact")
        cases = [one.case for one in exact]
        rate = operations(cases[-1]) / exact[-1].quartiles[1]
        time = [1e3 * operations(case) / rate for case in cases]
        memory = [held_bytes(case) / 2**20 for case in cases]
        for axes, model, label in (
            (above, time, "exact: operations, at one rate"),
            (below, memory, "exact: y, z, dz and dx"),
        ):
            axes.plot(xs, model, color="grey", linestyle="--", label=label, zorder=0)
        above.set(title=f"Step over {name}", ylabel="time, ms")
        below.set(xlabel=name, ylabel="peak beyond the inputs, MiB")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            _label_plainly(axes.yaxis)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    figure.savefig(path, format="png")


def _label_plainly(axis: Any) -> None:
    """Write 0.02 and 20, not powers of ten, between them too where there are few."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
