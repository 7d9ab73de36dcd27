"""The pictures of `doraxp bench`, by matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from doraxp._base.extras import require
from doraxp._terminal.palette import DARK, GREY, LIGHT, METHODS, Style, method_of
from doraxp._terminal.pictures import draw_grid, new_picture, save
from doraxp.bench._curves import SWEEPS, Curve, held_bytes, operations
from doraxp.bench._measure import Measured
from doraxp.bench._report import by_task, ratios

_MARKERS = "osD^v"
"""Of the libraries, in the order of the results."""


def save_ratios(results: list[Measured], path: Path, *, dark: bool = False) -> None:
    """Save, as PNG, each contestant's time ÷ its library's bare one, a panel for each workload."""
    require("bench", "matplotlib", of="the picture of the ratios")
    panels: dict[str, list[tuple[str, Style, tuple[float, float, float]]]] = {}
    for (workload, task), group in by_task(results):
        for one in group:
            ratio = ratios(one, group)["over_own_bare"]
            if ratio is not None and one.kind != "bare":
                row = (f"{task}: {one.name}, {one.library}", _style(one), ratio)
                panels.setdefault(str(workload), []).append(row)
    rows = sum(map(len, panels.values()))
    picture = new_picture(8, 1.2 * len(panels) + 0.28 * rows)
    heights = [len(rows) + 1 for rows in panels.values()]
    grid = picture.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, (title, lines) in zip(grid[:, 0], panels.items(), strict=True):
        for place, (_, style, (low, median, high)) in enumerate(lines):
            axes.plot([low, high], [place, place], color=style.colour, linewidth=5, alpha=0.4)
            axes.plot(median, place, "o", color=style.colour, markersize=6)
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set_yticks(range(len(lines)), [label for label, *_ in lines])
        axes.invert_yaxis()
        axes.set_xscale("log", base=2)
        _label_ratios(axes)
        axes.set(title=title, xlabel="time ÷ that of its library's bare product, or copy")
        draw_grid(axes, axis="x")
    save(picture, path, DARK if dark else LIGHT)


def save_curves(curves: Mapping[str, Curve], path: Path, *, dark: bool = False) -> None:
    """Save, as PNG, time and memory of a step over tokens, rank and size, beside the model."""
    require("bench", "matplotlib", of="the picture of the curves")
    picture = new_picture(11, 7)
    grid = picture.subplots(2, len(curves), squeeze=False)
    libraries = dict.fromkeys(library for curve in curves.values() for library, _ in curve)
    markers = dict(zip(libraries, itertools.cycle(_MARKERS), strict=False))
    for (above, below), (name, curve) in zip(grid.T, curves.items(), strict=True):
        _draw_measured(above, below, name, curve, markers)
        _draw_model(above, below, name, curve)
        above.set(title=f"Step over {name}", ylabel="time")
        below.set(xlabel=name, ylabel="peak beyond the inputs")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            _label_powers(axes, SWEEPS[name])
            draw_grid(axes)
        above.set_yscale("log")
        _label_seconds(above)
        below.set_yscale("log", base=2)
        _label_bytes(below)
    for axes in grid[:, 0]:
        axes.legend(fontsize=8)
    save(picture, path, DARK if dark else LIGHT)


def _draw_measured(
    above: Any, below: Any, name: str, curve: Curve, markers: Mapping[str, str]
) -> None:
    """Draw the median times above, and the peaks of memory that are known below."""
    xs = SWEEPS[name]
    for (library, label), points in curve.items():
        style = {
            "color": _style(points[0]).colour,
            "linestyle": _style(points[0]).dashes,
            "marker": markers[library],
            "markersize": 5,
            "label": f"{label}, {library}",
        }
        above.plot(xs, [one.quartiles[1] for one in points], **style)
        known = [(x, one.peak_bytes) for x, one in zip(xs, points, strict=True)]
        known = [(x, peak) for x, peak in known if peak]
        below.plot(*(zip(*known, strict=True) if known else ((), ())), **style)


def _draw_model(above: Any, below: Any, name: str, curve: Curve) -> None:
    """Draw the operations of the exact step, at its rate in the largest case, and its memory."""
    exact = next(points for points in curve.values() if points[0].kind == "exact")
    workloads = [one.workload for one in exact]
    rate = operations(workloads[-1]) / exact[-1].quartiles[1]
    time = [operations(workload) / rate for workload in workloads]
    memory = [held_bytes(workload) for workload in workloads]
    for axes, model, label in (
        (above, time, "model of exact: operations"),
        (below, memory, "model of exact: y, z, dz, dx"),
    ):
        axes.plot(SWEEPS[name], model, color=GREY, linestyle=":", label=label, zorder=0)


def _style(one: Measured) -> Style:
    return METHODS[method_of(one.library, one.name, one.kind)]


def _label_powers(axes: Any, values: Sequence[int]) -> None:
    """Label the values of a sweep themselves, as 4 and 4096."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _label_ratios(axes: Any) -> None:
    """Label ratios as 0.5, 1, 2 and 4; on a short axis, as 1, 1.1 and 1.2."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    few = MaxNLocator(8, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(few if high < 4 * low else LogLocator(2, numticks=9))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _label_seconds(axes: Any) -> None:
    """Label times as 500 µs, 2 ms and 1 s: powers of ten, with multiples where few would fit."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    multiples = (1,) if high > 100 * low else (1, 2, 5) if high > 8 * low else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(10, multiples, numticks=20))
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_bytes(axes: Any) -> None:
    """Label powers of two as 512 KiB, 4 MiB and 1 GiB."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(2, numticks=9))
    axes.yaxis.set_major_formatter(lambda value, _: _bytes(value))
    axes.yaxis.set_minor_locator(NullLocator())


def _bytes(value: float) -> str:
    """Return "4 MiB" for 2²²."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:g} {unit}"
        value /= 1024
    return f"{value:g} GiB"
