"""The tasks of a merge: the way in which each tensor of the result is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint._adapters import AdapterSet, StoredLayer
from doraxp.checkpoint._options import Options
from doraxp.checkpoint._quantised.reader import QuantisedReader, quantised_in
from doraxp.checkpoint._rows import Term
from doraxp.checkpoint._safetensors import DTYPES, AnySource, Source
from doraxp.checkpoint._updated_layer import UpdatedLayer


@dataclass(frozen=True)
class MergedTensor:
    """A weight that the adapter of a module is merged into."""

    source: Source
    """The weight before the merge: the base's, or one that the adapter's file has in full."""
    path: str
    """The module."""
    layer: StoredLayer
    """Its adapter, with the kind and the shape of the base's weight."""
    adapters: AdapterSet
    """The file that has it."""
    expert: int | None = None
    """The expert that it is for, where the module has several."""

    @property
    def label(self) -> str:
        """The name of the part in its tensor: the module, or the expert."""
        return self.path if self.expert is None else f"expert {self.expert}"

    def read(self) -> UpdatedLayer:
        """Read the adapter."""
        return self.adapters.read(self.layer)


@dataclass(frozen=True)
class ReplacedTensor:
    """A tensor that the adapter's file has in full, or that it adds to the base's."""

    source: AnySource
    """The tensor in the adapter's file, or the sum."""
    dtype: str
    """The base's dtype; that of the adapter's file where the base has no such tensor."""


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor that no adapter changes."""

    source: AnySource
    """The tensor in the base."""
    is_part: bool = False
    """Whether it is one of the tensors of a quantised weight, which keep their dtypes."""


@dataclass(frozen=True)
class SummedTensor:
    """A weight to which changes of several adapters are added, or a part of one change."""

    source: Source
    """The weight of the base."""
    terms: tuple[MergedTensor | ReplacedTensor, ...]
    strengths: tuple[float, ...]
    """How many times each change is added."""

    @property
    def label(self) -> str:
        """The name of the part in its tensor: the modules, or the expert."""
        names = (term.label for term in self.terms if isinstance(term, MergedTensor))
        return " + ".join(dict.fromkeys(names))

    def read(self) -> tuple[Term, ...]:
        """Read the adapters."""
        return tuple(
            Term(part.read() if isinstance(part, MergedTensor) else part.source, strength)
            for part, strength in zip(self.terms, self.strengths, strict=True)
        )


Changed: TypeAlias = MergedTensor | SummedTensor
"""A weight, or some rows of one, that adapters are merged into."""


def read_terms(part: Changed) -> tuple[Term, ...]:
    """Read the adapters of a part, with their strengths."""
    return part.read() if isinstance(part, SummedTensor) else (Term(part.read()),)


Part: TypeAlias = MergedTensor | SummedTensor | ReplacedTensor | CopiedTensor
"""The way in which some rows of a tensor are made."""


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor of the base that is made part by part, such as one of queries, keys and values."""

    source: AnySource
    """The tensor in the base."""
    parts: tuple[Part, ...]
    """They have all rows of the tensor, in order. The source of each part is a window."""


Task: TypeAlias = Part | JoinedTensor
"""The way in which one tensor of the result is made."""


@dataclass(frozen=True)
class RequantisedTensor:
    """The codes of a weight that is quantised again after its merge."""

    task: Task
    """The merge."""
    stored: QuantisedReader
    """The weight in the base: its format is that of the result."""

    @property
    def source(self) -> AnySource:
        """The weight before the merge."""
        return self.task.source


@dataclass(frozen=True)
class ScalesTensor:
    """A tensor beside the codes of a weight that is quantised again: written with them."""

    source: Source
    """The tensor in the base, which has the same shape and dtype."""


WrittenTask: TypeAlias = Task | RequantisedTensor | ScalesTensor
"""The way in which one tensor of a file of the result is written."""


def parts_of(task: Task) -> tuple[Part, ...]:
    """Return the parts of a task, from the first row to the last."""
    return task.parts if isinstance(task, JoinedTensor) else (task,)


def merged_in(part: Part) -> tuple[MergedTensor, ...]:
    """Return the merges that a part is made of."""
    terms = part.terms if isinstance(part, SummedTensor) else (part,)
    return tuple(one for one in terms if isinstance(one, MergedTensor))


def written_as(task: WrittenTask, options: Options) -> Tensor:
    """Return the entry that a tensor has in the result."""
    if isinstance(task, RequantisedTensor):
        codes = task.stored.quantisation.tensors[0]
        return task.stored.sources[codes].tensor
    tensor = task.source.tensor
    if isinstance(task, ScalesTensor) or (isinstance(task, CopiedTensor) and task.is_part):
        return tensor
    dtype = task.dtype if isinstance(task, ReplacedTensor) else tensor.dtype
    if quantised_in(task.source) is not None:
        dtype = "BF16"
    if options.dtype is not None and dtype in DTYPES:
        dtype = options.dtype
    if dtype == tensor.dtype:
        return tensor
    return Tensor(dtype, tensor.shape, math.prod(tensor.shape) * DTYPES[dtype].itemsize)


def part_name(name: str, task: Task, part: Changed) -> str:
    """Return the name of a merged part: the tensor's, and the part's own if there are more."""
    return name if len(parts_of(task)) == 1 else f"{name} ({part.label})"
