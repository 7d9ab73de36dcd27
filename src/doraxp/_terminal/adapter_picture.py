"""The picture of an adapter: m by layer and, if the base is known, ΔM over ΔD; a colour a kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from doraxp._terminal.module_table import kind_of
from doraxp._terminal.pictures import COLOURS, draw_grid, new_picture, save

if TYPE_CHECKING:
    from doraxp.checkpoint import UpdatedLayer
    from doraxp.layers import AdaptedLayer

_MARKERS = "os^Dv"
"""The next one for each round of the colours."""


def save_adapter_picture(
    adapters: Mapping[str, AdaptedLayer | UpdatedLayer],
    modules: Mapping[str, Mapping[str, Any]],
    path: Path,
) -> None:
    """Save, as PNG, m by layer from its 10th to its 90th percentile, and ΔM over ΔD if known.

    Where a module has no m, the sizes of the updates are in place of m.
    """
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(map(kind_of, modules)))}
    has_changes = all("direction_change" in module for module in modules.values())
    has_magnitudes = all(module["magnitude_mean"] is not None for module in modules.values())
    picture = new_picture(12 if has_changes else 7, 5)
    axes = picture.subplots(1, 2 if has_changes else 1, squeeze=False)[0]
    layers, label = _layers(list(modules))
    for kind, number in kinds.items():
        paths = [path for path in modules if kind_of(path) == kind]
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": _MARKERS[number // len(COLOURS) % len(_MARKERS)],
            # Dollars would begin a formula; a leading underscore would hide the label.
            "label": " " + kind.replace("$", r"\$"),
        }
        # Side by side: the kinds of one layer would hide each other.
        shift = 0.7 * ((number + 0.5) / len(kinds) - 0.5)
        at = np.asarray([layers[path] for path in paths]) + shift
        if has_magnitudes:
            low, middle, high = np.transpose([_percentiles(adapters[path]) for path in paths])
            axes[0].vlines(at, low, high, color=style["color"], alpha=0.4)
        else:
            middle = np.asarray([modules[path]["update_norm"] for path in paths])
        axes[0].plot(at, middle, linestyle="none", markersize=4, **style)
        if has_changes:
            points = [
                (modules[path]["direction_change"], modules[path]["magnitude_change"])
                for path in paths
            ]
            axes[1].plot(*np.transpose(points), linestyle="none", markersize=5, alpha=0.8, **style)
    title, unit = "Magnitude m: median, 10th to 90th percentile", "m (in weight units)"
    if not has_magnitudes:
        title, unit = "Size of the update of each module", "‖s ΔW‖ (in weight units)"
    axes[0].set(title=title, xlabel=label, ylabel=unit)
    if has_changes:
        axes[1].set(
            title="Change of each module",
            xlabel="ΔD: mean 1 − cosine of the rows",
            ylabel="ΔM: mean change of the row norms (in weight units)",
        )
    for panel in axes:
        draw_grid(panel)
    if len(kinds) <= len(COLOURS) * len(_MARKERS):
        columns = max(1, int(12 * picture.get_figwidth()) // (max(map(len, kinds)) + 8))
        handles, labels = axes[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    save(picture, path)


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
