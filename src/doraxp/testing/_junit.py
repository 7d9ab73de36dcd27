"""A report as JUnit XML, which services that run tests show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from xml.etree import ElementTree

from doraxp._base.printable import printable
from doraxp.testing._expected_failures import ExpectedFailure, Judgement
from doraxp.testing._report import Finding, Report

STALE = "expected failures"
"""The name of the suite with the entries that found no failure."""


def junit(name: str, report: Report, judged: Judgement) -> str:
    """Return JUnit XML: a suite for each function, and a test for each of its cases and dtypes.

    A test fails where a finding is wrong. It is skipped where all its findings were expected or
    are those of an extreme case: its message has the reasons. A call that raised
    NotImplementedError is a skipped test too, and so is a gradient that no case returned. Each
    entry of expected failures that passes or matches nothing fails in a suite of its own.

    Parameters
    ----------
    name : str
        The name of the implementation.
    report : Report
        The result of `check_implementation`.
    judged : Judgement
        The result of `judge`.

    Returns
    -------
    str

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from doraxp.testing import check_implementation, judge
    >>> report = check_implementation(SimpleNamespace(init=lambda weight: weight))
    >>> text = junit("draft", report, judge(report))
    >>> '<testcase classname="init" name="tall, float32" assertions="0">' in text
    True
    """
    by_function = defaultdict(list)
    wrong, excused = _by_test(judged)
    for run in report.runs:
        test = _case(run.function, f"{run.case}, {run.dtype}")
        test.set("assertions", str(run.checked))
        here = (run.function, run.case, run.dtype)
        if lines := wrong.get(here):
            _outcome(test, "failure", "wrong", lines)
        elif reasons := excused.get(here):
            _outcome(test, "skipped", "expected", reasons)
        by_function[run.function].append(test)
    for one in report.refused:
        test = _case(one.function, f"{one.case}, {one.dtype}")
        problem = f"{one.function} raises NotImplementedError"
        _outcome(test, "skipped", "not implemented", [problem])
        by_function[one.function].append(test)
    for left_out in report.never_returned:
        for key in left_out.keys:
            test = _case(left_out.function, key)
            _outcome(test, "skipped", "never returned", [str(left_out._replace(keys=(key,)))])
            by_function[left_out.function].append(test)
    suites = [_suite(function, tests) for function, tests in by_function.items()]
    if stale := [*_stale(judged)]:
        suites.append(_suite(STALE, stale))
    root = ElementTree.Element("testsuites", name=printable(name))
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.attrib[key]) for suite in suites)))
    root.extend(suites)
    ElementTree.indent(root)
    text: str = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _by_test(judged: Judgement) -> tuple[dict[tuple[str, str, str], list[str]], ...]:
    """Return the lines of each test that is wrong, and those of each that is excused."""
    wrong, excused = defaultdict(list), defaultdict(list)
    for one in judged.wrong:
        wrong[_key(one)].append(f"{one.quantity}: {one.problem}")
    for one, entry in judged.expected:
        reason = f"expected: {entry.reason} ({entry.link})"
        excused[_key(one)].append(f"{one.quantity}: {one.problem}; {reason}")
    for one in judged.extreme:
        excused[_key(one)].append(f"{one.quantity}: {one.problem}; an extreme case")
    return wrong, excused


def _key(one: Finding) -> tuple[str, str, str]:
    return one.function, one.case, one.dtype


def _stale(judged: Judgement) -> Iterable[ElementTree.Element]:
    def failed(entry: ExpectedFailure, problem: str) -> ElementTree.Element:
        test = _case(STALE, entry.name)
        _outcome(test, "failure", "stale", [problem])
        return test

    for entry, pairs in judged.passing:
        yield failed(entry, f"passes in {', '.join(map('/'.join, pairs))}")
    for entry in judged.unmatched:
        yield failed(entry, "matches no function and case of this run")


def _case(function: str, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=printable(function), name=printable(name))


def _outcome(test: ElementTree.Element, tag: str, kind: str, lines: list[str]) -> None:
    # XML cannot hold the control characters that a message may have.
    lines = [printable(line) for line in lines]
    outcome = ElementTree.SubElement(test, tag, type=kind, message=lines[0])
    outcome.text = "\n".join(lines)


def _suite(name: str, tests: list[ElementTree.Element]) -> ElementTree.Element:
    counts: dict[str, Any] = {
        key: str(sum(test.find(tag) is not None for test in tests))
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
    }
    suite = ElementTree.Element("testsuite", name=printable(name), tests=str(len(tests)), **counts)
    suite.extend(tests)
    return suite
