"""The demo's picture, by matplotlib: how the loss falls, and how far each layer moves.

The right panel is figure 2 of arXiv:2402.09353 on real data: ΔM over ΔD of each layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from doraxp._base.extras import require
from doraxp._terminal.palette import DARK, GREY, LIGHT, METHODS
from doraxp._terminal.pictures import draw_grid, new_picture, save
from doraxp.demo._results import Results


def save_picture(results: Results, path: Path, *, dark: bool = False) -> None:
    """Save both panels as PNG, for a light or a dark page."""
    require("demo", "matplotlib", of="the picture of the demo")
    settings, theme = results.settings, DARK if dark else LIGHT
    picture = new_picture(9.5, 4.6)
    picture.suptitle(
        "UCI handwritten digits turned by 90°, learned by a network that reads them upright\n"
        f"{settings.network} network, rank {settings.rank}, {settings.steps} steps, "
        f"mean of {settings.seeds} seeds"
    )
    losses, changes = picture.subplots(1, 2)
    _draw_losses(losses, results)
    _draw_changes(changes, results, theme.paper)
    save(picture, path, theme)


def _draw_losses(axes: Any, results: Results) -> None:
    """Draw the mean loss over the seeds and over some steps each: single batches are noisy."""
    steps = results.settings.steps
    window = max(1, steps // 25)
    for name, runs in results.methods.items():
        colour, dashes = METHODS[name]
        mean = np.mean([run.losses for run in runs], axis=0)
        parts = mean[: steps // window * window].reshape(-1, window).mean(axis=1)
        middles = (np.arange(len(parts)) + 0.5) * window
        axes.plot(middles, parts, color=colour, linestyle=dashes, label=name)
    axes.set(
        title="Training loss",
        xlabel="step",
        ylabel=f"cross-entropy (nats), mean of {window} steps",
        yscale="log",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    draw_grid(axes)


def _draw_changes(axes: Any, results: Results, paper: str) -> None:
    """Draw the path of each layer from the base, (0, 0), to its end, which has a mark."""
    from matplotlib.lines import Line2D

    layers = next(iter(results.methods.values()))[0].changes
    markers = dict(zip(layers, "os^", strict=True))
    for name, runs in results.methods.items():
        colour, dashes = METHODS[name]
        for layer, marker in markers.items():
            magnitude, direction = np.mean([run.changes[layer] for run in runs], axis=0).T
            axes.plot(
                np.insert(direction, 0, 0.0),
                np.insert(magnitude, 0, 0.0),
                color=colour,
                linestyle=dashes,
                marker=marker,
                markersize=8,
                markeredgecolor=paper,
                markevery=[len(direction)],
            )
    axes.set(
        title="Weights, from the base at (0, 0)",
        xlabel="ΔD: mean 1 − cosine of the rows",
        ylabel="ΔM: mean change of the row norms",
    )
    marks = [
        Line2D([], [], color=GREY, linestyle="none", marker=marker, markersize=8, label=layer)
        for layer, marker in markers.items()
    ]
    axes.legend(handles=marks, loc="upper left")
    draw_grid(axes)
