"""`audit`: compare a merged model, whoever made it, with its base and its adapter.

Each tensor is read once, block of rows by block of rows. A merged weight is compared with the merge
that doraxp would write. A tensor that differs from it is looked at again, on a sample of rows.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import threadpoolctl

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint._audit_copy import Copy
from doraxp.checkpoint._audit_weight import KEPT_IN_PART, Verdict, audit_weight
from doraxp.checkpoint._engine import Engine, load_engine
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._model import Model, open_model
from doraxp.checkpoint._plan import MergedTensor
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._shard import OnBytes

_BUFFERS = ("position_ids", "token_type_ids", "inv_freq", "original_inv_freq", "masked_bias")
"""Names of tensors that older versions of transformers wrote with the weights."""


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
    for name in [name for name in merge.tasks if name not in there]:
        if _is_head(name) and tied in there:
            pairs[name] = (name, there[tied])  # the embedding is the head too
        else:
            found[name] = _missing(name, merge.tasks[name].source.tensor)
    tied = next(iter(sorted(merge.model.output_heads())), "")
    for name in [name for name in there if name not in merge.tasks]:
        if _is_head(name) and tied:
            pairs[name] = (tied, there[name])
        else:
            found[name] = Verdict("extra", False)
    return pairs, found


def _missing(name: str, tensor: Tensor) -> Verdict:
    """Return the verdict on a tensor that the merged model lacks.

    The library of a model computes its buffers from the configuration, and the present versions of
    transformers write none of them.
    """
    *_, module, own = f"..{name}".split(".")
    is_mask = own == "bias" and module in ("attn", "attention") and len(tensor.shape) == 4
    if own in _BUFFERS or is_mask:
        return Verdict("left out", True, "a buffer that the model computes")
    return Verdict("missing", False)


def _is_head(name: str) -> bool:
    return f".{name}".endswith(".lm_head.weight")


def _lead(base: Set[str], merged: Set[str]) -> Callable[[str], str]:
    """Return a function from a merged tensor's name to the base's.

    A model with a head and the model without it differ by one leading name. All names of the model
    without it must lack it; the head itself may have it or not.
    """

    def leads(names: Set[str]) -> list[str]:
        counts = Counter(name.partition(".")[0] for name in names)
        return [f"{lead}." for lead, _ in counts.most_common(2)]

    body = [name for name in merged if not _is_head(name)]
    ways: list[Callable[[str], str]] = [lambda name: name]
    for lead in leads(base):
        if not any(name.startswith(lead) for name in body):
            ways.append(partial(_with, lead, base))
    for lead in leads(merged):
        if all(name.startswith(lead) for name in body):
            ways.append(partial(_without, lead))

    def shared(way: Callable[[str], str]) -> int:
        found = {way(name) for name in merged}
        return len(base & found) if len(found) == len(merged) else 0

    return max(ways, key=shared)


def _without(lead: str, name: str) -> str:
    return name.removeprefix(lead)


def _with(lead: str, base: Set[str], name: str) -> str:
    """Add the leading name, except to a tensor that lacks it in the base too."""
    return f"{lead}{name}" if f"{lead}{name}" in base or name not in base else name


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
    return Copy(merge, name, task, stored, engine).verdict(on_bytes)
