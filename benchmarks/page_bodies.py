"""The tables of `pages.py`: functions from the runs of a page to lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import peft_table

Run: TypeAlias = dict[str, Any]
SIZES = {"tokens": ("tokens",), "rank": ("rank",), "size": ("out", "inner")}
"""The sizes of a case that a sweep changes."""


def goals(runs: list[Run]) -> Iterator[str]:
    """Yield a table for each case: a row for each figure, and a column for each run."""
    cases: dict[str, dict[str, dict[int, Run]]] = {}
    for number, run in enumerate(runs):
        for figure in run["figures"]:
            rows = cases.setdefault(figure.get("case", ""), {})
            rows.setdefault(figure["what"], {})[number] = figure
    for place, (case, rows) in enumerate(cases.items()):
        yield from [""] * (place > 0)
        yield from (f"## {case}", "") if case else ()
        present = [n for n in range(len(runs)) if any(n in found for found in rows.values())]
        headings = ["", "goal", *(label_of(runs[n]["run"]) for n in present)]
        yield f"| {' | '.join(headings)} |"
        yield "|---" * len(headings) + "|"
        for what, found in rows.items():
            values = (value_of(found[n]) if n in found else "–" for n in present)
            cells = (what, goal_of(next(iter(found.values()))), *values)
            yield f"| {' | '.join(cells)} |"


def wide(runs: list[Run]) -> Iterator[str]:
    """Yield a table with a row for each case and a column for each kind of figure.

    Cases with other kinds of figures go into a table of their own.
    """
    cases: dict[str, dict[str, Run]] = {}
    for run in runs:
        for figure in run["figures"]:
            cases.setdefault(figure["case"], {})[figure["what"]] = figure
    tables: dict[tuple[str, ...], list[str]] = {}
    for case, row in cases.items():
        tables.setdefault(tuple(row), []).append(case)
    for number, (columns, members) in enumerate(tables.items()):
        yield from [""] * (number > 0)
        yield f"| | {' | '.join(columns)} |"
        yield "|---" * (len(columns) + 1) + "|"
        for case in members:
            cells = (with_goal(cases[case][name]) for name in columns)
            yield f"| {case} | {' | '.join(cells)} |"


def with_goal(figure: Run) -> str:
    """Return a value with four digits, and its goal if it has one."""
    goal = goal_of(figure)
    return value_of(figure, digits=4) + (f" ({goal})" if goal else "")


def label_of(conditions: Run) -> str:
    """Return the heading of a run's column."""
    return conditions.get("label") or conditions.get("blas") or "measured"


def goal_of(figure: Run) -> str:
    """Return "≥ 4", "≤ 1.08" or nothing, with a space at which no line breaks."""
    if figure.get("goal") is None:
        return ""
    return f"{'≥' if figure.get('at_least') else '≤'}\N{NO-BREAK SPACE}{figure['goal']:g}"


def value_of(figure: Run, *, digits: int = 3) -> str:
    """Return a value, or its range; bold where it misses its goal."""
    value, goal = figure["value"], figure.get("goal")
    if value is None or isinstance(value, str):
        return value or "–"
    values = value if isinstance(value, list) else [value]
    if goal is not None and any(f"{v:.{digits}g}" == f"{goal:g}" for v in values):
        digits = 6  # 1.00006 misses a goal of 1, and must not read as 1
    text = " to ".join(f"{v:,}" if isinstance(v, int) else f"{v:.{digits}g}" for v in values)
    worst = min(values) if figure.get("at_least") else max(values)
    missed = goal is not None and (worst < goal if figure.get("at_least") else worst > goal)
    return f"**{text}**" if missed else text


def curves(runs: list[Run]) -> Iterator[str]:
    """Yield the picture, and a table of first and last times and of exponents."""
    yield "![Time and memory of a step over tokens, rank and size](../images/curves.png)"
    yield ""
    yield "| a step over | | first | last | time ∝ sizeᵖ, p | memory, p |"
    yield "|---|---|---|---|---|---|"
    for sweep, contestant, first, last, time, memory in rows_of_curves(runs[0]):
        cells = (sweep, contestant, seconds(first), seconds(last), power(time), power(memory))
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "The exponents are those of the upper half of each sweep."


def rows_of_curves(run: Run) -> Iterator[list[Any]]:
    """Yield sweep, contestant, first and last seconds and both exponents."""
    if "rows" in run:
        yield from run["rows"]
        return
    names = [name for changed in SIZES.values() for name in changed]
    base = {name: common(result["case"][name] for result in run["results"]) for name in names}
    for sweep, fits in run["exponents"].items():
        for fit in fits:
            points = [
                (result["case"][SIZES[sweep][0]], result["seconds_quartiles"][1])
                for result in run["results"]
                if (result["library"], result["contestant"]) == (fit["library"], fit["contestant"])
                and all(result["case"][key] == base[key] for key in base if key not in SIZES[sweep])
            ]
            (low, first), (high, last) = min(points), max(points)
            over = f"{sweep}, {low} to {high}"
            yield [over, fit["contestant"], first, last, fit["time"], fit["memory"]]


def common(values: Iterable[Any]) -> Any:
    """Return the value that occurs most often: most of the sweeps keep it."""
    found = list(values)
    return max(set(found), key=found.count)


def seconds(value: float) -> str:
    """Return "2.5 ms"."""
    return f"{1e3 * value:.3g} ms"


def power(value: float | None) -> str:
    """Return an exponent with two digits after the point."""
    return "–" if value is None else f"{value:.2f}"


def demo(runs: list[Run]) -> Iterator[str]:
    """Yield the table of each network."""
    for number, run in enumerate(runs):
        if number:
            yield ""
        arguments = run["arguments"]
        network, rank, steps = (arguments[name] for name in ("network", "rank", "steps"))
        yield f"## The {network} network"
        yield from ("", f"Rank {rank}, {steps} steps; mean ± standard deviation of")
        yield f"{arguments['seeds']} seeds, on {run['digits']['held out']} held-out digits."
        yield from (
            "",
            "| method | accuracy, % | trained parameters | merged: accuracy, % | "
            "largest difference, 1e-6 |",
        )
        yield "|---|---|---|---|---|"
        yield f"| frozen base | {spread(run['base']['turned_accuracy'], 100)} | 0 | | |"
        for name, method in run["methods"].items():
            cells = (
                name,
                spread(method["accuracy"], 100),
                f"{method['trainable_parameters']:,}",
                spread(method["merged_accuracy"], 100),
                spread(method["largest_difference"], 1e6),
            )
            yield f"| {' | '.join(cells)} |"


def spread(value: Run | None, factor: float) -> str:
    """Return "94.9 ± 0.6"."""
    if value is None:
        return ""
    return f"{factor * value['mean']:.1f} ± {factor * value['deviation']:.1f}"


def layers(runs: list[Run]) -> Iterator[str]:
    """Yield the tables of `peft_table.py`, then those of whole models."""
    for run in runs:
        for lines in run.get("tables") or peft_table.tables(run.get("results", ())):
            yield from (*lines, "")
    models = [one for run in runs for one in run.get("models", ())]
    if models:
        yield from ("A Llama from a config of transformers, each of its linear layers adapted:", "")
        yield "| layers, width, task | | time ÷ PEFT's | ÷ PEFT's with DoraCaching |"
        yield "|---|---|---|---|"
    for one in models:
        for name, ratios in one["ratios"].items():
            cells = (ratios.get(other) for other in ("PEFT", "PEFT, DoraCaching"))
            texts = ("" if cell is None else f"{cell:.2f}" for cell in cells)
            case = f"{one['layers']}, {one['width']}, {one['task']}"
            yield f"| {case} | {name} | {' | '.join(texts)} |"
