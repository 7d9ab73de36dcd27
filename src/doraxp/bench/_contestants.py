"""All contestants of a task."""

from __future__ import annotations

from collections.abc import Iterable

from doraxp.bench import _gpu, _host, _peft
from doraxp.bench._contestant import Contestant
from doraxp.bench._workloads import Workload


def contestants(task: str, workload: Workload, libraries: Iterable[str]) -> list[Contestant]:
    """Return the contestants of a task on the named libraries; "PEFT" may be among them.

    CuPy must be alone: the other libraries run on the host. Its contestants include those of PEFT
    on the GPU.
    """
    if _gpu.LIBRARY in libraries:
        return list(_gpu.contestants(task, workload))
    found: list[Contestant] = []
    for name in libraries:
        found += (
            _peft.contestants(task, workload)
            if name == _peft.LIBRARY
            else _host.contestants(task, workload, name)
        )
    return found
