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
from doraxp.checkpoint._audit_quantised import audit_quantised
from doraxp.checkpoint._audit_sum import audit_sum
from doraxp.checkpoint._audit_weight import KEPT_IN_PART, Verdict, audit_weight
from doraxp.checkpoint._engine import Engine, load_engine
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._model import Model, open_model
from doraxp.checkpoint._quantised.reader import QuantisedReader, quantised_in
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._shard import OnBytes
from doraxp.checkpoint._tasks import (
    CopiedTensor,
    JoinedTensor,
    MergedTensor,
    Part,
    SummedTensor,
    parts_of,
)
from doraxp.checkpoint._tied import is_head, tied_head

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
    heads = {name for name, (source, _) in pairs.items() if source != name}
    if merge.was_tied:
        heads |= {name for name in pairs if is_head(name)}
    for name in heads:
        if not found[name].right and found[name].verdict != KEPT_IN_PART:
            detail = f"{found[name].verdict}: {found[name].detail}".removesuffix(": ")
            found[name] = found[name]._replace(verdict="tied head changed", detail=detail)
    order = [*(name for name in merge.tasks if name in found), *found]
    return {name: found[name] for name in dict.fromkeys(order)}


def _pair(merge: Merge, model: Model) -> tuple[dict[str, tuple[str, Source]], dict[str, Verdict]]:
    """Return the task's name and the file's tensor by tensor, and the verdicts on those alone."""
    there = model.sources()
    lead = _lead(set(merge.tasks), set(there))
    tied = tied_head(there.keys(), model.config)
    theirs = {lead(name): lead(source) for name, source in tied.sources.items()} if tied else {}
    there = {lead(name): source for name, source in there.items()}
    pairs = {name: (name, there[name]) for name in merge.tasks if name in there}
    found = {}
    for name in [name for name in merge.tasks if name not in there]:
        if theirs.get(name) in there:
            pairs[name] = (name, there[theirs[name]])  # the embedding is the head too
        else:
            found[name] = _missing(name, merge.tasks[name].source.tensor)
    tied = tied_head(merge.tasks.keys(), merge.model.config)
    ours = tied.sources if tied else {}
    for name in [name for name in there if name not in merge.tasks]:
        if name in ours:
            pairs[name] = (ours[name], there[name])
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


def _lead(base: Set[str], merged: Set[str]) -> Callable[[str], str]:
    """Return a function from a merged tensor's name to the base's.

    A model with a head and the model without it differ by one leading name. All names of the model
    without it must lack it; the head itself may have it or not.
    """

    def leads(names: Set[str]) -> list[str]:
        counts = Counter(name.partition(".")[0] for name in names)
        return [f"{lead}." for lead, _ in counts.most_common(2)]

    body = [name for name in merged if not is_head(name)]
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
    """Return the verdict on a tensor: that of the first part that is not right."""
    task = merge.tasks[name]
    parts = parts_of(task)
    if not isinstance(task, JoinedTensor):
        return _part_verdict(merge, name, parts[0], stored, engine, on_bytes)
    if stored.tensor.shape != task.source.tensor.shape:
        on_bytes(task.source.tensor.nbytes)
        shapes = f"{stored.tensor.shape} for {task.source.tensor.shape}"
        return Verdict("another shape", False, shapes)
    verdicts, start, stored = [], 0, stored.like(parts[0].source)
    for part in parts:
        stop = start + part.source.tensor.shape[0]
        found = _part_verdict(merge, name, part, stored.rows(start, stop), engine, on_bytes)
        if not found.right:
            place = f"rows {start} to {stop - 1}"
            detail = f"{place}: {found.detail}" if found.detail else place
            found = found._replace(detail=detail)
        verdicts.append(found)
        start = stop
    wrong = [verdict for verdict in verdicts if not verdict.right]
    kept = [verdict.kept for verdict in verdicts if verdict.kept is not None]
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    worst = min(wrong or verdicts, key=lambda verdict: verdict.verdict in ("equal", "converted"))
    return worst._replace(kept=min(kept, default=None), error=max(errors, default=None))


def _part_verdict(
    merge: Merge, name: str, part: Part, stored: Source, engine: Engine, on_bytes: OnBytes
) -> Verdict:
    tensor = part.source.tensor
    if stored.tensor.dtype != tensor.dtype and not (
        {stored.tensor.dtype, tensor.dtype} <= DTYPES.keys()
    ):
        on_bytes(tensor.nbytes)
        return Verdict("another dtype", False, f"{stored.tensor.dtype} for {tensor.dtype}")
    weight = quantised_in(stored)
    if weight is not None and not _is_in_same_format(part, weight):
        return audit_quantised(name, part, stored, weight, engine, on_bytes)
    if isinstance(part, MergedTensor):
        return audit_weight(name, part, stored, part.read(), engine, on_bytes)
    if isinstance(part, SummedTensor):
        return audit_sum(name, part, stored, engine, on_bytes)
    return Copy(merge, name, part, stored, engine).verdict(on_bytes)


def _is_in_same_format(part: Part, weight: QuantisedReader) -> bool:
    """Return whether a part is a copy of a weight that the base has in the same format."""
    own = quantised_in(part.source)
    return (
        isinstance(part, CopiedTensor)
        and isinstance(part.source, Source)
        and part.source.window is None  # else other rows may have changed the scales
        and own is not None
        and own.quantisation.label == weight.quantisation.label
    )
