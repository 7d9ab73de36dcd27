"""The table of `doraxp verify` and the lines under it, by rich."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from doraxp._base.words import counted
from doraxp._terminal.tables import new_table
from doraxp.testing import Comparison, Figure

if TYPE_CHECKING:
    from rich.console import Console

LINES = 20
CAPTION = (  # rich would make a table's own caption as narrow as a table of one library
    "Largest error of all cases in units of the dtype's resolution, and, in brackets, in percent "
    "of its bound: above 100 is wrong. Dense: the dense formulas in NumPy; in float64 they are "
    "the reference."
)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the worst case of each quantity and dtype for each backend, then the failures."""
    figures = comparison.figures
    backends = list(dict.fromkeys(figure.backend for figure in figures))
    names = [name.removeprefix("array_api_") for name in ("dense", *backends)]
    headings = [name.replace(" on ", "\non ") for name in names]  # five of them fit 80 columns
    title = f"{len({figure.case for figure in figures})} cases against float64"
    table = new_table([""], headings, title=title)
    rows: dict[str, dict[str, list[Figure]]] = {}
    for figure in figures:
        # The quantities of an optimizer are its steps, "lora_a 1", "lora_a 2": one row for all.
        is_step = re.search(r" \d$", figure.quantity)
        quantity = figure.case.partition(",")[0] if is_step else figure.quantity
        rows.setdefault(figure.dtype, {}).setdefault(quantity, []).append(figure)
    for dtype, quantities in rows.items():
        table.add_section()
        table.add_row(f"[bold]{dtype}")
        for quantity, row in quantities.items():
            cells = [_cell([one for one in row if one.backend == name]) for name in backends]
            dense = _largest(one.dense / one.resolution for one in row)
            table.add_row(quantity, f"{dense:.1f}", *cells)
    console.print(table)
    console.print(CAPTION)
    _print_rest(comparison, console)


def _cell(figures: Sequence[Figure]) -> str:
    if not figures:
        return "–"
    worst = max(figure.share for figure in figures)
    error = _largest(figure.error / figure.resolution for figure in figures)
    text = f"{error:.1f} ({100 * worst:.0f})"
    return text if all(figure.ok for figure in figures) else f"[bold red]{text}[/]"


def _largest(values: Iterable[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=0.0)


def _print_rest(comparison: Comparison, console: Console) -> None:
    from rich.markup import escape

    for backend, dtype in comparison.left_out:
        console.print(f"{backend}: no {dtype} here")
    for pair in comparison.agreements:
        verdict = "agree" if pair.share <= 1 else "DISAGREE"
        console.print(
            f"{' and '.join(pair.backends)} {verdict}: {100 * pair.share:.0f} % of the sum of "
            "their bounds",
        )
    wrong = [figure for figure in comparison.figures if not figure.ok]
    for figure in wrong[:LINES]:
        reason = figure.failure or f"{100 * figure.share:.0f} % of its bound"
        where = f"{figure.backend}, {figure.case}, {figure.dtype}, {figure.quantity}"
        console.print(f"[bold red]WRONG[/] {escape(f'{where}: {reason}')}")
    if len(wrong) > LINES:
        console.print(f"and {len(wrong) - LINES} more")
    total = len(comparison.figures)
    console.print(f"{counted(total - len(wrong), 'figure', 'is', of=total)} within the bounds.")
