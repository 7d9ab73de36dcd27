"""The pictures of `doraxp bench`, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doraxp._base.extras import require
from doraxp._terminal.pictures import BLUE, COLOURS, SKY, draw_grid, new_picture, save
from doraxp.bench._curves import SWEEPS, Curve, held_bytes, operations
from doraxp.bench._measure import Measured
from doraxp.bench._report import by_task, ratios


def save_ratios(results: list[Measured], path: Path) -> None:
    """Save, as PNG, each contestant's time ÷ its library's bare one, a panel for each workload."""
    require("bench", "matplotlib", of="the picture of the ratios")
    panels: dict[str, list[tuple[str, tuple[float, float, float]]]] = {}
    for (workload, task), group in by_task(results):
        for one in group:
            ratio = ratios(one, group)["over_own_bare"]
            if ratio is not None and one.kind != "bare":
                label = f"{task}: {one.name}, {one.library}"
                panels.setdefault(str(workload), []).append((label, ratio))
    rows = sum(map(len, panels.values()))
    picture = new_picture(8, 1.2 * len(panels) + 0.28 * rows)
    heights = [len(rows) + 1 for rows in panels.values()]
    grid = picture.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, lines) in zip(grid[:, 0], panels.items(), strict=True):
        for row, (_, (low, median, high)) in enumerate(lines):
            axes.plot([low, high], [row, row], color=SKY, linewidth=4)
            axes.plot(median, row, "o", color=BLUE, markersize=5)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(lines)), [label for label, _ in lines])
        axes.invert_yaxis()
        axes.set_xscale("log")
        _label_plainly(axes.xaxis)
        axes.set(title=title, xlabel="time ÷ that of its library's bare product, or copy")
        draw_grid(axes, axis="x")
    save(picture, path)


def save_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Save, as PNG, time and memory of a step over tokens, rank and size, beside the model."""
    require("bench", "matplotlib", of="the picture of the curves")
    picture = new_picture(13, 7.5)
    grid = picture.subplots(2, len(curves), squeeze=False)
    for (above, below), (name, curve) in zip(grid.T, curves.items(), strict=True):
        xs = SWEEPS[name]
        for color, ((library, label), points) in zip(COLOURS, curve.items(), strict=False):
            style = {"color": color, "marker": "o", "markersize": 4, "label": f"{label}, {library}"}
            above.plot(xs, [1e3 * one.quartiles[1] for one in points], **style)
            peaks = [(x, one.peak_bytes) for x, one in zip(xs, points, strict=True)]
            known = [(x, peak / 2**20) for x, peak in peaks if peak]
            below.plot(*(zip(*known, strict=True) if known else ((), ())), **style)
        exact = next(points for points in curve.values() if points[0].kind == "exact")
        workloads = [one.workload for one in exact]
        rate = operations(workloads[-1]) / exact[-1].quartiles[1]
        time = [1e3 * operations(workload) / rate for workload in workloads]
        memory = [held_bytes(workload) / 2**20 for workload in workloads]
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
            draw_grid(axes)
            axes.legend(fontsize=7)
    save(picture, path)


def _label_plainly(axis: Any) -> None:
    """Label the ticks as 0.02 and 20, not as powers of ten, and the minor ticks of a short axis."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
