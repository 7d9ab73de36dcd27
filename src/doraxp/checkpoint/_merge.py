"""A whole model, merged beside where it will be, and renamed when it is complete."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import threadpoolctl

from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._formats import load_adapters
from doraxp.checkpoint._model import INDEX, Model, open_model
from doraxp.checkpoint._plan import Task, plan
from doraxp.checkpoint._rows import Change
from doraxp.checkpoint._safetensors import CheckpointError, read_json
from doraxp.checkpoint._shard import OnBytes, Options, merge_shard, written_as
from doraxp.checkpoint._verify import verify_shard

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENIZER = ("tokenizer*", "chat_template*", "added_tokens.json", "vocab.*", "merges.txt")


class Merge(NamedTuple):
    """A merge that fits together, and has not begun."""

    model: Model
    adapters: AdapterSet
    tasks: dict[str, Task]
    options: Options

    def shard_size(self, name: str) -> int:
        """Return the bytes of the tensors that are written to one shard."""
        tensors = self.model.shards[name].tensors.values()
        return sum(written_as(tensor, self.options).nbytes for tensor in tensors)

    @property
    def size(self) -> int:
        """The bytes of all tensors that are written."""
        return sum(self.shard_size(name) for name in self.model.shards)

    @property
    def output_heads(self) -> list[str]:
        """The embeddings that change and are the output head too, so that it changes with them."""
        return sorted(self.model.output_heads() & self.tasks.keys())

    def tokenizers_apart(self) -> dict[str, bool]:
        """Return which files of a tokenizer beside the adapter are not the base's own.

        With each, whether the base has one of that name: trainers save them with the adapter, and
        they may have tokens, or a template of chats, that were trained with.
        """
        if not self.model.is_folder:
            return {}
        folder, base = self.adapters.reader.path.parent, self.model.path
        own = [file for pattern in _TOKENIZER for file in folder.glob(pattern) if file.is_file()]
        there = {file.name: (base / file.name).is_file() for file in sorted(own)}
        return {
            name: known
            for name, known in there.items()
            if not known or not filecmp.cmp(folder / name, base / name, shallow=False)
        }


def plan_merge(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], options: Options
) -> Merge:
    """Read the headers of a model and of an adapter, and hold them to each other."""
    # A plan goes to the workers of a cluster, and they may run in other folders.
    model, adapters = open_model(Path(base).absolute()), load_adapters(Path(adapter).absolute())
    return Merge(model, adapters, plan(model, adapters), options)


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
    """Write the merged model to `out`; until it is complete there is no `out`.

    A merge that was interrupted goes on from the shards that it finished.

    Parameters
    ----------
    merge : Merge
        From `plan_merge`.
    out : path
        A folder, or a file where the base is one.
    force : bool
        Replace what is there.
    verify : bool
        Read the result again, and hold it to a dense merge of a sample of rows.
    jobs : int
        Shards at a time, each in a thread: NumPy lets the others run. The result is the same bit
        for bit.
    executor : concurrent.futures.Executor, optional
        Takes the shards instead, each as one task: a Dask cluster's, where every worker sees the
        same files.
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
        A weight has NaN or infinity in it, or the result is not as it must be.
    FileExistsError
        There is something at `out`, and no `force`.
    OSError
        Something cannot be read or written, or the disk is full.
    """
    out = Path(out).absolute()
    _check_target(merge, out, force=force)
    work = _work_folder(out)
    _resume_or_start(work, _fingerprint(merge))
    try:
        if executor is None:
            changes = _in_threads(merge, work, verify, jobs, on_bytes)
        else:
            changes = _in_tasks(merge, work, verify, executor, on_bytes)
        _copy_others(merge, work / "model")
    except CheckpointError:
        # It cannot be finished; what a worker elsewhere still writes, the next merge clears away.
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as error:
        problem = error.strerror or error
        if error.filename is not None:
            problem = f"{error.filename}: {problem}"
        raise OSError(
            f"{out}: {problem}; the same merge goes on from the shards that are finished"
        ) from error
    result = work / "model"
    if not merge.model.is_folder:
        result /= merge.model.path.name
    if merge.model.is_folder and os.path.lexists(out):
        # A name of its own: a merge that was killed here may have left another.
        out.rename(work / f"{uuid.uuid4().hex}.replaced")
    result.replace(out)
    shutil.rmtree(work)
    return changes


def _in_threads(
    merge: Merge, work: Path, verify: bool, jobs: int, on_bytes: OnBytes
) -> dict[str, Change]:
    stopped = threading.Event()

    def count(nbytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError("the merge was stopped")
        on_bytes(nbytes)

    # The limit that `merge_shard` sets is the whole process's: the first to finish would lift it.
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
            task.cancel()  # those that wait, where one failed
    return {name: change for task in tasks for name, change in task.result().items()}


def finish_shard(
    merge: Merge, work: Path, name: str, verify: bool, on_bytes: OnBytes = lambda count: None
) -> dict[str, Change]:
    """Write a shard, unless it was finished before; return its changes."""
    done, notes = work / "model" / name, work / f"{name}.json"
    reader = merge.model.shards[name]
    changes = _noted(notes) if done.exists() else None
    if changes is not None:
        on_bytes(merge.shard_size(name))
    else:
        # A name of its own: a worker that was thought dead may still write to the other.
        unfinished = work / f"{uuid.uuid4().hex}.unfinished"
        changes = merge_shard(
            reader, unfinished, merge.tasks, merge.adapters, merge.options, on_bytes
        )
        notes.write_text(json.dumps(changes), "utf-8")
        unfinished.replace(done)
    if verify:
        verify_shard(reader, done, merge.tasks, merge.adapters)
    return changes


def _noted(notes: Path) -> dict[str, Change] | None:
    """Return the changes of a finished shard; None where a power cut took them."""
    try:
        noted = json.loads(notes.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return {tensor: Change(*values) for tensor, values in noted.items()}


def _work_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _check_target(merge: Merge, out: Path, *, force: bool) -> None:
    base, adapter = merge.model.path.resolve(), merge.adapters.reader.path.resolve()
    target = out.resolve()
    if target == base or (merge.model.is_folder and target.is_relative_to(base)):
        raise CheckpointError(f"{out}: OUT must not be in BASE, {merge.model.path}")
    if any(path.is_relative_to(target) for path in (base, adapter)):
        raise CheckpointError(f"{out}: OUT must not hold what is merged")
    if out.is_dir() and not merge.model.is_folder:
        raise CheckpointError(f"{out}: OUT must be a file, as BASE is, but there is a folder")
    if merge.model.is_folder and out.suffix == ".safetensors":
        raise CheckpointError(f"{out}: OUT must be a folder, as BASE is, and has a file's name")
    if os.path.lexists(out) and not force:
        raise FileExistsError(f"{out}: already there; --force replaces it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder")
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"{out.parent}: not writable")
    work = _work_folder(out)
    if os.path.lexists(work) and (work.is_symlink() or not work.is_dir()):
        raise FileExistsError(f"{work}: in the way: it must be a folder of an earlier merge")
    free = shutil.disk_usage(out.parent).free
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    if free + there < merge.size:
        raise OSError(f"{out.parent}: {merge.size} bytes are needed, {free} are free")


def _fingerprint(merge: Merge) -> dict[str, Any]:
    """Return what a finished shard depends on, in the types of JSON."""
    files = [*(reader.path for reader in merge.model.shards.values()), merge.adapters.reader.path]
    config = merge.adapters.reader.path.parent / "adapter_config.json"
    return {
        "files": [
            [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
            for file in (*files, *((config,) if config.exists() else ()))
        ],
        "options": list(vars(merge.options).values()),
    }


def _resume_or_start(work: Path, fingerprint: Mapping[str, Any]) -> None:
    """Keep the finished shards of the same merge; clear away those of another.

    A merge that was killed at its very end has no model there any more: that is OUT.
    """
    note = work / "merge.json"
    if (work / "model").exists():
        with contextlib.suppress(OSError, ValueError):
            if json.loads(note.read_bytes()) == fingerprint:
                for unfinished in work.glob("*.unfinished"):
                    unfinished.unlink()
                return
    if work.exists():
        shutil.rmtree(work)
    (work / "model").mkdir(parents=True)
    note.write_text(json.dumps(fingerprint), "utf-8")


def _copy_others(merge: Merge, folder: Path) -> None:
    """Copy configuration and tokenizer, and make the index anew."""
    model, dtype = merge.model, merge.options.dtype
    for file in model.others:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(model.path / file, target)
    if model.index is not None:
        metadata = dict(model.index.get("metadata") or {}) | {"total_size": merge.size}
        text = json.dumps(model.index | {"metadata": metadata}, indent=2)
        (folder / INDEX).write_text(text + "\n", "utf-8")
    config = folder / "config.json"
    if dtype is not None and model.is_folder and config.exists():
        entries = read_json(config)
        parts = (part for part in entries.values() if isinstance(part, dict))  # text, vision
        for part in (entries, *parts):
            for key in part.keys() & {"dtype", "torch_dtype"}:
                part[key] = _DTYPE_NAMES[dtype]
        config.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
