"""All contestants of a task together."""

from __future__ import annotations

from collections.abc import Iterable

from doraxp.cli._bench import contestants, gpu, peft
from doraxp.cli._bench.cases import Case
from doraxp.cli._bench.contestants import Contestant


def entrants(task: str, case: Case, libraries: Iterable[str]) -> list[Contestant]:
    """Return the contestants of a task; `peft.LIBRARY` may be among the libraries.

    CuPy brings its own, and PEFT's on the device.
    """
    if gpu.LIBRARY in libraries:  # by itself: the others are on the host
        return list(gpu.contestants(task, case))
    return [
        contestant
        for name in libraries
        for contestant in (
            peft.contestants(task, case)
            if name == peft.LIBRARY
            else contestants.contestants(task, case, name)
        )
    ]
