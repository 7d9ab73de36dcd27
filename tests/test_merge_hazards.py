"""`run_merge` beside other merges, on files that change, after kills, and on files to keep."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SHAPES, dense, draw, write_adapter, write_json, write_model
from safetensors.numpy import load_file, save_file

import doraxp
from doraxp.checkpoint import (
    CheckpointError,
    Options,
    _lock,
    _merge,
    _run,
    _safetensors,
    _shard,
    _stamp,
    _target,
    _work,
    check_target,
    plan_merge,
    run_merge,
)
from doraxp.checkpoint._digest import PIECE, Digest, Digests
from doraxp.checkpoint._safetensors import Reader
from doraxp.checkpoint._verify import verify_shard
from doraxp.cli import main

ROOT = Path(__file__).parents[1]
NO_OPTIONS = Options()
SHARDS = ("model-1.safetensors", "model-2.safetensors")


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "base", "float32")
    write_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "other", lora_alpha=7.0)
    return tmp_path


def plan(folder, adapter="adapter", options=NO_OPTIONS):
    return plan_merge(folder / "base", folder / adapter, options)


def merge(folder, *arguments, adapter="adapter"):
    paths = [str(folder / name) for name in ("base", adapter)]
    return main(["merge", *paths, "--out", str(folder / "out"), "--jobs", "1", *arguments])


def content(folder):
    """Return the bytes of all files in a folder, by relative path; of a file, its own."""
    files = (path for path in (folder, *folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def right(folder, adapter="adapter", options=NO_OPTIONS):
    """Return the content of a merge that nothing disturbs."""
    run_merge(plan(folder, adapter, options), folder / "undisturbed")
    files = content(folder / "undisturbed")
    shutil.rmtree(folder / "undisturbed")
    return files


def merged_shards(monkeypatch):
    """Return a list that grows by the name of each shard that is merged."""
    names = []

    def noted(merge, shard, *args):
        names.append(shard)
        return _shard.merge_shard(merge, shard, *args)

    monkeypatch.setattr(_run, "merge_shard", noted)
    return names


def left_by_a_stop(folder, monkeypatch, *arguments, adapter="adapter"):
    """Stop a merge when all shards are finished, and return its run folder."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_run, "copy_others", stop)
        assert merge(folder, *arguments, adapter=adapter) == 130
    (run,) = (path for path in (folder / ".out.partial").iterdir() if path.is_dir())
    return run


# Two merges to one OUT


class Paused:
    """A merge in a thread that waits when it has written its first bytes."""

    def __init__(self, merge, out, **options):
        self.begun, self.go_on, self.error = threading.Event(), threading.Event(), None
        self._thread = threading.Thread(target=self._run, args=(merge, out), kwargs=options)
        self._thread.start()
        self.begun.wait(60)

    def _run(self, merge, out, **options):
        def wait(_):
            self.begun.set()
            self.go_on.wait(60)

        try:
            run_merge(merge, out, on_bytes=wait, **options)
        except Exception as error:
            self.error = error
        finally:
            self.begun.set()

    def end(self):
        self.go_on.set()
        self._thread.join()
        return self.error


@pytest.mark.parametrize("adapter", ["adapter", "other"])
def test_a_merge_to_an_out_that_another_one_works_for_is_an_error_at_once(folder, capsys, adapter):
    expected = right(folder)
    first = Paused(plan(folder), folder / "out")
    try:
        assert merge(folder, "--force", adapter=adapter) == 2
        out, process = folder / "out", os.getpid()
        error = capsys.readouterr().err
        assert f"{out}: another merge to it is at work (process {process} on host " in error
        assert error.count("\n") == 1
        with pytest.raises(BlockingIOError):
            run_merge(plan(folder, adapter), folder / "out")
    finally:
        assert first.end() is None
    assert content(folder / "out") == expected
    assert not (folder / ".out.partial").exists()


def test_the_holder_of_a_lock_is_named_where_another_one_was_before(folder, capsys):
    work = folder / ".out.partial"
    work.mkdir()
    (work / _lock.LOCK).write_text(json.dumps({"process": 1, "host": "killed" * 20}))
    first = Paused(plan(folder), folder / "out")
    assert merge(folder) == 2
    assert f"is at work (process {os.getpid()} on host " in capsys.readouterr().err
    assert first.end() is None


WAITS = """
import sys, time
from doraxp.checkpoint import Options, plan_merge, run_merge
def wait(count):
    print("begun", flush=True)
    time.sleep(60)
base, adapter, out = sys.argv[1:]
run_merge(plan_merge(base, adapter, Options()), out, on_bytes=wait)
"""


def test_the_lock_of_a_killed_merge_is_gone(folder, capsys):
    expected = right(folder)
    paths = [str(folder / name) for name in ("base", "adapter", "out")]
    process = subprocess.Popen([sys.executable, "-c", WAITS, *paths], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    assert merge(folder) == 2
    assert f"is at work (process {process.pid} on host " in capsys.readouterr().err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert merge(folder) == 0
    assert content(folder / "out") == expected


def without_locks(monkeypatch, code=errno.ENOTSUP):
    def unsupported(*_):
        raise OSError(code, "not supported")

    monkeypatch.setattr(_lock._fcntl, "flock", unsupported)


@pytest.mark.parametrize("adapter", ["adapter", "other"])
@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK])
def test_without_locks_the_later_merge_takes_over_and_the_earlier_one_says_so(
    folder, monkeypatch, adapter, code
):
    """Some network file systems have no locks."""
    without_locks(monkeypatch, code)
    expected = right(folder, adapter)
    first = Paused(plan(folder), folder / "out", verify=True)
    second = Paused(plan(folder, adapter), folder / "out", verify=True)
    message = str(first.end())
    assert message == f"{folder / 'out'}: another merge to it took over; this one has stopped"
    assert second.end() is None
    assert content(folder / "out") == expected
    assert not (folder / ".out.partial").exists()


def test_without_locks_the_merge_that_ends_first_leaves_the_other_its_work_folder(
    folder, monkeypatch
):
    """The later merge may have removed the run of the earlier one, and not yet begun its own."""
    without_locks(monkeypatch)
    expected, discard, messages = right(folder, "other"), _work.discard, []
    first = Paused(plan(folder), folder / "out")

    def discard_and_wait(path):
        discard(path)
        if not messages:
            messages.append(str(first.end()))

    monkeypatch.setattr(_work, "discard", discard_and_wait)
    run_merge(plan(folder, "other"), folder / "out")
    (message,) = messages
    assert message.endswith("another merge to it took over; this one has stopped")
    assert content(folder / "out") == expected
    assert not (folder / ".out.partial").exists()


def test_without_locks_a_merge_that_takes_over_too_late_says_so(folder, monkeypatch):
    """The other merge moves its model to OUT at the same moment."""
    without_locks(monkeypatch)
    earlier, is_of = left_by_a_stop(folder, monkeypatch), _work._is_of

    def is_of_and_moves(*arguments):
        same = is_of(*arguments)
        (earlier / "model").rename(folder / "out")
        return same

    monkeypatch.setattr(_work, "_is_of", is_of_and_moves)
    with pytest.raises(BlockingIOError, match="another merge to it took over"):
        run_merge(plan(folder), folder / "out")
    assert (folder / "out").is_dir()
    assert not (folder / ".out.partial").exists()


def test_without_locks_a_complete_merge_may_lose_what_it_would_clear_up(folder, monkeypatch):
    without_locks(monkeypatch)
    move = _run.move_to_target

    def move_and_lose(merge, run, *arguments, **options):
        move(merge, run, *arguments, **options)
        _work.discard(run)  # as a merge that begins now

    monkeypatch.setattr(_run, "move_to_target", move_and_lose)
    expected = right(folder)
    run_merge(plan(folder), folder / "out")
    assert content(folder / "out") == expected
    assert not (folder / ".out.partial").exists()


def test_without_locks_an_out_that_another_merge_moves_away_is_not_an_error(folder, monkeypatch):
    """It does so while this merge looks whether OUT is a model."""
    without_locks(monkeypatch)
    run_merge(plan(folder, "other"), folder / "out")

    def move_away(out):
        shutil.rmtree(out)
        raise FileNotFoundError(f"{out}: no such file or folder")

    monkeypatch.setattr(_target, "open_model", move_away)
    run_merge(plan(folder), folder / "out", force=True)
    assert content(folder / "out") == right(folder)


@pytest.mark.parametrize("is_file", [False, True])
def test_an_out_that_goes_during_the_look_is_not_an_error(folder, monkeypatch, is_file):
    """Another merge without a lock may replace it."""
    out, looks, lexists = folder / "out", [], os.path.lexists
    if is_file:
        tensors = [load_file(folder / "base" / shard) for shard in SHARDS]
        shutil.rmtree(folder / "base")
        save_file(tensors[0] | tensors[1], folder / "base")
        out.write_bytes(b"content")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("content")

    def goes_after_the_look(path):
        was_there = lexists(path)
        if path == out:
            looks.append(was_there)
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
        return was_there

    monkeypatch.setattr(os.path, "lexists", goes_after_the_look)
    check_target(plan(folder), out, force=True)
    assert looks == [True, False]


def test_another_error_of_the_lock_is_not_ignored(folder, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_lock._fcntl, "flock", fails)
    with pytest.raises(OSError, match="Input/output error"):
        run_merge(plan(folder), folder / "out")


def test_a_late_worker_of_an_earlier_run_cannot_write(folder, monkeypatch):
    """A Dask worker may go on when the process that gave it the shard is dead."""
    earlier = left_by_a_stop(folder, monkeypatch)
    run = folder / ".out.partial" / ("0" * 32)
    _work.start_or_resume(run, plan(folder))
    before = content(folder)
    with pytest.raises(FileNotFoundError):
        _run.finish_shard(plan(folder), earlier, SHARDS[0], True)
    assert content(folder) == before


def test_a_work_folder_that_an_ended_merge_removes_is_made_again(folder, monkeypatch):
    expected, lock, removed = right(folder), _lock._lock, []

    def too_late(file):
        if not removed:
            removed.append(shutil.rmtree(folder / ".out.partial"))
        lock(file)

    monkeypatch.setattr(_lock, "_lock", too_late)
    first = Paused(plan(folder), folder / "out")
    assert removed
    with pytest.raises(BlockingIOError, match="another merge to it is at work"):
        run_merge(plan(folder), folder / "out")
    assert first.end() is None
    assert content(folder / "out") == expected


def test_a_work_folder_that_an_ended_merge_removes_before_the_lock_is_made_is_made_again(
    folder, monkeypatch
):
    expected, opened, removed = right(folder), os.open, []

    def too_late(path, *arguments, **options):
        if Path(path).name == _lock.LOCK and not removed:
            removed.append(Path(path).parent.rmdir())
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", too_late)
    run_merge(plan(folder), folder / "out")
    assert removed
    assert content(folder / "out") == expected


def test_a_system_without_file_locks_merges_too(folder, monkeypatch):
    expected = right(folder)
    monkeypatch.setattr(_lock, "_fcntl", None)
    run_merge(plan(folder), folder / "out")
    assert content(folder / "out") == expected


def test_a_lock_without_a_readable_holder_is_respected(folder):
    work = folder / ".out.partial"
    with _lock.alone(work, folder / "out"):
        (work / _lock.LOCK).write_text("[]")
        with pytest.raises(BlockingIOError, match=r"another merge to it is at work$"):
            run_merge(plan(folder), folder / "out")


def test_a_run_whose_note_was_damaged_is_made_again(folder, monkeypatch):
    expected = right(folder)
    run = left_by_a_stop(folder, monkeypatch)
    (run / "merge.json").write_text("{")
    run_merge(plan(folder), folder / "out")
    assert content(folder / "out") == expected


def test_a_file_that_grows_while_it_is_copied_is_an_error(folder):
    path = folder / "base" / "config.json"
    copied = _stamp.unchanged_chunks(path, _stamp.stamps_at([path])[path])
    next(copied)
    with path.open("ab") as file:
        file.write(b" ")
    with pytest.raises(CheckpointError, match=r"config\.json: changed since"):
        list(copied)


def test_a_merge_that_ends_before_the_lock_is_taken_is_noticed_before_any_work(folder, monkeypatch):
    lock, names = _lock._lock, merged_shards(monkeypatch)

    def late(file):
        (folder / "out").mkdir()
        lock(file)

    monkeypatch.setattr(_lock, "_lock", late)
    with pytest.raises(FileExistsError, match=r"out: already exists; --force replaces it$"):
        run_merge(plan(folder), folder / "out")
    assert names == []
    assert not (folder / ".out.partial").exists()


def test_an_out_that_appears_meanwhile_is_kept(folder):
    appeared = []

    def appear(_):
        if not appeared:
            appeared.append((folder / "out").mkdir())

    with pytest.raises(FileExistsError, match=r"out: already exists; --force replaces it$"):
        run_merge(plan(folder), folder / "out", on_bytes=appear)
    assert content(folder / "out") == {}


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_out_that_appears_at_the_last_moment_is_kept(folder, monkeypatch, is_folder):
    """Between the last look at OUT and the rename."""
    if not is_folder:
        as_one_file(folder)
    run_merge(plan(folder), folder / "mine")
    appears_before_the_last_rename(folder, monkeypatch)
    with pytest.raises(FileExistsError, match=APPEARED):
        run_merge(plan(folder), folder / "out")
    assert not (folder / "mine").exists()


def test_an_out_that_appears_where_another_was_replaced_is_kept(folder, monkeypatch):
    run_merge(plan(folder, "other"), folder / "out")
    run_merge(plan(folder), folder / "mine")
    expected = content(folder / "mine")
    appears_before_the_last_rename(folder, monkeypatch)
    with pytest.raises(FileExistsError, match=APPEARED):
        run_merge(plan(folder, "other"), folder / "out", force=True)
    assert content(folder / "out") == expected
    monkeypatch.undo()
    run_merge(plan(folder), folder / "out", force=True)
    assert content(folder / "out") == expected
    assert not (folder / ".out.partial").exists()


APPEARED = r"out: appeared when the merge was complete; remove it, or choose another OUT$"


def appears_before_the_last_rename(folder, monkeypatch):
    """Let ``mine`` become OUT just before the result does."""
    rename, mine, out = _target._rename_to_new, folder / "mine", folder / "out"
    number = mine.stat().st_ino

    def appear_and_rename(*paths):
        mine.rename(out)
        try:
            rename(*paths)
        finally:
            assert out.stat().st_ino == number

    monkeypatch.setattr(_target, "_rename_to_new", appear_and_rename)


def test_a_file_is_merged_where_there_are_no_links(folder, monkeypatch):
    """As on many USB sticks."""

    def unsupported(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    as_one_file(folder)
    run_merge(plan(folder), folder / "with links")
    monkeypatch.setattr(os, "link", unsupported)
    run_merge(plan(folder), folder / "out")
    assert (folder / "out").read_bytes() == (folder / "with links").read_bytes()


def as_one_file(folder):
    """Replace the base by one safetensors file."""
    base = {name: x for shard in SHARDS for name, x in load_file(folder / "base" / shard).items()}
    shutil.rmtree(folder / "base")
    save_file(base, folder / "base")


@pytest.mark.parametrize("spoilt", ["cut", "grown", "gone", "without notes"])
def test_out_needs_every_shard_in_its_full_size_with_its_notes(folder, monkeypatch, spoilt):
    def spoil(merge, model):
        shard = model / SHARDS[1]
        if spoilt in ("cut", "grown"):
            os.truncate(shard, shard.stat().st_size + (8 if spoilt == "grown" else -8))
        elif spoilt == "gone":
            shard.unlink()
        else:
            (model.parent / "notes" / f"{SHARDS[1]}.json").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(_run, "copy_others", spoil)
        with pytest.raises(OSError, match=SHARDS[1]):
            run_merge(plan(folder), folder / "out")
    assert not (folder / "out").exists()
    assert merge(folder, "--verify") == 0
    assert content(folder / "out") == right(folder)


# BASE and ADAPTER stand still

FILES = [
    *(f"base/{name}" for name in (*SHARDS, "config.json", "model.safetensors.index.json")),
    "base/tokenizer/vocab.txt",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
]


def replace(path):
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    stat = path.stat()
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` does
    new.replace(path)


def rewrite(path):
    stat, raw = path.stat(), bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `rsync --inplace -t` may


CHANGES = {
    "replaced": replace,
    "rewritten": rewrite,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 2),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 2),
    "touched": lambda path: os.utime(path),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("way", CHANGES)
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_changes_after_the_plan_is_an_error_that_names_it(
    folder, monkeypatch, file, way, moment
):
    planned, done = plan(folder), []

    def change(*_):
        if not done:
            done.append(CHANGES[way](folder / file))

    if moment == "before":
        change()
    elif moment == "after":
        copy = _run.copy_others
        monkeypatch.setattr(_run, "copy_others", lambda *args: (copy(*args), change()))
    with pytest.raises((CheckpointError, OSError)) as raised:
        run_merge(planned, folder / "out", verify=True, on_bytes=change)
    assert done
    assert str(folder / file) in str(raised.value)
    if way != "removed":
        assert "changed since it was first read; run the same command" in str(raised.value)
    assert not (folder / "out").exists()


def test_the_error_of_a_changed_file_is_one_line(folder, capsys, monkeypatch):
    path = folder / "base" / SHARDS[0]
    copy = _run.copy_others
    monkeypatch.setattr(_run, "copy_others", lambda *args: (copy(*args), os.utime(path)))
    assert merge(folder) == 2
    expected = f"{path}: changed since it was first read; run the same command again"
    assert capsys.readouterr().err == f"doraxp merge: error: {expected}\n"
    monkeypatch.undo()
    assert merge(folder) == 0
    assert content(folder / "out") == right(folder)


@pytest.mark.parametrize("way", ["touched", "removed", "appeared"])
@pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "vocab.txt"])
def test_a_file_that_changes_while_the_merge_is_planned_is_an_error(folder, monkeypatch, name, way):
    path = next(path for path in folder.rglob(name) if "other" not in path.parts)
    raw, load = path.read_bytes(), _merge.load_adapters
    if way == "appeared":
        path.unlink()

    def change(adapter, **choice):
        adapters = load(adapter) if name.startswith("adapter") and way == "removed" else None
        path.write_bytes(raw) if way == "appeared" else CHANGES[way](path)
        return adapters or load(adapter, **choice)

    monkeypatch.setattr(_merge, "load_adapters", change)
    if name == "vocab.txt" and way != "removed":
        plan(folder)  # it is read later
    else:
        with pytest.raises(CheckpointError, match=f"{name}: changed since"):
            plan(folder)


def test_a_shard_that_changes_while_its_header_is_read_is_an_error(folder, monkeypatch):
    path = folder / "base" / SHARDS[0]
    safe_open = _safetensors.safe_open

    def replaced(file, **options):
        replace(path)
        return safe_open(file, **options)

    monkeypatch.setattr(_safetensors, "safe_open", replaced)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: changed since"):
        Reader(path)


def test_a_file_that_is_cut_while_a_tensor_is_read_is_an_error(folder, monkeypatch):
    path = folder / "base" / SHARDS[0]
    reader, stamp_of = Reader(path), _safetensors.stamp_of

    def cut(file):
        stamp = stamp_of(file)
        os.truncate(path, 400)
        return stamp

    monkeypatch.setattr(_safetensors, "stamp_of", cut)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: changed since"):
        reader.read("block.0.q.weight")


def test_a_file_that_changes_while_a_tensor_is_read_is_an_error(folder):
    path = folder / "base" / SHARDS[0]

    class Changing(np.ndarray):
        def reshape(self, *shape):
            os.utime(path)  # the file is open, and has been compared
            return super().reshape(*shape)

    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: changed since"):
        Reader(path).read("block.0.q.weight", empty=lambda *x: np.empty(*x).view(Changing))
    chunks = Reader(path).chunks("block.0.q.weight")
    next(chunks)
    os.utime(path)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: changed since"):
        next(chunks)


def test_a_file_that_changes_before_or_while_it_is_copied_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    stamp = _stamp.stamps_at([path])[path]
    chunks = _stamp.unchanged_chunks(path, stamp)
    assert bytes(next(chunks)) == b"content"
    os.utime(path)
    with pytest.raises(CheckpointError, match="file: changed since"):
        next(chunks)
    with pytest.raises(CheckpointError, match="file: changed since"):
        next(_stamp.unchanged_chunks(path, stamp))


@pytest.mark.parametrize("nanoseconds", [1, 10**9])
def test_a_stamp_has_the_time_to_the_nanosecond_and_the_inode(tmp_path, nanoseconds):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    os.utime(path, ns=(0, 10**18 + 5))
    before = _stamp.stamps_at([path])[path]
    assert (before.size, before.inode) == (len(b"content"), path.stat().st_ino)
    os.utime(path, ns=(0, 10**18 + 5 + nanoseconds))
    assert before.mtime_ns == 10**18 + 5
    assert _stamp.stamps_at([path])[path].mtime_ns == 10**18 + 5 + nanoseconds


@pytest.mark.parametrize(("fraction", "tick"), [(5, 0.02), (0, 2.0)])
@pytest.mark.parametrize("age", [0, 0.25, 0.75, 1, 1.5, -1])
def test_a_file_is_read_when_a_later_change_would_have_another_time(
    tmp_path, monkeypatch, fraction, tick, age
):
    path, slept = tmp_path / "file", []
    path.write_bytes(b"content")
    os.utime(path, ns=(0, 10**18 + fraction))
    monkeypatch.setattr(time, "time_ns", lambda: 10**18 + fraction + int(age * tick * 1e9))
    monkeypatch.setattr(time, "sleep", slept.append)
    _stamp.stamps_at([path])
    assert slept == ([pytest.approx((1 - age) * tick)] if 0 <= age < 1 else [])


def test_a_reader_from_another_host_knows_the_file_by_size_time_and_header(folder):
    """File systems may give a file another number on each host."""
    path = folder / "base" / SHARDS[0]
    here = Reader(path)
    expected, sent = here.read("block.0.q.weight"), pickle.dumps(here)
    replace(path)
    there = pickle.loads(sent)
    np.testing.assert_array_equal(there.read("block.0.q.weight"), expected)
    with pytest.raises(CheckpointError, match="changed since"):
        here.read("block.0.q.weight")
    replace(path)
    with pytest.raises(CheckpointError, match="changed since"):
        there.read("block.0.q.weight")  # it is on this host now


def other_header(path):
    stat, tensors = path.stat(), load_file(path)
    save_file(dict(reversed(tensors.items())), path, {"format": "np"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        other_header,
        lambda path: os.truncate(path, path.stat().st_size + 2),
        lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
    ],
)
def test_a_reader_from_another_host_refuses_a_file_that_differs(folder, change):
    path = folder / "base" / SHARDS[0]
    there = pickle.loads(pickle.dumps(Reader(path)))
    change(path)
    with pytest.raises(CheckpointError, match="changed since"):
        there.read("block.0.q.weight")


def test_the_error_of_a_changed_file_keeps_its_kind_on_its_way_from_a_worker(folder):
    path = folder / "base" / SHARDS[0]
    reader = Reader(path)
    os.utime(path)
    with pytest.raises(CheckpointError) as raised:
        reader.read("block.0.q.weight")
    sent = pickle.loads(pickle.dumps(raised.value))
    assert (type(sent), str(sent)) == (type(raised.value), str(raised.value))


@pytest.mark.parametrize("name", ["block.0.{}.weight", "base_model.model.block.0.{}.lora_A.weight"])
def test_verify_takes_no_place_of_a_tensor_from_the_plan(folder, name):
    planned = plan(folder)
    (reader,) = (x for x in planned.readers if name.format("q") in x.tensors)
    reader._starts[name.format("k")] = reader._starts[name.format("q")]
    run_merge(planned, folder / "unverified")
    with pytest.raises(CheckpointError, match=r"block\.0\.k\.weight is not the result of a dense"):
        run_merge(planned, folder / "out", verify=True)


# Resumed shards are earned


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)


def edit_header(path):
    tensors = load_file(path)
    save_file(tensors, path, {"format": "np"})


def edit_notes(**changes):
    def edit(shard):
        path = shard.parents[1] / "notes" / f"{shard.name}.json"
        write_json(path, json.loads(path.read_bytes()) | changes)

    return edit


SPOILT = {
    "a bit": flip,
    "the end": lambda path: os.truncate(path, 500),
    "bytes after the end": lambda path: os.truncate(path, path.stat().st_size + 8),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "metadata": edit_header,
    "gone": Path.unlink,
    "size in the notes": edit_notes(size=1),
    "digest in the notes": edit_notes(digest="0"),
    "changes in the notes": edit_notes(changes=[]),
    "notes of another kind": lambda path: (
        path.parents[1] / "notes" / f"{path.name}.json"
    ).write_text("[]"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_finished_shard_that_is_not_as_its_notes_say_is_made_again(folder, monkeypatch, spoil):
    expected = right(folder)
    changes = run_merge(plan(folder), folder / "first")
    run = left_by_a_stop(folder, monkeypatch)
    names = merged_shards(monkeypatch)
    spoil(run / "model" / SHARDS[1])
    assert run_merge(plan(folder), folder / "out") == changes
    assert names == [SHARDS[1]]
    assert content(folder / "out") == expected


def test_finished_shards_that_are_right_are_not_made_again(folder, monkeypatch):
    expected = right(folder)
    changes = run_merge(plan(folder), folder / "first")
    left_by_a_stop(folder, monkeypatch)
    names, verified, verify_shard = merged_shards(monkeypatch), [], _run.verify_shard

    def verify(merge, name, target):
        verified.append(name)
        verify_shard(merge, name, target)

    monkeypatch.setattr(_run, "verify_shard", verify)
    assert run_merge(plan(folder), folder / "out", verify=True) == changes
    assert names == []
    assert verified == list(SHARDS)
    assert content(folder / "out") == expected


def test_finished_shards_survive_a_change_of_a_file_that_they_do_not_depend_on(folder, monkeypatch):
    path, copy = folder / "base" / "config.json", _run.copy_others
    with monkeypatch.context() as patch:
        patch.setattr(_run, "copy_others", lambda *args: (copy(*args), os.utime(path)))
        with pytest.raises(CheckpointError, match=r"config\.json: changed since"):
            run_merge(plan(folder), folder / "out")
    names = merged_shards(monkeypatch)
    run_merge(plan(folder), folder / "out")
    assert names == []
    assert content(folder / "out") == right(folder)


def other_scale(folder):
    path = folder / "adapter" / "adapter_config.json"
    text = path.read_text()
    assert "3.0" in text
    path.write_text(text.replace("3.0", "5.0"))


BETWEEN = {
    "version": lambda folder: setattr(doraxp, "__version__", "another"),
    "adapter": lambda folder: rewrite(folder / "adapter" / "adapter_model.safetensors"),
    "configuration": other_scale,
    "base": lambda folder: rewrite(folder / "base" / SHARDS[1]),
    "another base": lambda folder: replace(folder / "base" / SHARDS[1]),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN)
def test_shards_of_another_version_or_other_files_are_made_again(folder, monkeypatch, change):
    monkeypatch.setattr(doraxp, "__version__", doraxp.__version__)
    left_by_a_stop(folder, monkeypatch)
    change(folder)
    names = merged_shards(monkeypatch)
    assert merge(folder, "--verify") == 0
    assert names == list(SHARDS)
    assert content(folder / "out") == right(folder)


@pytest.mark.parametrize("arguments", [["--dtype", "float16"], ["--compute", "float32"]])
def test_shards_of_other_options_are_made_again(folder, monkeypatch, arguments):
    left_by_a_stop(folder, monkeypatch, *arguments)
    names = merged_shards(monkeypatch)
    assert merge(folder) == 0
    assert names == list(SHARDS)
    assert content(folder / "out") == right(folder)


def test_a_file_that_base_no_longer_has_is_not_in_out(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    (folder / "base" / "notes.md").write_text("of before")
    with monkeypatch.context() as patch:
        patch.setattr(_run, "check_complete", stop)
        assert merge(folder) == 130
    (folder / "base" / "notes.md").unlink()
    assert merge(folder) == 0
    assert content(folder / "out") == right(folder)


def test_the_unfinished_shards_of_a_killed_merge_are_removed(folder, monkeypatch):
    run = left_by_a_stop(folder, monkeypatch)
    (run / "unfinished" / f"{SHARDS[0]}.01234567").write_bytes(b"half of a shard")
    names = merged_shards(monkeypatch)
    run = left_by_a_stop(folder, monkeypatch)
    assert names == []
    assert list((run / "unfinished").iterdir()) == []


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_work_folder_with_files_of_others_is_kept(folder, capsys, dry):
    work = folder / ".out.partial"
    (work / "thesis").mkdir(parents=True)
    (work / "thesis" / "thesis.tex").write_text("mine")
    before = content(folder)
    assert merge(folder, "--force", *dry) == 2
    assert f"{work / 'thesis'}: is not of a merge, but in the folder in which one" in (
        capsys.readouterr().err
    )
    assert content(folder) == before


def test_base_is_kept_where_it_has_the_name_of_the_work_folder(folder):
    base = (folder / "base").rename(folder / ".out.partial")
    before = content(base)
    planned = plan_merge(base, folder / "adapter", NO_OPTIONS)
    with pytest.raises(CheckpointError, match="must not contain BASE or ADAPTER"):
        run_merge(planned, folder / "out")
    assert content(base) == before


def test_two_tasks_for_one_shard_do_not_disturb_each_other(folder, monkeypatch):
    """Dask begins a second one where it thinks that a worker is dead."""
    run = left_by_a_stop(folder, monkeypatch)
    remove(run / "model" / SHARDS[0])
    planned, unlink, second = plan(folder), Path.unlink, []

    def unlink_and_wait(path, **options):
        unlink(path, **options)
        if path.suffix == ".json" and not second:
            second.append(path)
            _run.finish_shard(planned, run, SHARDS[0], True)

    monkeypatch.setattr(Path, "unlink", unlink_and_wait)
    changes = _run.finish_shard(planned, run, SHARDS[0], True)
    assert second
    assert _work.noted(SHARDS[0], _work.places(run, SHARDS[0]), planned) == changes
    assert [*(run / "unfinished").iterdir()] == []


def test_a_shard_takes_its_name_when_it_and_its_notes_are_on_the_disk(folder, monkeypatch):
    steps, fsync, replace = [], os.fsync, Path.replace

    def sync(file):
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        steps.append(("sync", path if path.is_dir() else path.parent))
        fsync(file)

    def rename(self, target):
        steps.append(("rename", target.parent))
        return replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to know the file of a descriptor")
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    run_merge(plan(folder), folder / "out")
    run = next(path for step, path in steps if step == "rename").parent
    shard = [
        *(("sync", run / "unfinished"), ("sync", run / "unfinished")),
        *(("rename", run / "notes"), ("rename", run / "model"), ("sync", run / "model")),
    ]
    first = steps.index(shard[0])
    assert steps[first : first + 10] == 2 * shard


STEPS = {
    os: ("open", "fsync", "mkdir", "link", "unlink", "rmdir"),
    Path: ("mkdir", "open", "rename", "replace", "unlink"),
    shutil: ("rmtree",),
    _shard._Output: ("write",),
}


@contextlib.contextmanager
def stopped_at(step):
    """Raise KeyboardInterrupt before the step of this number; yield the list of steps."""
    steps = []

    def counted(function):
        def run(*args, **kwargs):
            if len(steps) == step:
                raise KeyboardInterrupt
            steps.append(function)
            return function(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in STEPS.items():
            for name in names:
                patch.setattr(owner, name, counted(getattr(owner, name)))
        yield steps


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_merge_that_stops_at_any_step_leaves_no_wrong_out_and_goes_on(folder, force, is_folder):
    """As a kill would, but the lock is opened."""
    if not is_folder:
        as_one_file(folder)
    out = folder / "out"
    for adapter, name in (("adapter", "new"), ("other", "old")):
        run_merge(plan(folder, adapter), folder / name)
    expected, old = content(folder / "new"), content(folder / "old")

    def prepare():
        for path in (folder / ".out.partial", out):
            if path.exists():
                remove(path)
        if force:
            (shutil.copytree if is_folder else shutil.copyfile)(folder / "old", out)

    prepare()
    planned = plan(folder)
    with stopped_at(None) as steps:
        run_merge(planned, out, force=force)
    assert len(steps) > 30
    for step in range(len(steps)):
        prepare()
        with contextlib.suppress(KeyboardInterrupt), stopped_at(step):
            run_merge(planned, out, force=force)
        there = content(out) if out.exists() else None
        assert there in (expected, old if force else None, None), step
        if there != expected:
            run_merge(planned, out, force=force)
        assert content(out) == expected, step
        assert not (folder / ".out.partial" / "model").exists()


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_merge_that_is_killed_while_it_clears_up_can_run_again(folder, monkeypatch, is_folder):
    if not is_folder:
        as_one_file(folder)

    def remove_a_part(path, *_):
        (path / "unfinished").rmdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_a_part)
        with pytest.raises(KeyboardInterrupt):
            run_merge(plan(folder), folder / "out")
    expected = content(folder / "out")
    remove(folder / "out")
    run_merge(plan(folder), folder / "out")
    assert content(folder / "out") == expected
    assert not (folder / ".out.partial").exists()


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


# The digest


def digest(raw, size):
    result = Digest()
    for start in range(0, len(raw), size):
        result.update(memoryview(raw)[start : start + size])
    return result.hexdigest()


RAW = np.random.default_rng(0).bytes(5 * PIECE + 13)


def test_the_digest_does_not_depend_on_the_address():
    results = []
    for start in (0, 1):
        memory = bytearray(len(RAW) + start)
        memory[start:] = RAW
        result = Digest()
        result.update(memoryview(memory)[start:])
        results.append(result.hexdigest())
    assert results[0] == results[1]


def test_the_digests_do_not_depend_on_the_turns_of_tensors():
    one, other, apart = Digests(), Digests(), Digests()
    half = len(RAW) // 2
    for digests, turns in ((one, "aabb"), (other, "abba"), (apart, "aab")):
        left = {"a": [RAW[:half], RAW[half:]], "b": [RAW[half:], RAW[:half]]}
        for name in turns:
            digests.update(name, memoryview(left[name].pop(0)))
    assert one.hexdigest("ab") == other.hexdigest("ab")
    assert one.hexdigest("ab") != one.hexdigest("ba")
    assert one.hexdigest("ab") != apart.hexdigest("ab")


@pytest.mark.parametrize("size", [1, 7, 1000, PIECE, PIECE + 6, 3 * PIECE, 1 << 20])
def test_the_digest_does_not_depend_on_the_size_of_blocks(size):
    assert digest(RAW, size) == digest(RAW, len(RAW))


def swapped(raw):
    return raw[PIECE : 2 * PIECE] + raw[:PIECE] + raw[2 * PIECE :]


@pytest.mark.parametrize(
    "spoil",
    [
        swapped,
        lambda raw: raw[:-1],
        lambda raw: raw[: 4 * PIECE],
        lambda raw: raw + b"\0",
        lambda raw: raw[:PIECE] + bytes(PIECE) + raw[2 * PIECE :],
        lambda raw: raw[:9] + bytes([raw[9] ^ 128]) + raw[10:],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    ],
)
def test_the_digest_finds_the_faults_of_disks(spoil):
    assert digest(spoil(RAW), 1000) != digest(RAW, 1000)


# Targets, modes and links


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_the_files_of_out_have_the_mode_of_new_files(folder, umask):
    """Those of BASE may be read-only, or private."""
    files = [path for path in (folder / "base").rglob("*") if path.is_file()]
    for path, mode in zip(files, [0o444, 0o600, 0o755] * 3, strict=False):
        path.chmod(mode)
    before = os.umask(umask)
    try:
        assert merge(folder, "--dtype", "float16") == 0
    finally:
        os.umask(before)
    for path in [folder / "out", *(folder / "out").rglob("*")]:
        new = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == new & ~umask, path


def test_a_merge_goes_on_where_a_read_only_copy_was_left(folder, monkeypatch):
    run = left_by_a_stop(folder, monkeypatch)
    left = run / "model" / "config.json"
    left.write_text("{}")
    left.chmod(0o444)
    before = left.stat().st_ino
    assert merge(folder) == 0
    assert content(folder / "out") == right(folder)
    new = folder / "out" / "config.json"
    assert new.stat().st_mode & 0o200
    assert new.stat().st_ino != before or new.read_text() != "{}"


@pytest.fixture
def cached(folder):
    """BASE as the hub's client keeps it: each file is a link to a blob."""
    base, root = folder / "base", folder / "hub"
    blobs, snapshot = root / "blobs", root / "snapshots" / "main"
    blobs.mkdir(parents=True)
    for path in sorted(path for path in base.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / path.name
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(base)
    base.symlink_to(snapshot)
    return folder


def test_links_to_files_are_merged_and_copied_as_files(cached):
    assert merge(cached, "--verify") == 0
    assert not any(path.is_symlink() for path in (cached / "out").rglob("*"))
    copied = (cached / "out" / "tokenizer" / "vocab.txt").read_bytes()
    assert copied == (cached / "hub" / "blobs" / "vocab.txt").read_bytes()


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_link_that_leads_to_another_file_later_is_an_error(cached, name):
    planned, link = plan(cached), cached / "base" / name
    blob = link.resolve()
    shutil.copy2(blob, blob.with_name("new"))
    link.unlink()
    link.symlink_to(os.path.relpath(blob.with_name("new"), link.parent.resolve()))
    with pytest.raises(CheckpointError, match=f"{name}: changed since"):
        run_merge(planned, cached / "out")


def test_a_link_that_leads_to_another_file_while_it_is_opened_anew_is_an_error(cached, monkeypatch):
    link, header = cached / "base" / SHARDS[0], _safetensors._checked_header
    reader, other = Reader(link), cached / "hub" / "blobs" / "new"
    shutil.copy2(link.resolve(), other)

    def switched(path):
        link.unlink()
        link.symlink_to(other)
        return header(path)

    monkeypatch.setattr(_safetensors, "_checked_header", switched)
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: changed since"):
        reader.reopened()


def test_a_link_that_leads_to_no_file_is_refused(cached, capsys):
    (cached / "hub" / "blobs" / "vocab.txt").unlink()
    assert merge(cached) == 2
    assert "tokenizer/vocab.txt: this link leads to no file; remove it" in capsys.readouterr().err
    assert not (cached / "out").exists()


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_shard_that_could_not_be_written(folder, capsys, monkeypatch):
    monkeypatch.setattr(_shard._Output, "write", full)
    assert merge(folder) == 2
    error = capsys.readouterr().err
    assert f"/unfinished/{SHARDS[0]}." in error
    assert error.endswith(
        ": No space left on device; the same merge goes on from the shards that are finished\n"
    )
    assert str(folder / "base") not in error


@pytest.mark.parametrize("name", ["merge.json", f"{SHARDS[0]}.*.json", "config.json", "vocab.txt"])
def test_a_full_disk_names_the_other_file_that_could_not_be_written(
    folder, capsys, monkeypatch, name
):
    kind = Path.open

    def opened(self, mode="r", *args, **kwargs):
        if not self.match(name) or "x" not in mode:
            return kind(self, mode, *args, **kwargs)
        self.touch()
        return open("/dev/full", "wb")

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        assert merge(folder) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    path, _, problem = error.partition(": No space left on device")
    assert problem.startswith("; the same merge goes on from the shards")
    assert Path(path).match(name)
    assert ".out.partial/" in path
    assert merge(folder) == 0


@pytest.mark.parametrize("name", [f"base/{SHARDS[1]}", "adapter/adapter_model.safetensors"])
def test_a_disk_that_cannot_be_read_names_the_file(folder, monkeypatch, name):
    fill, planned = _safetensors.fill, plan(folder)

    def broken(file, buffer, path):
        if path == folder / name:
            raise OSError(errno.EIO, "Input/output error")
        fill(file, buffer, path)

    monkeypatch.setattr(_safetensors, "fill", broken)
    monkeypatch.setattr(_stamp, "fill", broken)
    with pytest.raises(OSError, match=f"{folder / name}: Input/output error; the same merge"):
        run_merge(planned, folder / "out")


def test_an_error_without_a_file_keeps_the_name_on_its_way_from_a_worker():
    with pytest.raises(OSError, match="No space") as raised, _run.named("file"):
        full()
    assert pickle.loads(pickle.dumps(raised.value)).filename == "file"


def project(out):
    run_merge_of = {"w": np.ones(3, np.float32)}
    out.mkdir()
    save_file(run_merge_of, out / "model.safetensors")
    write_json(out / "config.json", {})


def with_file(name):
    def make(out):
        project(out)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("years of work")

    return make


def with_link(out):
    project(out)
    (out / "data").symlink_to(out.parent / "adapter")


def two_models(out):
    project(out)
    shutil.copyfile(out / "model.safetensors", out / "flux.safetensors")


def without_a_shard(out):
    project(out)
    index = {"weight_map": {"w": "model.safetensors", "v": "lost.safetensors"}}
    write_json(out / "model.safetensors.index.json", index)


def only_a_page(out):
    out.mkdir()
    (out / "README.md").write_text("mine")


KEPT = {
    ".git": (with_file(".git/config"), "out/.git/config: is not a file of a model"),
    "thesis": (with_file("thesis.tex"), "out/thesis.tex: is not a file of a model"),
    "a folder": (with_file("code/config.json"), "out/code/config.json: is not a file of a model"),
    "notes": (with_file("results.json"), "out/results.json: is not a file of a model"),
    "a link": (with_link, "out/data: is not a file of a model"),
    "a tokenizer": (with_file("tokenizer_thesis.tex"), "tokenizer_thesis.tex: is not a file of a"),
    "two models": (two_models, "must have model.safetensors.index.json or one safetensors file"),
    "a text": (with_file("model.safetensors"), "model.safetensors: not a safetensors file"),
    "a lost shard": (without_a_shard, "out/lost.safetensors: no such file"),
    "a page": (only_a_page, "out: has no safetensors file"),
    "a file": (lambda out: out.write_text("mine"), "out: OUT must be a folder, as BASE is, but is"),
    "a pipe": (os.mkfifo, "out: OUT must be a folder, as BASE is, but is a file"),
}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(("make", "message"), KEPT.values(), ids=KEPT)
def test_force_replaces_nothing_but_a_model(folder, capsys, make, message, dry):
    make(folder / "out")
    before = content(folder)
    assert merge(folder, "--force", *dry) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "; --force replaces only a model; choose another OUT" in error
    assert error.count("\n") == 1
    assert content(folder) == before
    assert not (folder / ".out.partial").exists()


def test_force_replaces_a_model_that_another_tool_wrote(folder):
    project(folder / "out")
    for name in (
        "tokenizer_config.json",
        "README.md",
        "chat_template.jinja",
        "tokenizer/vocab.txt",
    ):
        (folder / "out" / name).parent.mkdir(exist_ok=True)
        (folder / "out" / name).write_text("of before")
    assert merge(folder, "--force") == 0
    assert content(folder / "out") == right(folder)


@pytest.mark.parametrize("what", ["empty", "safetensors", "text", "cut", "link", "pipe"])
def test_a_file_is_replaced_only_if_it_is_a_model_or_empty(tmp_path, capsys, what):
    rng = np.random.default_rng(1)
    base = {f"{path}.weight": draw(rng, *shape) for path, shape in SHAPES.items()}
    save_file(base, tmp_path / "base")
    adapter, out = write_adapter(tmp_path / "adapter"), tmp_path / "out"
    if what == "link":
        (tmp_path / "mine").write_text("kept")
        out.symlink_to(tmp_path / "mine")
    elif what == "pipe":
        os.mkfifo(out)
    else:
        raw = (tmp_path / "base").read_bytes()
        out.write_bytes({"empty": b"", "safetensors": raw, "text": b"mine", "cut": raw[:-9]}[what])
    if what in ("text", "cut", "pipe"):
        assert merge(tmp_path, "--force") == 2
        assert "out: is not a safetensors file; --force replaces only" in capsys.readouterr().err
        return
    assert merge(tmp_path, "--force") == 0
    merged = load_file(out)["block.0.q.weight"]
    desired = dense(base["block.0.q.weight"], *adapter["block.0.q"])
    np.testing.assert_allclose(merged, desired, rtol=1e-6)
    assert what != "link" or (tmp_path / "mine").read_text() == "kept"


def test_a_file_that_is_put_into_out_meanwhile_is_kept(folder):
    project(folder / "out")
    mine = folder / "out" / "thesis.tex"

    with pytest.raises(FileExistsError, match=r"thesis\.tex: is not a file of a model"):
        run_merge(
            plan(folder), folder / "out", force=True, on_bytes=lambda _: mine.write_text("mine")
        )
    assert mine.read_text() == "mine"
    mine.unlink()
    assert merge(folder, "--force") == 0


def test_the_old_out_comes_back_if_the_new_one_cannot_take_its_place(folder, monkeypatch):
    old, rename = right(folder, "other"), Path.rename
    run_merge(plan(folder, "other"), folder / "out")

    def fails(self, target):
        if target == folder / "out" and self.name == "model":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        run_merge(plan(folder), folder / "out", force=True)
    assert content(folder / "out") == old


def test_the_old_out_is_there_until_the_new_one_is(folder, monkeypatch):
    """A merge is killed between its two renames, and the next one, of another adapter, fails."""
    old, rename = right(folder, "other"), Path.rename
    run_merge(plan(folder, "other"), folder / "out")

    def killed(self, target):
        if target == folder / "out":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run_merge(plan(folder), folder / "out", force=True)
    assert not (folder / "out").exists()
    with pytest.raises(FileExistsError, match="already exists"):
        run_merge(plan(folder), folder / "out")
    assert content(folder / "out") == old
    with monkeypatch.context() as patch:
        patch.setattr(_shard._Output, "write", full)
        assert merge(folder, "--force", "--dtype", "float16") == 2
    assert content(folder / "out") == old
    assert merge(folder, "--force") == 0
    assert content(folder / "out") == right(folder)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("base/out", "OUT must not be in BASE"),
        ("adapter", "OUT and its work folder must not contain BASE or ADAPTER"),
        ("none/out", "no such folder"),
        ("out.safetensors", "OUT must be a folder, as BASE is"),
        ("other", "already exists; --force replaces it"),
    ],
)
def test_a_dry_run_refuses_what_the_merge_refuses(folder, capsys, out, message):
    errors = []
    for more in ([], ["--dry-run"]):
        paths = [str(folder / name) for name in ("base", "adapter")]
        assert main(["merge", *paths, "--out", str(folder / out), *more]) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1]
    assert message in errors[0]
    with pytest.raises((CheckpointError, OSError), match=message):
        check_target(plan(folder), folder / out)


# Verification


def test_verify_compares_the_metadata(folder, monkeypatch):
    def spoil(merge, shard, target, *args):
        yield from _shard.merge_shard(merge, shard, target, *args)
        edit_header(target)

    monkeypatch.setattr(_run, "merge_shard", spoil)
    with pytest.raises(CheckpointError, match=r"the tensors are not those of .*base/model-1"):
        run_merge(plan(folder), folder / "out", verify=True)


@pytest.mark.parametrize("row", range(16))
@pytest.mark.parametrize(("dtype", "error"), [("float16", 3 * 2**-10), ("float32", 2e-4)])
def test_verify_compares_every_row_of_a_small_matrix(tmp_path, monkeypatch, row, dtype, error):
    """And finds an error of 3 units of float16's last place, where 1 is allowed."""
    rng = np.random.default_rng(1)
    save_file({"block.0.q.weight": draw(rng, 16, 5, dtype=dtype)}, tmp_path / "base")
    write_adapter(tmp_path / "adapter", {"block.0.q": (16, 5)})
    shapes = []

    def spoil(merge, shard, target, *args):
        yield from _shard.merge_shard(merge, shard, target, *args)
        weight = load_file(target)["block.0.q.weight"]
        column = np.argmax(np.abs(weight[row]))
        weight[row, column] *= weight.dtype.type(1 + error)
        shapes.append(weight.shape)
        with target.open("r+b") as file:
            file.seek(-weight.nbytes, io.SEEK_END)
            file.write(weight.tobytes())

    monkeypatch.setattr(_run, "merge_shard", spoil)
    with pytest.raises(CheckpointError, match=r"block\.0\.q\.weight is not the result of a dense"):
        run_merge(
            plan_merge(tmp_path / "base", tmp_path / "adapter", Options()),
            tmp_path / "out",
            verify=True,
        )
    assert shapes == [(16, 5)]


def test_verify_compares_sixteen_rows_of_a_large_matrix(tmp_path):
    rng = np.random.default_rng(1)
    save_file({"block.0.q.weight": draw(rng, 91, 5)}, tmp_path / "base")
    write_adapter(tmp_path / "adapter", {"block.0.q": (91, 5)})
    planned = plan_merge(tmp_path / "base", tmp_path / "adapter", Options())
    out, found = tmp_path / "out", []
    run_merge(planned, out)
    merged = load_file(out)
    for row in range(91):
        spoilt = merged["block.0.q.weight"].copy()
        spoilt[row] *= 2
        save_file({"block.0.q.weight": spoilt}, out)
        os.utime(out, ns=(0, 1))  # a file that is old is read at once
        try:
            verify_shard(planned, "base", out)
        except CheckpointError:
            found.append(row)
    assert found == list(range(0, 91, 6))


# benchmarks/merge_hazards.py


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("merge_hazards")


def test_random_disturbances_leave_no_wrong_out():
    command = [sys.executable, "benchmarks/merge_hazards.py", "--races", "6", "--changes", "6"]
    ended = subprocess.run(
        [*command, "--kills", "6"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    for kind in ("races", "changes", "kills"):
        assert f"{kind}: 6, 0 wrong" in ended.stdout


@pytest.mark.parametrize(
    ("files", "state", "right"),
    [
        ({"1": b"a", "2": b"a"}, "OUT of a", True),
        ({"1": b"b", "2": b"b"}, "OUT of b", True),
        ({"1": b"a", "2": b"b"}, "OUT is mixed or garbage", False),
        ({"1": b"a"}, "OUT lacks 1 files", False),
        ({"1": b"a", "2": b"a", "3": b""}, "OUT is mixed or garbage", False),
        (None, "no OUT", True),
    ],
)
def test_the_script_knows_a_wrong_out(script, tmp_path, files, state, right):
    truths = {name: dict.fromkeys("12", name.encode()) for name in "ab"}
    for name, raw in (files or {}).items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(raw)
    assert script.judged(tmp_path / "out", truths) == (state, right)


def test_the_script_ends_with_1_after_a_wrong_out(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["merge_hazards.py", "--changes", "0", "--kills", "0"])
    monkeypatch.setattr(script, "SHARDS", (2,))
    monkeypatch.setattr(
        script, "races", named("races", lambda model, rng, tally: tally.add("mixed", right=False))
    )
    assert script.main() == 1
    assert "races: 500, 500 wrong\n    500  WRONG: mixed" in capsys.readouterr().out


def named(name, function):
    function.__name__ = name
    return function
