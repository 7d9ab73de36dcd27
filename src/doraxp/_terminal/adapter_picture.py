"""The picture of an adapter by kind of module: m by layer and, if the base is known, ΔM over ΔD.

Each kind has a panel and a colour. Where there are more than `PANELS` kinds, each has a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp._base.words import counted
from doraxp._terminal.module_table import kind_of
from doraxp._terminal.palette import BLUE, COLOURS
from doraxp._terminal.pictures import draw_grid, new_picture, save

if TYPE_CHECKING:
    from doraxp.checkpoint import UpdatedLayer
    from doraxp.layers import AdaptedLayer

PANELS, ROWS, LETTERS = 14, 60, 32
"""The most kinds with a panel each, the most rows, and the most letters of a name."""
MARKERS = "os"
"""Those of the first and of the second round of the colours."""
ORDER = ("q", "k", "v", "qkv", "query", "key", "value", "o", "out", "gate", "up", "down")
"""The order of well-known kinds, by their name up to an underscore; others follow."""
CHANGES = {
    "direction_change": "ΔD: mean 1 − cosine of the rows",
    "magnitude_change": "ΔM: mean change of the row norms",
}


class Group(NamedTuple):
    """The modules of one kind."""

    name: str
    places: NDArray[np.float64]
    """Of the modules on the axis of the layers."""
    sizes: NDArray[np.float64]
    """The 10th, 50th and 90th percentile of m, or the size of the update, (3, modules)."""
    changes: NDArray[np.float64]
    """ΔD and ΔM, (2, modules); without a base, (2, 0)."""


class Labels(NamedTuple):
    """The names of the two axes of a panel."""

    places: str
    sizes: str


def save_adapter_picture(
    adapters: Mapping[str, AdaptedLayer | UpdatedLayer],
    modules: Mapping[str, Mapping[str, Any]],
    path: Path,
) -> None:
    """Save, as PNG, m by layer from its 10th to its 90th percentile, and ΔM over ΔD if known.

    Where a module has no m, the sizes of the updates are in place of m.
    """
    groups, labels = _grouped(adapters, modules)
    picture = _by_panel(groups, labels) if len(groups) <= PANELS else _by_row(groups, labels)
    save(picture, path)


def _by_panel(groups: list[Group], labels: Labels) -> Any:
    """Return the picture with a panel for each kind, and all changes beside them."""
    has_changes = groups[0].changes.size > 0
    picture = new_picture(13 if has_changes else 7, max(4.5, 0.8 + 0.9 * len(groups)))
    columns = picture.add_gridspec(len(groups), 2 if has_changes else 1)
    panels: list[Any] = []
    for number, group in enumerate(groups):
        axes = picture.add_subplot(columns[number, 0], sharex=panels[0] if panels else None)
        low, middle, high = group.sizes[:, np.argsort(group.places)]
        at, style = np.sort(group.places), _style(number)
        axes.fill_between(at, low, high, color=style["color"], alpha=0.25, linewidth=0)
        axes.plot(at, middle, markersize=3.5, **style)
        axes.set_title(_shown(group.name), loc="left", fontsize=9, pad=2)
        axes.locator_params(axis="y", nbins=3)
        axes.locator_params(axis="x", integer=True)
        axes.tick_params(labelbottom=number == len(groups) - 1)
        draw_grid(axes)
        panels.append(axes)
    panels[-1].set_xlabel(labels.places)
    picture.supylabel(labels.sizes, fontsize=10)
    if has_changes:
        axes = picture.add_subplot(columns[:, 1])
        for number, group in enumerate(groups):
            style = _style(number)
            axes.plot(*group.changes, linestyle="none", markersize=4, alpha=0.35, **style)
            middle = np.median(group.changes, axis=1)
            median: dict[str, Any] = {
                "linestyle": "none",
                "markersize": 10,
                "label": _shown(group.name),
            }
            axes.plot(*middle, **median, **style)
        first, second = CHANGES.values()
        axes.set(title="Change of each module; large: the median", xlabel=first, ylabel=second)
        axes.legend()
        draw_grid(axes)
    return picture


def _by_row(groups: list[Group], labels: Labels) -> Any:
    """Return the picture with a row for each kind: from its least to its largest, and its median.

    The kinds with the fewest modules share the last row if there are more than `ROWS`.
    """
    if len(groups) > ROWS:
        groups = sorted(groups, key=lambda group: -group.places.size)
        kept, rest = groups[: ROWS - 1], groups[ROWS - 1 :]
        joined = (
            np.concatenate(parts, axis=-1) for parts in zip(*(g[1:] for g in rest), strict=True)
        )
        groups = [*kept, Group(counted(len(rest), "other kind"), *joined)]
    titles = [labels.sizes, *(CHANGES.values() if groups[0].changes.size else ())]
    picture = new_picture(4 + 3 * len(titles), 1 + 0.25 * len(groups))
    grid = picture.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    for column, (axes, title) in enumerate(zip(grid, titles, strict=True)):
        for row, group in enumerate(groups):
            values = group.sizes if column == 0 else group.changes[column - 1]
            middle = group.sizes[1] if column == 0 else values
            axes.plot([values.min(), values.max()], [row, row], color=BLUE, alpha=0.4, linewidth=4)
            axes.plot(np.median(middle), row, "o", color=BLUE, markersize=5)
        axes.set_xlabel(title)
        draw_grid(axes, axis="x")
    names = [f"{_shown(group.name)} ({group.places.size})" for group in groups]
    grid[0].set_yticks(range(len(groups)), names, fontsize=8)
    grid[0].invert_yaxis()
    return picture


def _grouped(
    adapters: Mapping[str, AdaptedLayer | UpdatedLayer],
    modules: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Group], Labels]:
    """Return the modules by kind, and what their sizes and places are."""
    has_changes = all("direction_change" in module for module in modules.values())
    has_magnitudes = all(module["magnitude_mean"] is not None for module in modules.values())
    places, label = _layers(list(modules))
    kinds: dict[str, list[str]] = {}
    for path in modules:
        kinds.setdefault(kind_of(path), []).append(path)
    groups = []
    for kind in sorted(kinds, key=_rank):  # the others stay in the order of the file
        paths = kinds[kind]
        if has_magnitudes:
            sizes = np.transpose([_percentiles(adapters[path]) for path in paths])
        else:
            sizes = np.asarray([[modules[path]["update_norm"] for path in paths]] * 3)
        changes = [[modules[p][name] for p in paths if has_changes] for name in CHANGES]
        at = np.asarray([places[path] for path in paths], np.float64)
        groups.append(Group(kind, at, sizes, np.asarray(changes, np.float64)))
    what = "m: median, 10th to 90th percentile" if has_magnitudes else "‖s ΔW‖ of each module"
    return groups, Labels(label, f"{what} (in weight units)")


def _rank(kind: str) -> int:
    """Return the place of a well-known kind in `ORDER`."""
    name = re.split(r"[_.]", kind.removeprefix("to_"))[0]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _style(number: int) -> dict[str, Any]:
    turn, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[turn]}


def _shown(name: str) -> str:
    """Return a name for matplotlib, cut in the middle if it is long.

    Dollars would begin a formula; a leading underscore would hide the name in a legend.
    """
    if len(name) > LETTERS:
        name = f"{name[: LETTERS // 2 - 1]}…{name[-LETTERS // 2 :]}"
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _percentiles(layer: AdaptedLayer | UpdatedLayer) -> NDArray[np.float64]:
    """Return the 10th, 50th and 90th percentile of m."""
    return np.percentile(np.asarray(layer.adapter.magnitude, np.float64), (10, 50, 90))


def _layers(paths: list[str]) -> tuple[dict[str, int], str]:
    """Return a place for each module, and the label of the axis.

    The place is the first number in the path, unless two modules of a kind would share it.
    """
    numbers = {path: int(match[0]) for path in paths if (match := re.search(r"\d+", path))}
    places = {(kind_of(path), number) for path, number in numbers.items()}
    if len(places) == len(paths):
        return numbers, "layer"
    return {path: place for place, path in enumerate(paths)}, "module, in the order of the file"
