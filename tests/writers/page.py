"""A pytest plugin that writes docs/reference/writers.md from the matrix: `-p writers.page`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path("docs") / "reference" / "writers.md"
INTRODUCTION = """\
# Adapters of real writers

This page is generated: `nox -s writers` writes it. For each case, a package makes a small random
model and an adapter, and saves both. `doraxp merge` merges them, and the result is compared with
the package's own merge.

| result | meaning |
|---|---|
| right | every tensor of OUT, and every output of the reloaded model, is within the bound |
| refused | the command ended with the error that is shown, and OUT was not written |
| WRONG | the command ended without an error, and OUT is not right |

A difference is max|got − right| / max|right|, the largest of all tensors or outputs. The bound is
1e-5 for models in float32, 1e-6 for single layers and for experts, and 1e-2 for models in bfloat16
and float16. The right outputs, such as logits, are those of the adapted model before it was saved;
with experts, those of the merged model. They are compared where OUT is a whole model.

The base of a quantised case is stored and read by the library of its format. The right weights are
the merge in float64 of the weights that this library reads. With `--targets bf16` they are rounded
to bfloat16, and with `--targets same` the library quantises them again; the bound is 1e-6, and 1e-5
for outputs. The default precision, and nested scales, have the bound 1e-2. With the default
precision, a number between two codes may have either: both are as near to the merge in float64,
within 1e-5. OUT is right only if
`from_pretrained` reports no name, config.json names exactly the modules that are dense, and a model
that computes as it is stored gives the right outputs within a tenth. transformers cannot load dense
experts beside pack-quantized layers, so these cells have no outputs.
"""
CELLS: list[tuple[Any, ...]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect a cell; with several processes, the one that reports collects all."""
    if report.when == "call":
        CELLS.extend(tuple(cell) for key, cell in report.user_properties if key == "cell")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page, in the process that reports, if no case was left out."""
    config = session.config
    if not hasattr(config, "workerinput") and not config.getoption("keyword"):
        PAGE.write_text("\n".join(page(sorted(CELLS))), "utf-8")


def page(cells: list[tuple[Any, ...]]) -> Iterable[str]:
    """Yield the lines of the page."""
    yield INTRODUCTION
    counts = {state: sum(cell[2] == state for cell in cells) for state in ("right", "refused")}
    wrong = len(cells) - sum(counts.values())
    kinds = f"{counts['right']} right, {counts['refused']} refused, {wrong} wrong"
    yield f"{len(cells)} cells: {kinds}."
    for writer in dict.fromkeys(cell[0] for cell in cells):
        yield from ("", f"## {writer}", "")
        yield from ("| case | result | tensors | outputs |", "|---|---|---|---|")
        for _, name, state, tensors, outputs, text in (c for c in cells if c[0] == writer):
            shown = f"{state}: {literal(text)}" if text else state
            yield f"| {name} | {shown} | {figure(tensors)} | {figure(outputs)} |"
    yield ""


def literal(text: str) -> str:
    """Return the text as code in a table's cell."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def figure(number: float | None) -> str:
    return "" if number is None else f"{number:.0e}"
