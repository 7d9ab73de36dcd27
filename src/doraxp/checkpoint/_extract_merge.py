"""`approximate`: what a merge does to each weight, as one adapter of a given rank.

W* is the merged weight, which no file has: each pass over it computes it anew, block by block.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._engine import load_engine
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._extract_model import Extraction, extracted
from doraxp.checkpoint._extract_plan import relative_change
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._names import WRAPPERS, without
from doraxp.checkpoint._options import Options, merge_dtype
from doraxp.checkpoint._pair import Block
from doraxp.checkpoint._rows import merged_blocks
from doraxp.checkpoint._safetensors import AnySource
from doraxp.checkpoint._tasks import (
    Changed,
    MergedTensor,
    Part,
    Task,
    merged_in,
    parts_of,
    read_terms,
)
from doraxp.checkpoint._tied import tied_head


class MergedPair(NamedTuple):
    """A weight before and after a merge, as matrices."""

    name: str
    base: AnySource
    parts: tuple[Part, ...]
    kind: LayerKind

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of both."""
        out, inner = self.kind.matrix_shape(self.base.tensor.shape)
        return out, inner

    def blocks(self) -> Iterator[Block]:
        """Read W and compute W* once. Where the weight is stored (in, out), a block has columns."""
        (out, inner), start = self.shape, 0
        engine = load_engine("numpy")
        for part in self.parts:
            tensor = part.source.tensor
            if isinstance(part, Changed):
                dtype = merge_dtype(tensor, tensor, Options())
                stream = merged_blocks(self.name, part.source, read_terms(part), engine, dtype)
                pairs = ((block.rows, block.weight, block.merged) for block in stream)
            else:  # rows of a fused tensor that no adapter changes
                blocks = ((rows, part.source.read(rows)) for rows in row_blocks(tensor.shape))
                pairs = ((rows, own, own) for rows, own in blocks)
            for rows, before, after in pairs:
                place = slice(start + rows.start, start + rows.stop)
                if self.kind.is_transposed:
                    yield Block(slice(0, out), place, before.T, after.T)
                else:
                    yield Block(place, slice(0, inner), before, after)
            start += tensor.shape[0]

    def fault(self) -> str:
        """Return the tensor whose numbers nothing can be computed with."""
        return f"{self.base.reader.path}: {self.name} has values too large to square"


def approximate(
    merge: Merge,
    rank: int,
    *,
    method: Literal["dora", "lora"] = "dora",
    jobs: int = 1,
    on_bytes: Callable[[int, int], object] = lambda done, total: None,
) -> Extraction:
    """Return one adapter whose merge is near that of `merge`: of one adapter, or of a sum.

    Parameters
    ----------
    merge : Merge
        From `plan_merge`.
    rank : int
        Of each module; at most min(out, in). alpha is the same number, so s = 1.
    method : {"dora", "lora"}
        With m, or plain LoRA: the truncated SVD of the change of each weight.
    jobs, on_bytes
        As in `extract`.

    Raises
    ------
    CheckpointError
        A weight has NaN or infinity, or nothing that the merge changes is a matrix.
    OSError
        A file cannot be read.
    ValueError
        The rank is below 1.
    """
    pairs, left_out = {}, {}
    named = {name: task for name, task in merge.changed.items() if _is_matrix(task)}
    paths = _paths(merge, named)
    for name, task in merge.changed.items():
        if name in named:
            pairs[paths[name]] = MergedPair(name, task.source, parts_of(task), _kind(task))
        else:
            left_out[name] = _relative_change(name, task, merge)
    left_out = {name: change for name, change in left_out.items() if change > 0}
    found = extracted(pairs, rank, method, jobs, on_bytes, left_out)
    if not found.adapters:
        files = " and ".join(str(one.path) for one in merge.given)
        raise CheckpointError(
            f"{files}: the change by them is 0 in each matrix and convolution of BASE, so there is "
            "nothing to approximate"
        )
    return found


def _relative_change(name: str, task: Task, merge: Merge) -> float:
    """Return ‖W' − W‖ / ‖W‖ of a tensor; infinity for a new one or one of another size."""
    base = merge.model.sources().get(name)
    tied = tied_head(merge.model.sources().keys(), merge.model.config)
    if base is None and tied is not None and name in tied.sources:
        base = merge.model.sources()[tied.sources[name]]  # a head of its own, as the embeddings
    if base is None or base.tensor.shape != task.source.tensor.shape:
        return math.inf
    change = size = 0.0
    start, engine = 0, load_engine("numpy")
    for part in parts_of(task):
        tensor = part.source.tensor
        if isinstance(part, Changed):
            dtype = merge_dtype(tensor, tensor, Options())
            for block in merged_blocks(name, part.source, read_terms(part), engine, dtype):
                change += float(np.sum((block.merged - block.weight).astype(np.float64) ** 2))
                size += float(np.sum(block.weight.astype(np.float64) ** 2))
        elif len(parts_of(task)) == 1:
            return relative_change(base, part.source)
        else:
            own = base.rows(start, start + tensor.shape[0])
            for rows in row_blocks(tensor.shape):
                before, after = (one.read(rows).astype(np.float64) for one in (own, part.source))
                change, size = change + np.sum((after - before) ** 2), size + np.sum(before**2)
        start += tensor.shape[0]
    return math.sqrt(change / size) if size else math.inf


def _is_matrix(task: Task) -> bool:
    """Return whether adapters change a tensor that one adapter can change.

    A stack of experts has an adapter for each of them.
    """
    parts = [one for part in parts_of(task) for one in merged_in(part)]
    shape = task.source.tensor.shape
    return bool(parts) and all(len(one.layer.shape) == len(shape) for one in parts)


def _kind(task: Task) -> LayerKind:
    """Return the kind of the weight: its rows are the outputs, whatever the norms were over."""
    kinds = {one.layer.kind for part in parts_of(task) for one in merged_in(part)}
    transposed = [kind for kind in kinds if kind.name in ("transposed", "embedding")]
    if transposed:
        return transposed[0]
    return LayerKind("conv" if len(task.source.tensor.shape) > 2 else "linear")


def _paths(merge: Merge, named: Mapping[str, Task]) -> dict[str, str]:
    """Return the module of each tensor: PEFT's own where one module of a file is one tensor.

    PEFT has the names of modules in memory, which may differ from those of the base's file.
    """
    paths = {name: name.removesuffix(".weight") for name in named}
    if len(merge.adapters) > 1 or not merge.adapters[0].format.startswith(("peft", "torchtune")):
        return paths
    own = {
        name: without(WRAPPERS, merge.fit.renamed(task.path))
        for name, task in named.items()
        if isinstance(task, MergedTensor)
    }
    once = {path for path, count in Counter(own.values()).items() if count == 1}
    return paths | {name: path for name, path in own.items() if path in once}
