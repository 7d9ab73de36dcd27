"""The plan of a run: the tasks to measure, each with its workload, and the libraries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from doraxp.backends import available
from doraxp.bench import _curves, _peft
from doraxp.bench._workloads import Workload

LIBRARIES = ("numpy", "torch")
"""The default libraries."""
TOKENLESS = ("norm", "merge", "adamw")
"""Tasks that do not depend on the tokens: once is enough for all."""


class Job(NamedTuple):
    """A task to measure with a workload."""

    workload: Workload
    task: str


def jobs(workloads: Iterable[Workload], tasks: Iterable[str]) -> list[Job]:
    """Return all tasks with all workloads, without repetitions."""
    tasks, made, done = list(tasks), [], set()
    for workload in workloads:
        for task in tasks:
            for_all_tokens = replace(workload, tokens=1), task
            if task not in TOKENLESS or for_all_tokens not in done:
                made.append(Job(workload, task))
            done.add(for_all_tokens)
    return list(dict.fromkeys(made))


def curve_jobs(base: Workload) -> list[Job]:
    """Return the steps of all sweeps around a base, without repetitions."""
    workloads = (workload for _, workload in _curves.workloads(base))
    return jobs(workloads, [_curves.TASK])


def libraries(asked: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Return the libraries that take part, and the reasons why others cannot.

    PEFT takes part where torch does and PEFT is installed. None asks for `LIBRARIES`.
    """
    missing: dict[str, str] = {}
    if asked is None:
        states = [status for status in available() if status.name in LIBRARIES]
        asked = [status.name for status in states if status.usable]
        missing = {status.name: status.detail for status in states if not status.usable}
    present = list(dict.fromkeys(asked))
    reason = _peft.why_not()
    if reason is not None:
        missing[_peft.LIBRARY] = reason
    elif "torch" in present:
        present.append(_peft.LIBRARY)
    return present, missing
