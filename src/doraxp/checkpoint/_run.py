"""`run_merge`: the shards are merged beside OUT, which appears when all of them are complete."""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from pathlib import Path

import threadpoolctl

from doraxp.checkpoint._change import Change
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._plan import MergedTensor
from doraxp.checkpoint._shard import OnBytes, merge_shard
from doraxp.checkpoint._target import (
    check_target,
    copy_others,
    move_to_target,
    start_or_resume,
    work_folder,
)
from doraxp.checkpoint._verify import Sample, sample_of, verify_shard


def run_merge(
    merge: Merge,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    verify: bool = False,
    jobs: int = 1,
    executor: Executor | None = None,
    on_bytes: OnBytes = lambda count: None,
) -> dict[str, Change]:
    """Write the merged model to `out`, which does not exist until it is complete.

    A merge that was interrupted goes on from the shards that it finished.

    Parameters
    ----------
    merge : Merge
        From `plan_merge`.
    out : path
        A folder, or a file where the base is one.
    force : bool
        Replace `out` if it exists.
    verify : bool
        Read the result again, and compare a sample of rows with a dense merge.
    jobs : int
        Shards at a time, each in a thread; NumPy lets the threads run at the same time. The result
        is the same bit for bit.
    executor : concurrent.futures.Executor, optional
        Takes the shards instead, each as one task: that of a Dask cluster, where every worker sees
        the same files.
    on_bytes : callable
        Called with numbers of bytes that were written, from any of the threads; with an executor,
        once for each shard.

    Returns
    -------
    dict of str to Change
        By tensor.

    Raises
    ------
    CheckpointError
        A weight contains NaN or infinity, or the result fails the verification.
    FileExistsError
        `out` exists, and `force` is False.
    OSError
        A file cannot be read or written, or the disk is full.
    """
    out = Path(out).absolute()
    check_target(merge, out, force=force)
    work = work_folder(out)
    start_or_resume(work, merge)
    try:
        if executor is None:
            changes = _in_threads(merge, work, verify, jobs, on_bytes)
        else:
            changes = _in_tasks(merge, work, verify, executor, on_bytes)
        copy_others(merge, work / "model")
    except CheckpointError:
        # This merge can never finish. A worker elsewhere may still write; the next merge clears
        # that away.
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as error:
        problem = error.strerror or error
        if error.filename is not None:
            problem = f"{error.filename}: {problem}"
        raise OSError(
            f"{out}: {problem}; the same merge goes on from the shards that are finished"
        ) from error
    move_to_target(merge, work, out)
    return changes


def _in_threads(
    merge: Merge, work: Path, verify: bool, jobs: int, on_bytes: OnBytes
) -> dict[str, Change]:
    stopped = threading.Event()

    def count(nbytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError("the merge was stopped")
        on_bytes(nbytes)

    # The limit that `merge_shard` sets holds for the whole process, and the first thread to finish
    # would lift it.
    with threadpoolctl.threadpool_limits(1), ThreadPoolExecutor(jobs) as pool:
        tasks = [
            pool.submit(finish_shard, merge, work, name, verify, count)
            for name in merge.model.shards
        ]
        try:
            for task in as_completed(tasks):
                task.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    return {name: change for task in tasks for name, change in task.result().items()}


def _in_tasks(
    merge: Merge, work: Path, verify: bool, executor: Executor, on_bytes: OnBytes
) -> dict[str, Change]:
    tasks = {
        executor.submit(finish_shard, merge, work, name, verify): name
        for name in merge.model.shards
    }
    try:
        for task in as_completed(tasks):
            task.result()
            on_bytes(merge.shard_size(tasks[task]))
    finally:
        for task in tasks:
            task.cancel()  # the tasks that wait, where one failed
    return {name: change for task in tasks for name, change in task.result().items()}


def finish_shard(
    merge: Merge, work: Path, name: str, verify: bool, on_bytes: OnBytes = lambda count: None
) -> dict[str, Change]:
    """Write a shard, unless an earlier run finished it; return its changes."""
    done, notes = work / "model" / name, work / f"{name}.json"
    reader = merge.model.shards[name]
    samples: dict[str, Sample] = {}
    changes = _noted(notes) if done.exists() else None
    if changes is not None:
        on_bytes(merge.shard_size(name))
        if verify:
            samples = _samples(merge, name)
    else:
        changes = {}
        # The name is unique: a worker that was thought dead may still write its own file.
        unfinished = work / f"{uuid.uuid4().hex}.unfinished"
        for weight in merge_shard(
            reader, unfinished, merge.tasks, merge.adapters, merge.options, on_bytes
        ):
            changes[weight.name] = weight.change
            if verify:
                samples[weight.name] = sample_of(weight.layer)
        notes.write_text(json.dumps(changes), "utf-8")
        unfinished.replace(done)
    if verify:
        verify_shard(reader, done, merge.tasks, samples)
    return changes


def _samples(merge: Merge, name: str) -> dict[str, Sample]:
    """Return the samples of the merged weights in a shard, from the adapter's file."""
    tasks = {tensor: merge.tasks[tensor] for tensor in merge.model.shards[name].tensors}
    return {
        tensor: sample_of(merge.adapters.read(task.layer))
        for tensor, task in tasks.items()
        if isinstance(task, MergedTensor)
    }


def _noted(notes: Path) -> dict[str, Change] | None:
    """Return the changes of a finished shard; None where a power cut took the file."""
    try:
        noted = json.loads(notes.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return {tensor: Change(*values) for tensor, values in noted.items()}
