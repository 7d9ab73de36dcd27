"""The folder ``.OUT.partial`` beside OUT, in which a merge works until its result is complete.

::

    .OUT.partial/
        lock                the process that works for OUT
        3f0c…/              the run folder, with a name of its own for each run
            merge.json      the version, the options and the files that the run is of
            model/          finished shards, then the other files: this becomes OUT
            notes/          of each finished shard: its size, its digest, its changes
            unfinished/     shards and notes that are being written
            ….replaced      the OUT of before, until the new one stands

A run that goes on from the shards of an earlier one gives its folder a new name. A worker of the
earlier run, which may live on at another machine, then fails when it opens or renames a file: the
paths that it knows are gone. So it cannot spoil the result, even where files cannot be locked.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import doraxp
from doraxp._base.safetensors import write_header
from doraxp.checkpoint._adapters import config_path
from doraxp.checkpoint._change import Change
from doraxp.checkpoint._digest import Digests
from doraxp.checkpoint._durable import sync, write_durably
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._lock import LOCK
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._safetensors import Reader

REPLACED = ".replaced"
_DISCARDED = ".discarded"
_RUN = "[0-9a-f]" * 32


class Shard(NamedTuple):
    """The places of one shard in a run folder."""

    unfinished: Path
    """Has a name of its own for each attempt: a worker that was thought dead may write on."""
    done: Path
    notes: Path


def work_folder(out: Path) -> Path:
    """Return the path of the folder in which a merge works."""
    return out.parent / f".{out.name}.partial"


def stranger_in(work: Path) -> Path | None:
    """Return the path of something in a work folder that no merge has put there."""
    own = (LOCK, _RUN, f"{_RUN}{_DISCARDED}")
    for path in sorted(work.glob("*")):
        if not any(fnmatch.fnmatchcase(path.name, name) for name in own):
            return path
    return None


def places(run: Path, name: str) -> Shard:
    """Return the places of one shard."""
    flat = name.replace("/", "+")
    return Shard(
        run / "unfinished" / f"{flat}.{uuid.uuid4().hex[:8]}",
        run / "model" / name,
        run / "notes" / f"{flat}.json",
    )


def start_or_resume(run: Path, merge: Merge) -> None:
    """Make the folder of a new run, with the shards of an earlier run of the same merge.

    All else in the work folder is removed.
    """
    fingerprint = _fingerprint(merge)
    for earlier in sorted(run.parent.glob("*")):
        with contextlib.suppress(FileNotFoundError):  # a merge without a lock took it
            if earlier.match(_RUN) and not run.exists() and _is_of(earlier, fingerprint):
                earlier.rename(run)
            elif earlier.name != LOCK:
                discard(earlier)
    if run.exists():
        _keep_shards(run, merge)
        return
    run.mkdir(parents=True)  # a merge without a lock may have ended, and removed the work folder
    for folder in ("model", "notes", "unfinished", *_folders(merge)):
        (run / folder).mkdir()  # not `run` again, if a merge without a lock took it
    write_durably(run / "merge.json", json.dumps(fingerprint).encode())


def _fingerprint(merge: Merge) -> JsonObject:
    """Return everything on which a finished shard depends, in the types of JSON."""
    stamps = {reader.path: reader.stamp for reader in merge.readers}
    configs = [config_path(adapters.reader) for adapters in merge.adapters]
    stamps |= {config: merge.stamps[config] for config in configs if config in merge.stamps}
    # The dtype and the blocks of a quantised weight may be in BASE's configuration alone.
    formats = repr(sorted(merge.model.quantised.items())).encode()
    return {
        "doraxp": doraxp.__version__,
        "options": vars(merge.options),
        "quantised": hashlib.blake2b(formats, digest_size=16).hexdigest(),
        "adapters": [[str(one.path), *one[1:]] for one in merge.given],
        "fit": json.loads(json.dumps(vars(merge.fit))),
        "files": [[str(path.resolve()), *stamp] for path, stamp in stamps.items()],
    }


def _is_of(run: Path, fingerprint: JsonObject) -> bool:
    """Return True for the folder of a run of the same merge.

    A merge that was killed after its last rename has no ``model`` there any more: it is OUT.
    """
    with contextlib.suppress(OSError, ValueError):
        return (run / "model").is_dir() and read_json(run / "merge.json") == fingerprint
    return False


def _keep_shards(run: Path, merge: Merge) -> None:
    """Remove unfinished shards, and copies of files that the base may no longer have."""
    for file in (run / "unfinished").iterdir():
        file.unlink()
    model = run / "model"
    kept = {model / name for name in merge.model.shards} | {run / path for path in _folders(merge)}
    for folder in (model, *(run / path for path in _folders(merge))):
        for file in folder.iterdir():
            if file not in kept:
                discard(file)


def _folders(merge: Merge) -> list[str]:
    """Return the folders of shards that are not in the model's own folder: those of a pipeline."""
    return sorted(
        {f"model/{name.rpartition('/')[0]}" for name in merge.model.shards if "/" in name}
    )


def discard(path: Path) -> None:
    """Remove a folder or file; a worker that still writes there fails at once."""
    gone = path.with_name(f"{uuid.uuid4().hex}{_DISCARDED}")
    path.rename(gone)
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone, True)
    else:
        gone.unlink()


def put_back(work: Path, out: Path) -> None:
    """Rename an OUT to its place again, if a merge was killed when it had moved it away."""
    with contextlib.suppress(FileNotFoundError):  # a merge without a lock took the folder
        for replaced in work.glob(f"*/*{REPLACED}"):
            if not os.path.lexists(out):
                replaced.rename(out)


def note(shard: Shard, digest: str, changes: Mapping[str, Change]) -> None:
    """Give a shard that has been written its name in the result, and keep notes of it.

    Its bytes and the notes are on the disk before.
    """
    notes = {"size": shard.unfinished.stat().st_size, "digest": digest, "changes": changes}
    written = shard.unfinished.with_name(f"{shard.unfinished.name}.json")
    write_durably(written, json.dumps(notes).encode())
    written.replace(shard.notes)
    shard.unfinished.replace(shard.done)
    sync(shard.done.parent)


def noted(name: str, shard: Shard, merge: Merge) -> dict[str, Change] | None:
    """Return the changes of a finished shard; None unless it is as its notes say."""
    reader = merge.model.shards[name]
    try:
        notes = json.loads(shard.notes.read_bytes())
        result, digests = Reader(shard.done), Digests()
        entries = list(merge.entries(name).items())
        if list(result.tensors.items()) != entries or result.metadata != reader.metadata:
            return None
        for name in result.tensors:
            for raw in result.chunks(name):
                digests.update(name, raw)
        digest = digests.hexdigest(result.tensors)
        if [notes["size"], notes["digest"]] != [shard.done.stat().st_size, digest]:
            return None
        return {name: Change(*values) for name, values in notes["changes"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a power cut may leave anything


def check_complete(run: Path, merge: Merge) -> None:
    """Raise OSError unless every shard is there, in its full size, and has its notes."""
    for name, reader in merge.model.shards.items():
        shard, header = places(run, name), io.BytesIO()
        write_header(header, merge.entries(name), reader.metadata)
        size, planned = shard.done.stat().st_size, header.tell() + merge.shard_size(name)
        if size != planned:
            raise OSError(f"{shard.done}: must have {planned} bytes, has {size}")
        shard.notes.stat()
