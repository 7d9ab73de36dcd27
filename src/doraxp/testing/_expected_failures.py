"""The failures that an implementation is known to have, with reasons, from a TOML file.

[[expected]]
name = "forward/one token/y"          function/case/quantity, where * and ? match any letters
reason = "a vector x comes back as a matrix of one row"
link = "https://example.org/issues/1"
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from doraxp.testing._report import Finding, Report


class ExpectedFailure(NamedTuple):
    """An entry of the file."""

    name: str
    """function/case/quantity. Each part is a pattern, as in `fnmatch`."""
    reason: str
    link: str
    """The place where the failure is discussed, such as the address of an issue."""

    def runs(self, function: str, case: str) -> bool:
        """Return whether a function and a case match the name."""
        functions, cases, _ = _parts(self.name)
        return fnmatchcase(function, functions) and fnmatchcase(case, cases)

    def expects(self, finding: Finding) -> bool:
        """Return whether a finding matches the name."""
        quantities = _parts(self.name)[-1]
        named = self.runs(finding.function, finding.case)
        return named and fnmatchcase(finding.quantity, quantities)


class Judgement(NamedTuple):
    """A report, beside the failures that were expected."""

    wrong: tuple[Finding, ...]
    """Findings that no entry expects, outside the extreme cases."""
    expected: tuple[tuple[Finding, ExpectedFailure], ...]
    """Findings, each with the first entry that expects it."""
    extreme: tuple[Finding, ...]
    """Findings in the extreme cases that no entry expects."""
    passing: tuple[tuple[ExpectedFailure, tuple[tuple[str, str], ...]], ...]
    """Entries with the functions and cases in which they find nothing in any dtype that ran."""
    unmatched: tuple[ExpectedFailure, ...]
    """Entries that match no function and case of this run."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and every entry finds a failure wherever it matches."""
        return not (self.wrong or self.passing or self.unmatched)


def read_expected_failures(path: str | PathLike[str]) -> tuple[ExpectedFailure, ...]:
    """Return the entries of a TOML file.

    Parameters
    ----------
    path : str or path
        A file with tables ``[[expected]]``, each with a name, a reason and a link.

    Returns
    -------
    tuple of ExpectedFailure

    Raises
    ------
    ValueError
        The file is not TOML, or an entry lacks one of the three or has another key.
    OSError
        The file cannot be read.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> entry = ["[[expected]]", "name = 'merge/tiny/*'", "reason = 'squares'", "link = '#12'"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "expected.toml"
    ...     _ = path.write_text(chr(10).join(entry))
    ...     read_expected_failures(path)[0].reason
    'squares'
    """
    try:
        content = tomllib.loads(Path(path).read_text("utf-8"))
    except ValueError as error:  # of the syntax, or of UTF-8
        raise ValueError(f"{path} must be a TOML file in UTF-8: {error}") from None
    tables = content.pop("expected", [])
    if content or not isinstance(tables, list):
        other = ", ".join(content) or "expected as something else"
        raise ValueError(f"{path} must have tables [[expected]] alone, got {other}")
    return tuple(_entry(path, number, table) for number, table in enumerate(tables, start=1))


def _entry(path: str | PathLike[str], number: int, table: Any) -> ExpectedFailure:
    where = f"{path}: entry {number}"
    keys = ExpectedFailure._fields
    given = list(table) if isinstance(table, dict) else table
    if not isinstance(table, dict) or set(table) != set(keys):
        raise ValueError(f"{where} must have the keys {', '.join(keys)}, got {given}")
    for key, value in table.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {key} must be a text that is not empty, got {value!r}")
    if not all(_parts(table["name"])):
        raise ValueError(f"{where}: name must be function/case/quantity, got {table['name']!r}")
    return ExpectedFailure(**table)


def _parts(name: str) -> tuple[str, str, str]:
    function, _, rest = name.partition("/")
    case, _, quantity = rest.rpartition("/")
    return function, case, quantity


def judge(report: Report, expected: Iterable[ExpectedFailure] = ()) -> Judgement:
    """Return the findings of a report, divided by whether they were expected.

    Parameters
    ----------
    report : Report
        The result of `check_implementation`.
    expected : sequence of ExpectedFailure, optional
        An entry must find a failure in every function and case that it matches, in one of the
        dtypes that ran. Else the failure is mended, and the entry would hide the next one.

    Returns
    -------
    Judgement

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from doraxp.testing import check_implementation
    >>> report = check_implementation(SimpleNamespace(init=lambda weight: weight))
    >>> entries = [ExpectedFailure("init/*/initial", "a draft", "#1")]
    >>> report.ok, judge(report).ok, judge(report, entries).ok
    (False, False, True)
    """
    entries = tuple(expected)
    wrong: list[Finding] = []
    extreme: list[Finding] = []
    explained = []
    for finding in report.findings:
        entry = next((each for each in entries if each.expects(finding)), None)
        if entry is not None:
            explained.append((finding, entry))
        else:
            (extreme if finding.extreme else wrong).append(finding)
    ran = dict.fromkeys((one.function, one.case) for one in report.runs)
    passing, unmatched = [], []
    for entry in entries:
        matched = [pair for pair in ran if entry.runs(*pair)]
        failing = {(one.function, one.case) for one in report.findings if entry.expects(one)}
        if passes := tuple(pair for pair in matched if pair not in failing):
            passing.append((entry, passes))
        if not matched:
            unmatched.append(entry)
    return Judgement(
        tuple(wrong), tuple(explained), tuple(extreme), tuple(passing), tuple(unmatched)
    )
