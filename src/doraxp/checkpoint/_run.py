"""`run_merge`: the shards are merged beside OUT, which appears when all of them are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from pathlib import Path

import threadpoolctl

from doraxp.checkpoint._change import Change
from doraxp.checkpoint._digest import Digests
from doraxp.checkpoint._errors import ChangedError, CheckpointError, named
from doraxp.checkpoint._lock import alone
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._shard import OnBytes, merge_shard
from doraxp.checkpoint._target import check_target, copy_others, move_to_target
from doraxp.checkpoint._verify import verify_shard
from doraxp.checkpoint._work import (
    check_complete,
    discard,
    note,
    noted,
    places,
    put_back,
    start_or_resume,
    work_folder,
)


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
        A weight contains NaN or infinity, a file of the base or of the adapter has changed since
        `plan_merge`, or the result fails the verification.
    FileExistsError
        `out` exists, and `force` is False or something in it is not of a model.
    BlockingIOError
        Another merge to `out` is at work.
    OSError
        A file cannot be read or written, or the disk is full.
    """
    out = Path(out).absolute()
    check_target(merge, out, force=force)
    work = work_folder(out)
    with alone(work, out):
        put_back(work, out)
        check_target(merge, out, force=force)  # another merge may have ended since
        run = work / uuid.uuid4().hex
        try:
            start_or_resume(run, merge)
            if executor is None:
                changes = _in_threads(merge, run, verify, jobs, on_bytes)
            else:
                changes = _in_tasks(merge, run, verify, executor, on_bytes)
            copy_others(merge, run / "model")
            merge.check_inputs()
            check_complete(run, merge)
            move_to_target(merge, run, out, force=force)
        except ChangedError:
            _check_own(run, out)
            raise  # the shards that are finished were right, and are again if the file comes back
        except CheckpointError:
            _check_own(run, out)
            discard(run)  # this merge can never finish
            raise
        except FileNotFoundError as error:
            _check_own(run, out)
            raise _explained(error, out) from error
        except FileExistsError:
            raise  # something is at OUT since
        except OSError as error:
            raise _explained(error, out) from error
        with contextlib.suppress(FileNotFoundError):  # a merge without a lock took it
            discard(run)
    return changes


def _check_own(run: Path, out: Path) -> None:
    """Raise BlockingIOError if another merge, which knew no lock, has taken the run folder.

    Or if this one has taken the run folder of another, which was just moving its model to `out`.
    """
    if not (run / "model").exists():
        shutil.rmtree(run, True)
        raise BlockingIOError(f"{out}: another merge to it took over; this one has stopped")


def _explained(error: OSError, out: Path) -> OSError:
    """Return the error with the file, and with the one thing to do."""
    problem = f"{error.filename or out}: {error.strerror}" if error.strerror else error
    return OSError(f"{problem}; the same merge goes on from the shards that are finished")


def _in_threads(
    merge: Merge, run: Path, verify: bool, jobs: int, on_bytes: OnBytes
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
            pool.submit(finish_shard, merge, run, name, verify, count)
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
    merge: Merge, run: Path, verify: bool, executor: Executor, on_bytes: OnBytes
) -> dict[str, Change]:
    tasks = {
        executor.submit(finish_shard, merge, run, name, verify): name for name in merge.model.shards
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
    merge: Merge, run: Path, name: str, verify: bool, on_bytes: OnBytes = lambda count: None
) -> dict[str, Change]:
    """Write a shard, unless an earlier run finished it; return its changes."""
    shard = places(run, name)
    changes = noted(name, shard, merge)
    if changes is not None:
        on_bytes(merge.shard_size(name))
        if verify:
            verify_shard(merge, name, shard.done)
        return changes
    digests = Digests()

    def count(tensor: str, raw: memoryview) -> None:
        digests.update(tensor, raw)
        on_bytes(raw.nbytes)

    target = shard.unfinished
    with named(target):  # an error of a file that is read has that file's name
        weights = merge_shard(merge, name, target, count)
        changes = {weight.name: weight.change for weight in weights}
    if verify:
        verify_shard(merge, name, target)
    note(shard, digests.hexdigest(merge.entries(name)), changes)
    return changes
