"""A Dask cluster that merges the shards, and the check that its processes can."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from typing import Any

import doraxp

NEEDED = ("numpy", "array_api_compat", "ml_dtypes", "safetensors", "threadpoolctl", "doraxp")
"""The modules that a worker imports."""
SAME = ("numpy", "ml_dtypes", "doraxp")
"""Those of which all processes must have one version, because a result depends on it."""
_VERSIONS = """
import importlib
found = {}
for name in names:
    try:
        found[name] = importlib.import_module(name).__version__
    except ImportError:
        pass
"""


@contextlib.contextmanager
def cluster(scheduler: str | None, *modules: str) -> Iterator[Executor | None]:
    """Give the executor of a cluster; None without the address of a scheduler.

    Parameters
    ----------
    scheduler : str or None
        The address.
    *modules : str
        Needed on the workers, besides those of every merge.

    Raises
    ------
    CheckpointError
        The address is wrong, or a process of the cluster lacks a module or has another version.
    OSError
        The cluster does not answer, or was lost.
    """
    if scheduler is None:
        yield None
        return
    from distributed import Client, KilledWorker

    from doraxp.checkpoint import CheckpointError

    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(Client(scheduler))
        except ValueError as error:
            raise CheckpointError(f"--scheduler {scheduler!r}: {error}") from None
        if problem := _problem(client, (*NEEDED, *modules)):
            raise CheckpointError(f"--scheduler {scheduler!r}: {problem}")
        try:
            yield client.get_executor()
        except (KilledWorker, CancelledError) as error:
            raise OSError(
                f"the cluster lost the merge: {str(error) or type(error).__name__}; the same merge "
                "goes on from the shards that are finished"
            ) from None


def _problem(client: Any, names: tuple[str, ...]) -> str | None:
    """Return a message about a process that lacks a module or has another version, or None.

    The question goes there as source, because a process without doraxp cannot load its functions.
    The scheduler must have the modules too: it reads the tasks before it passes them on.
    """
    names_and_source = {"source": _VERSIONS, "scope": {"names": names}}
    question = eval, "exec(source, scope) or scope['found']", names_and_source
    try:
        answers = {"the scheduler": client.run_on_scheduler(*question)}
        answers |= {f"the worker {name}": found for name, found in client.run(*question).items()}
    except Exception as error:  # of any kind: it comes from the other process
        return f"the cluster cannot say what is installed there: {error}"
    for process, found in answers.items():
        for name in names:
            here = importlib.import_module(name).__version__
            if name not in found:
                need = f"doraxp[distributed]=={doraxp.__version__}"
                return f"{process} has no {name}: install {need} there"
            if name in SAME and found[name] != here:
                return (
                    f"{process} has {name} {found[name]}, but here it is {here}: make them the same"
                )
    return None
