"""The picture of an adapter: m by module and, if the base is known, ΔM over ΔD."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doraxp._terminal.pictures import BLUE, SKY, draw_grid, new_picture, save
from doraxp.layers import AdaptedLayer


def save_adapter_picture(
    adapters: Mapping[str, AdaptedLayer], modules: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Save, as PNG, m by layer from its 10th to its 90th percentile, and ΔM over ΔD if known."""
    changes = [
        (module["direction_change"], module["magnitude_change"])
        for module in modules.values()
        if "direction_change" in module
    ]
    picture = new_picture(11 if changes else 6, 4.8)
    axes = picture.subplots(1, 2 if changes else 1, squeeze=False)[0]
    low, middle, high = np.transpose(
        [
            np.percentile(np.asarray(layer.adapter.magnitude), (10, 50, 90))
            for layer in adapters.values()
        ]
    )
    layers = np.arange(len(adapters))
    axes[0].vlines(layers, low, high, color=SKY)
    axes[0].plot(layers, middle, "o", color=BLUE, markersize=4)
    axes[0].set(
        title="Magnitude m: median, 10th to 90th percentile",
        xlabel="module, in the order of the file",
        ylabel="m (in weight units)",
    )
    if changes:
        axes[1].plot(*np.transpose(changes), "o", color=BLUE, markersize=4)
        axes[1].set(
            title="Change of each module",
            xlabel="ΔD: mean 1 − cosine of the rows",
            ylabel="ΔM: mean change of the row norms (in weight units)",
        )
    for panel in axes:
        draw_grid(panel)
    save(picture, path)
