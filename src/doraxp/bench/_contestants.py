"""All contestants of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from doraxp.bench import _cuda, _gpu, _host, _peft, _torch
from doraxp.bench._contestant import Contestant
from doraxp.bench._workloads import Workload

Maker: TypeAlias = Callable[[str, Workload], Iterator[Contestant]]
_PYTORCH: dict[str, Maker] = {_torch.LIBRARY: _torch.contestants, _peft.LIBRARY: _peft.contestants}


def contestants(task: str, workload: Workload, libraries: Iterable[str]) -> list[Contestant]:
    """Return the contestants of a task on the named libraries; "PEFT" may be among them.

    CuPy must be alone: the other libraries run on the host. Its contestants include those of PEFT
    on the GPU. With a workload on cuda the libraries are PyTorch and PEFT.
    """
    if _gpu.LIBRARY in libraries:
        return list(_gpu.contestants(task, workload))
    if workload.device == "cuda":
        return list(_cuda.contestants(task, workload, libraries))
    found: list[Contestant] = []
    for name in libraries:
        found += (
            _PYTORCH[name](task, workload)
            if name in _PYTORCH
            else _host.contestants(task, workload, name)
        )
    return found
