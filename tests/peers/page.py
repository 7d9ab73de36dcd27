"""A pytest plugin that writes the tables of docs/reference/peers.md: `-p peers.page`.

A row is one finding of one run, or the word `right`. The page has a table for each package, between
`<!-- NAME -->` and `<!-- end -->`. The plugin replaces the tables of the packages whose tests ran,
so that sessions with different packages write one page.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path("docs") / "reference" / "peers.md"
HEAD = "| run | finding | error / bound | relative | arrays | test |\n|---|---|---|---|---|---|"
OFF = re.compile(r"is (\S+) times its bound off(?:, relative error (\S+))?")
MANY = 4
ROWS: dict[str, list[tuple[str, ...]]] = {}


def record(item: pytest.Item, package: str, run: str, report: Any) -> None:
    """Keep the rows of a report for the page."""
    for finding, error, relative in rows(report):
        row = (run, finding, error, relative, str(report.checked), item.originalname)
        item.user_properties.append((f"peer {package}", row))


def record_fact(
    item: pytest.Item, package: str, run: str, fact: str, relative: float | None = None
) -> None:
    """Keep a row that a test found without the kit."""
    error = "" if relative is None else f"{relative:.2g}"
    row = (run, fact, "", error, "", item.originalname)
    item.user_properties.append((f"peer {package}", row))


def rows(report: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the findings of a report: in words, in units of the bound, and as a relative error."""
    usual = [one for one in report.findings if not one.extreme]
    named = {}
    for one in report.diagnoses:
        named.setdefault(one.functions, []).append(" and ".join(one.deviations))
    for functions, texts in named.items():
        found = [one for one in usual if one.function in functions]
        yield (f"{', '.join(functions)}: {'; or '.join(texts)}", *largest(found))
    explained = {function for functions in named for function in functions}
    for function in dict.fromkeys(one.function for one in usual):
        if function not in explained:
            yield from unexplained([one for one in usual if one.function == function])
    if not usual:
        yield "right", "", ""
    for case in ("zero row", "embedding, zero dimension"):
        found = [one for one in report.findings if one.case == case]
        if not_finite := {one.quantity for one in found if one.problem.endswith("not finite")}:
            yield f"{case}: NaN in {', '.join(sorted(not_finite))}", "", ""


def unexplained(findings: list[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the findings of a function: each by itself, or if they are many, how many they are."""
    groups: dict[str, list[Any]] = {}
    for one in findings:
        problem = "" if OFF.search(one.problem) else f": {shortened(one.problem)}"
        groups.setdefault(f"{one.function}, {one.case}, {one.quantity}{problem}", []).append(one)
    if len(groups) > MANY:
        names, cases = ({getattr(one, key) for one in findings} for key in ("quantity", "case"))
        text = f"{findings[0].function}: {', '.join(sorted(names))} of {len(cases)} cases"
        groups = {text: findings}
    for text, found in groups.items():
        yield (text, *largest(found))


def shortened(problem: str) -> str:
    return problem if len(problem) < 100 else f"{problem[:97]}..."


def largest(found: list[Any]) -> tuple[str, str]:
    """Return the largest errors, in units of their bounds and relative; of float32 if it ran."""
    single = [one for one in found if one.dtype == "float32"] or found
    pairs = [match.groups() for one in single if (match := OFF.search(one.problem))]
    if not pairs:
        return "", ""
    bounds = max(float(bound) for bound, _ in pairs)
    relative = [float(error) for _, error in pairs if error]  # numbers that should be 0 have none
    return f"{bounds:.{2 if bounds < 10 else 1}g}", f"{max(relative):.2g}" if relative else ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the rows; with several processes, the one that reports collects all."""
    if report.when == "call":
        for key, row in report.user_properties:
            if key.startswith("peer "):
                ROWS.setdefault(key.removeprefix("peer "), []).append(tuple(row))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page, in the process that reports, if no case was left out."""
    config = session.config
    if not hasattr(config, "workerinput") and not config.getoption("keyword"):
        text = PAGE.read_text("utf-8")
        for package, found in ROWS.items():
            text = replaced(text, package, found)
        PAGE.write_text(text, "utf-8")


def replaced(text: str, package: str, found: list[tuple[str, ...]]) -> str:
    """Return the page with a new table for one package."""
    start, end = f"<!-- {package} -->\n", "<!-- end -->"
    before, _, rest = text.partition(start)
    if not rest:
        raise ValueError(f"{PAGE} has no line {start.strip()}")
    version = importlib.metadata.version(package)
    lines = ["| " + " | ".join(escaped(row)) + " |" for row in sorted(found)]
    table = "\n".join((f"{package} {version}:", "", HEAD, *lines, ""))
    return f"{before}{start}{table}{end}{rest.partition(end)[2]}"


def escaped(row: tuple[str, ...]) -> Iterator[str]:
    *cells, test = row
    for cell in cells:
        yield cell.replace("|", "\\|")
    yield f"`{test}`"
