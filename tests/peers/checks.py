"""Functions that the tests of other implementations share."""

from __future__ import annotations

from types import SimpleNamespace

from doraxp.testing import Conventions


def meant(**choices):
    return Conventions(**{"norm_gradient": "detached", **choices})


def offered(peer, *names):
    return SimpleNamespace(**{name: getattr(peer, name) for name in names})


def findings(report, *, extreme=False):
    return {
        (one.function, one.case, one.quantity) for one in report.findings if one.extreme == extreme
    }


def not_finite(report, case):
    return {
        (one.function, one.quantity)
        for one in report.findings
        if one.case == case and one.problem.endswith(" not finite")
    }


def names(report):
    return {one.functions: one.deviations for one in report.diagnoses}
