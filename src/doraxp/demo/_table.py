"""The demo's table and the line under it, by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doraxp._base.extras import require
from doraxp._terminal.tables import new_table
from doraxp.demo._results import Results, Spread, spread

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = (
    "accuracy\n%",
    "trained\nparameters",
    "training\nseconds",
    "accuracy %\nmerged",
    "difference\n1e-6",
)


def print_results(results: Results, console: Console) -> None:
    """Print a row for each method, and the adapter that came first, if the seeds agree on it."""
    require("demo", "rich", of="the table of the demo")
    settings = results.settings
    upright = spread(run.upright_accuracy for run in results.base)
    turned = spread(run.turned_accuracy for run in results.base)
    part = "validation" if settings.validate else "test"
    table = new_table(
        ["method"],
        HEADINGS,
        title=f"Digits turned by 90°, {settings.network}: rank {settings.rank}, "
        f"{settings.steps} steps, float32 on {settings.backend}",
        caption=f"Mean ± standard deviation of {settings.seeds} seeds, on "
        f"{results.held_out_digits} {part} digits; upright, the base reads "
        f"{_scaled(upright, 100)} % of them. Difference: the largest between the logits of the "
        "adapted network and of the merged one.",
        caption_justify="left",
    )
    table.add_row("frozen base", _scaled(turned, 100), "0", "–", "–", "–")
    for name, runs in results.methods.items():
        table.add_row(
            name,
            _scaled(results.spread(name, "accuracy"), 100),
            f"{runs[0].trainable_parameters:,}",
            _scaled(results.spread(name, "seconds"), 1, digits=2),
            _scaled(results.spread(name, "merged_accuracy"), 100),
            _scaled(results.spread(name, "largest_difference"), 1e6),
        )
    console.print(table)
    console.print("\n" + _verdict(results))


def _verdict(results: Results) -> str:
    """Return the line that names the best adapter and how far it is ahead of the second.

    A lead up to the standard deviation of the leads by seed is not a lead.
    """
    accuracies = {
        name: [100 * run.accuracy for run in runs]
        for name, runs in results.methods.items()
        if results.spread(name, "merged_accuracy") is not None
    }
    first, second, *_ = sorted(accuracies, key=lambda name: -sum(accuracies[name]))
    ahead = spread(a - b for a, b in zip(accuracies[first], accuracies[second], strict=True))
    lead = f"{_scaled(ahead, 1)} points ahead of {second}"
    if ahead.mean > ahead.deviation:
        return f"First of the adapters: {first}, {lead}."
    return f"No adapter is first: {first} is {lead}, which is within the spread of the seeds."


def _scaled(value: Spread | None, factor: float, *, digits: int = 1) -> str:
    if value is None:
        return "–"
    return f"{factor * value.mean:.{digits}f} ± {factor * value.deviation:.{digits}f}"
