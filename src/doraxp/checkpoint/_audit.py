"""`audit`: compare a merged model, whoever made it, with its base and its adapter.

Each tensor is read once, block of rows by block of rows. A merged weight is compared with the merge
that doraxp would write. A tensor that differs from it is looked at again, on a sample of rows.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import threadpoolctl

from doraxp._base.types import HostArray
from doraxp.checkpoint._audit_weight import KEPT_IN_PART, Verdict, adapted_norms, audit_weight
from doraxp.checkpoint._engine import Engine, load_engine
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._model import Model, open_model
from doraxp.checkpoint._plan import CopiedTensor, MergedTensor, ReplacedTensor
from doraxp.checkpoint._rows import row_blocks
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._shard import OnBytes
from doraxp.checkpoint._suspects import Slack, over


def audit(
    merge: Merge,
    merged: str | os.PathLike[str],
    *,
    jobs: int = 1,
    on_bytes: OnBytes = lambda count: None,
) -> dict[str, Verdict]:
    """Return a verdict on each tensor of a merged model.

    Parameters
    ----------
    merge : Merge
        From `plan_merge`: the base and the adapter. Its options do not matter.
    merged : path
        A file or a folder, in shards and dtypes of its own.
    jobs : int
        Tensors at a time, each in a thread.
    on_bytes : callable
        Called with numbers of bytes of the base that were audited, from any of the threads.

    Returns
    -------
    dict of str to Verdict
        By the names of the base's tensors; a tensor that only the merged model has follows.

    Raises
    ------
    CheckpointError
        A file is malformed, or a weight of the base contains NaN or infinity.
    OSError
        A file cannot be read.
    """
    model = open_model(Path(merged).absolute())
    pairs, found = _pair(merge, model)
    names, lock, stopped = iter(pairs), threading.Lock(), threading.Event()

    def count(nbytes: int) -> None:
        if stopped.is_set():
            raise InterruptedError("the audit was stopped")
        on_bytes(nbytes)

    def work() -> None:
        engine = load_engine("numpy")
        while True:
            with lock:
                name = next(names, None)
            if name is None:
                return
            source, stored = pairs[name]
            found[name] = _verdict(merge, source, stored, engine, count)

    with threadpoolctl.threadpool_limits(1), ThreadPoolExecutor(jobs) as pool:
        try:
            for task in as_completed([pool.submit(work) for _ in range(jobs)]):
                task.result()
        finally:
            stopped.set()
    for name, (source, _) in pairs.items():
        is_wrong = not found[name].right and found[name].verdict != KEPT_IN_PART
        if is_wrong and source != name:
            detail = f"{found[name].verdict}: {found[name].detail}".removesuffix(": ")
            found[name] = found[name]._replace(verdict="tied head changed", detail=detail)
    order = [*(name for name in merge.tasks if name in found), *found]
    return {name: found[name] for name in dict.fromkeys(order)}


def _pair(merge: Merge, model: Model) -> tuple[dict[str, tuple[str, Source]], dict[str, Verdict]]:
    """Return the task's name and the file's tensor by tensor, and the verdicts on those alone."""
    there = {name: Source(reader, name) for name, reader in model.reader_of().items()}
    lead = _lead(set(merge.tasks), set(there))
    there = {lead(name): source for name, source in there.items()}
    pairs = {name: (name, there[name]) for name in merge.tasks if name in there}
    found = {}
    tied = next(iter(sorted(map(lead, model.output_heads()))), "")
    for name in merge.tasks.keys() - there.keys():
        if _is_head(name) and tied in there:
            pairs[name] = (name, there[tied])  # the embedding is the head too
        else:
            found[name] = Verdict("missing", False)
    tied = next(iter(sorted(merge.model.output_heads())), "")
    for name in there.keys() - merge.tasks.keys():
        if _is_head(name) and tied:
            pairs[name] = (tied, there[name])
        else:
            found[name] = Verdict("extra", False)
    return pairs, found


def _is_head(name: str) -> bool:
    return f".{name}".endswith(".lm_head.weight")


def _lead(base: Set[str], merged: Set[str]) -> Callable[[str], str]:
    """Return a function from a merged tensor's name to the base's.

    A model with a head and the model without it differ by one leading name.
    """
    leads = [Counter(name.partition(".")[0] for name in names) for names in (base, merged)]
    ways: list[Callable[[str], str]] = [lambda name: name]
    ways += [partial(_with, f"{lead}.", base) for lead, _ in leads[0].most_common(2)]
    ways += [partial(_without, f"{lead}.") for lead, _ in leads[1].most_common(2)]
    found = [{way(name) for name in merged} for way in ways]
    shared = [len(base & one) if len(one) == len(merged) else 0 for one in found]
    return ways[shared.index(max(shared))]


def _without(lead: str, name: str) -> str:
    return name.removeprefix(lead)


def _with(lead: str, base: Set[str], name: str) -> str:
    return name if name in base else f"{lead}{name}"


def _verdict(merge: Merge, name: str, stored: Source, engine: Engine, on_bytes: OnBytes) -> Verdict:
    task = merge.tasks[name]
    if stored.tensor.dtype != task.source.tensor.dtype and not (
        {stored.tensor.dtype, task.source.tensor.dtype} <= DTYPES.keys()
    ):
        on_bytes(task.source.tensor.nbytes)
        dtypes = f"{stored.tensor.dtype} for {task.source.tensor.dtype}"
        return Verdict("another dtype", False, dtypes)
    if isinstance(task, MergedTensor):
        return audit_weight(name, task, stored, merge.adapters.read(task.layer), engine, on_bytes)
    return _Copy(merge, name, task, stored, engine).verdict(on_bytes)


class _Copy:
    """The audit of a tensor that should be a copy."""

    def __init__(
        self,
        merge: Merge,
        name: str,
        task: ReplacedTensor | CopiedTensor,
        stored: Source,
        engine: Engine,
    ) -> None:
        self._merge, self._name, self._engine = merge, name, engine
        self._task, self._source, self._stored = task, task.source, stored

    def verdict(self, on_bytes: OnBytes) -> Verdict:
        before, after = self._source.tensor, self._stored.tensor
        if before.shape != after.shape:
            on_bytes(before.nbytes)
            shapes = f"{after.shape} for {before.shape}"
            return Verdict("another shape", False, shapes)
        if self._is_equal(on_bytes):
            same = before.dtype == after.dtype
            return Verdict("equal" if same else "converted", True)
        changed = "changed" if isinstance(self._task, CopiedTensor) else "not the adapter's"
        if before.dtype not in DTYPES:
            return Verdict(changed, False)
        numbers = largest = 0.0
        for one, other in self._blocks():
            numbers += np.count_nonzero(one != other)
            with np.errstate(invalid="ignore"):
                difference = np.abs(other.astype(np.float64) - one)
            largest = max(largest, float(difference.max(initial=0.0)))
        detail = f"{int(numbers):,} numbers differ, by up to {largest:.3g}"
        if self._is_scaled():
            return Verdict("bias scaled", False, detail)
        return Verdict(changed, False, detail)

    def _is_equal(self, on_bytes: OnBytes) -> bool:
        before, after = self._source.tensor, self._stored.tensor
        equal = True
        if before.dtype == after.dtype:
            for one, other in zip(self._source.chunks(), self._stored.chunks(), strict=True):
                equal = equal and _same(one, other)
                on_bytes(len(one))
            return equal
        for rows, others in self._blocks():
            equal = equal and rows.tobytes() == others.tobytes()
        on_bytes(before.nbytes)
        return equal

    def _blocks(self) -> Iterator[tuple[HostArray, HostArray]]:
        """Yield the same rows of both, in the dtype of the merged file."""
        dtype = DTYPES[self._stored.tensor.dtype]
        shape = self._source.tensor.shape
        for rows in [None] if 0 in shape or not shape else row_blocks(shape):
            with np.errstate(over="ignore"):
                yield self._source.read(rows).astype(dtype), self._stored.read(rows)

    def _is_scaled(self) -> bool:
        """Return True if this is the bias of a module, multiplied by m / n."""
        weight = f"{self._name.removesuffix('bias')}weight"
        task = self._merge.tasks.get(weight)
        if not self._name.endswith(".bias") or not isinstance(task, MergedTensor):
            return False
        layer = self._merge.adapters.read(task.layer)
        norm = adapted_norms(weight, task, layer, self._engine)
        if self._source.tensor.shape != norm.shape:
            return False
        gain = over(np.asarray(layer.adapter.magnitude, np.float64), norm)
        scaled = gain * self._source.read().astype(np.float64)
        slack = Slack(layer, self._stored.tensor.dtype)
        # W' is gain V, and this is gain bias: the update has no part in it.
        bound = slack.bound(np.abs(scaled)[:, None], slice(None), norm, slice(0, 1))[:, 0]
        difference = np.abs(self._stored.read().astype(np.float64) - scaled)
        return bool((difference <= bound).all())


def _same(one: memoryview, other: memoryview) -> bool:
    """Return whether two pieces of memory of one length have the same bytes.

    Two memoryviews are compared byte by byte in Python's own loop, which takes ten times as long.
    """
    words = len(one) & -8
    return np.array_equal(
        np.frombuffer(one[:words], np.uint64), np.frombuffer(other[:words], np.uint64)
    ) and bool(one[words:] == other[words:])
