"""Disturb merges at random moments: `python benchmarks/merge_hazards.py`.

    python benchmarks/merge_hazards.py [--races 500] [--changes 200] [--kills 200] [--seed 0]

- A race is two merges to one OUT at once, in two processes, half of them begun almost together. One
  may go on from a killed merge, and in some races files cannot be locked, as on some network file
  systems.
- A change is a file of BASE or ADAPTER that is replaced, rewritten, cut, grown, touched or removed
  while a merge runs. The same merge then runs again.
- A kill ends a merge by SIGKILL, up to four times, and the merge goes on, at times with another
  version of doraxp, other options or another adapter.

Each OUT must be equal, file by file, to that of a merge that nothing disturbs. The exit status is 1
if one is not. It needs a system with fork, and takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

import doraxp
from doraxp.checkpoint import CheckpointError, Options, plan_merge, run_merge

SHARDS, WIDTH = (2, 5, 12, 40), 48
COMPLETE, AT_WORK, EXISTS, CHANGED, FAILED = range(5)
"""Exit statuses of a process that merges."""


class Job(NamedTuple):
    """One merge, and how it runs."""

    folder: Path
    adapter: str = "a"
    dtype: str | None = None
    version: str = doraxp.__version__
    verify: bool = False
    force: bool = False
    jobs: int = 1
    locks: bool = True


class Tally:
    """The outcomes of one kind of disturbance."""

    def __init__(self, name: str) -> None:
        self.name, self.wrong, self._counts = name, 0, Counter[str]()

    def add(self, outcome: str, *, right: bool) -> None:
        """Count an outcome."""
        self._counts[outcome if right else f"WRONG: {outcome}"] += 1
        self.wrong += not right

    def print(self) -> None:
        """Print each outcome and its number."""
        print(f"{self.name}: {self._counts.total()}, {self.wrong} wrong")
        for outcome, count in sorted(self._counts.items(), key=lambda item: -item[1]):
            print(f"  {count:5}  {outcome}", flush=True)


def main() -> int:
    """Disturb merges in three ways, and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in (("races", 500), ("changes", 200), ("kills", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    arguments = parser.parse_args()
    rng, wrong = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        models = [write(Path(folder) / str(shards), shards) for shards in SHARDS]
        for disturb in (races, changes, kills):
            tally = Tally(disturb.__name__)
            for _ in range(getattr(arguments, tally.name)):
                model = rng.choice(models)
                disturb(model, rng, tally)
                clear(model)
            tally.print()
            wrong += tally.wrong
    return 1 if wrong else 0


def write(folder: Path, shards: int) -> Path:
    """Write a model, three adapters and a copy of it all; return the folder."""
    base, rng, weight_map = folder / "base", np.random.default_rng(shards), {}
    base.mkdir(parents=True)
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        tensors = {
            f"layers.{i}.q.weight": rng.standard_normal((WIDTH, WIDTH), np.float32),
            f"layers.{i}.norm.weight": rng.standard_normal(WIDTH, np.float32),
        }
        save_file(tensors, base / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ["a", "b"]}}))
    for seed, adapter in enumerate(("a", "b")):
        write_adapter(folder / adapter, shards, seed)
    shutil.copytree(folder, folder.with_name(f"{folder.name}-copy"))
    return folder


def write_adapter(folder: Path, shards: int, seed: int) -> None:
    """Write an adapter of rank 4 in PEFT's format."""
    rng, tensors = np.random.default_rng(100 + seed), {}
    for i in range(shards):
        path = f"base_model.model.layers.{i}.q"
        tensors[f"{path}.lora_A.weight"] = rng.standard_normal((4, WIDTH), np.float32)
        tensors[f"{path}.lora_B.weight"] = rng.standard_normal((WIDTH, 4), np.float32)
        tensors[f"{path}.lora_magnitude_vector"] = rng.random(WIDTH, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "use_dora": True, "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def clear(model: Path) -> None:
    """Remove OUT and what merges left beside it."""
    for name in ("out", ".out.partial"):
        shutil.rmtree(model / name, ignore_errors=True)


# Merges


def merge(job: Job, out: Path) -> None:
    """Merge in this process."""
    doraxp.__version__ = job.version
    options = Options(dtype=job.dtype)
    plan = plan_merge(job.folder / "base", job.folder / job.adapter, options)
    run_merge(plan, out, force=job.force, verify=job.verify, jobs=job.jobs)


def start(job: Job, delay: float = 0) -> int:
    """Merge to ``out`` in another process, after `delay` seconds; return its number."""
    process = os.fork()
    if process:
        return process
    status = FAILED
    try:
        if not job.locks:
            fcntl.flock = unsupported
        time.sleep(delay)
        merge(job, job.folder / "out")
        status = COMPLETE
    except BlockingIOError:
        status = AT_WORK
    except FileExistsError:
        status = EXISTS
    except (CheckpointError, OSError) as error:
        # A file that is removed, or is cut before its header is read, is named too.
        status = CHANGED if str(job.folder) in str(error) else FAILED
    finally:
        os._exit(status)


def unsupported(*_: object) -> None:
    """Stand for `flock` on a file system without locks."""
    raise OSError(errno.ENOTSUP, "Operation not supported")


def end(process: int) -> int:
    """Wait for a process; return its exit status, or -9 after a kill."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


TRUTHS: dict[tuple[object, ...], tuple[dict[str, bytes], float]] = {}


def undisturbed(job: Job) -> tuple[dict[str, bytes], float]:
    """Return the files of a merge that nothing disturbs, and its seconds."""
    key = (job.folder, job.adapter, job.dtype)
    if key not in TRUTHS:
        begun = time.perf_counter()
        TRUTHS[key] = fresh(job), time.perf_counter() - begun
    return TRUTHS[key]


def fresh(job: Job) -> dict[str, bytes]:
    """Merge the files as they are now, beside ``out``; return those of the result."""
    target = job.folder / "undisturbed"
    try:
        merge(job._replace(version=doraxp.__version__), target)
        return content(target)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def judged(out: Path, right: dict[str, dict[str, bytes]]) -> tuple[str, bool]:
    """Return the name of the right result that OUT is; False if OUT is there and is another."""
    if not out.exists():
        return "no OUT", True
    files = content(out)
    found = [name for name, truth in right.items() if truth == files]
    if found:
        return f"OUT of {found[0]}", True
    missing = next(iter(right.values())).keys() - files.keys()
    return f"OUT lacks {len(missing)} files" if missing else "OUT is mixed or garbage", False


# Disturbances


def races(model: Path, rng: random.Random, tally: Tally) -> None:
    """Run two merges to one OUT."""
    one = Job(
        model,
        verify=rng.random() < 0.5,
        force=rng.random() < 0.3,
        jobs=rng.choice((1, 2)),
        locks=rng.random() < 0.7,
    )
    two = one._replace(adapter=rng.choice("ab"))
    truths = {f"adapter {job.adapter}": undisturbed(job)[0] for job in (one, two)}
    seconds = undisturbed(one)[1]
    if rng.random() < 0.4:  # there is a killed merge to go on from
        killed(start(one), rng.uniform(0, seconds))
    there = (model / "out").exists()
    apart = rng.choice((seconds, 0.05 * seconds))
    processes = [start(one), start(two, rng.uniform(0, apart))]
    ends = [end(process) for process in processes]
    state, right = judged(model / "out", truths)
    losers = [status for status in ends if status != COMPLETE]
    # With --force, or where the second merge began late, both may be complete, one by one.
    said = {AT_WORK: "said that another is at work", EXISTS: "said that OUT exists"}
    known = all(status in said for status in losers)
    alone = len(losers) == 1 or (one.force and not losers) or (there and not one.force)
    without = "" if one.locks else ", no locks"
    loser = "; ".join(said.get(status, f"exit {status}") for status in losers) or "both complete"
    whole = right and state != "no OUT"
    tally.add(
        f"{'whole OUT' if whole else state}; {loser}{without}", right=whole and known and alone
    )


def killed(process: int, delay: float) -> bool:
    """Kill a process after some seconds; return False if it had ended."""
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    return end(process) == -signal.SIGKILL


def replaced(path: Path) -> None:
    """Put another file of the same size and time at the path."""
    new, stat = path.with_name("new"), path.stat()
    new.write_bytes(altered(path))
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.replace(path)


def rewritten(path: Path) -> None:
    """Write other bytes into the file, and set its time back."""
    stat = path.stat()
    raw = altered(path)
    with path.open("r+b") as file:
        file.write(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def altered(path: Path) -> bytes:
    """Return the file's bytes, all of the last half different; a text only gets spaces."""
    raw = path.read_bytes()
    if path.suffix == ".json":
        return raw.replace(b", ", b" ,")
    half = len(raw) // 2
    return raw[:half] + bytes(octet ^ 1 for octet in raw[half:])


WAYS: dict[str, Callable[[Path], object]] = {
    "replaced": replaced,
    "rewritten": rewritten,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 8),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 8),
    "touched": os.utime,
    "removed": Path.unlink,
}


def changes(model: Path, rng: random.Random, tally: Tally) -> None:
    """Change a file while a merge runs, and then run the same merge again."""
    job = Job(model, verify=rng.random() < 0.5, jobs=rng.choice((1, 2)))
    before, seconds = undisturbed(job)
    files = [path for name in ("base", "a") for path in sorted((model / name).iterdir())]
    way, path = rng.choice(list(WAYS)), rng.choice(files)
    process = start(job)
    time.sleep(rng.uniform(0, 1.1 * seconds))
    WAYS[way](path)
    status = end(process)
    truths = {"the files of before": before} | now(job)
    state, right = judged(model / "out", truths)
    right &= (status == COMPLETE) == (state != "no OUT") and status in (COMPLETE, CHANGED)
    outcome = "error, no OUT" if status == CHANGED else f"exit {status}, {state}"
    if right and status == CHANGED:
        again = end(start(job))
        state, right = judged(model / "out", now(job))
        right &= again in (COMPLETE, CHANGED)
        outcome += f"; again: {state if again == COMPLETE else 'error'}"
    tally.add(f"{way}: {outcome}", right=right)
    for name in ("base", "a"):
        shutil.rmtree(model / name)
        shutil.copytree(model.with_name(f"{model.name}-copy") / name, model / name)


def now(job: Job) -> dict[str, dict[str, bytes]]:
    """Return the result for the files as they are now, if there is one."""
    with contextlib.suppress(CheckpointError, OSError):
        return {"the files of now": fresh(job)}
    return {}


def kills(model: Path, rng: random.Random, tally: Tally) -> None:
    """Kill a merge up to four times, and then let it end."""
    ways: list[Callable[[Job], Job]] = [
        lambda job: job,
        lambda job: job._replace(version=rng.choice(("other", doraxp.__version__))),
        lambda job: job._replace(dtype=rng.choice((None, "F16", "BF16"))),
        lambda job: job._replace(adapter=rng.choice("ab")),
    ]
    job, changed, outcome, wrong = Job(model, jobs=rng.choice((1, 2))), 0, "", False
    for _ in range(rng.randint(1, 4)):
        truth, seconds = undisturbed(job)
        there = (model / "out").exists()
        if not killed(start(job._replace(force=there)), rng.uniform(0, 1.1 * seconds)):
            shutil.rmtree(model / "out", ignore_errors=True)  # it had ended
        state, right = judged(model / "out", {"the killed merge": truth})
        wrong |= not right
        outcome = state if wrong else outcome
        if (model / "out").exists():
            shutil.rmtree(model / "out")
        if rng.random() < 0.5:
            job, changed = rng.choice(ways)(job), changed + 1
    status = end(start(job._replace(verify=rng.random() < 0.5)))
    state, right = judged(model / "out", {"the last merge": undisturbed(job)[0]})
    right &= status == COMPLETE and not wrong
    between = "something else in between" if changed else "the same merge"
    tally.add(f"{between}: {outcome or state}", right=right)


if __name__ == "__main__":
    sys.exit(main())
