"""The tensors of two models that `extract` compares: matrices for the adapter, and all others.

An adapter has matrices and convolutions alone. Embeddings, norms and biases that the training
changed are not in it. They are compared too, for a warning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._engine import Reused
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._orientation import is_transposed, may_transpose
from doraxp.checkpoint._pair import Block
from doraxp.checkpoint._quantised.reader import quantised_as
from doraxp.checkpoint._safetensors import DTYPES, AnySource, Source, are_equal
from doraxp.checkpoint._tied import is_embedding, is_head, tied_in_file

_EMBEDDING = re.compile(r".*embed.*|wte|wpe|shared|relative_attention_bias")
"""The last component of modules whose weight has a row for each token or position."""
_EXPERTS = re.compile(r"experts|switch_mlp")


class StoredPair(NamedTuple):
    """One weight in two files, as matrices."""

    base: Source
    tuned: Source
    kind: LayerKind

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of both."""
        out, inner = self.kind.matrix_shape(self.base.tensor.shape)
        return out, inner

    def blocks(self) -> Iterator[Block]:
        """Read both once. Where the weight is stored (in, out), a block has some columns."""
        out, inner = self.shape
        memory = Reused(), Reused()
        for part in row_blocks(self.base.tensor.shape):
            base, tuned = (
                source.read(part, empty).reshape(part.stop - part.start, -1)
                for source, empty in zip((self.base, self.tuned), memory, strict=True)
            )
            if self.kind.is_transposed:
                yield Block(slice(0, out), part, base.T, tuned.T)
            else:
                yield Block(part, slice(0, inner), base, tuned)

    def fault(self) -> str:
        """Return which tensor has numbers that nothing can be computed with, and which numbers."""
        for source in (self.base, self.tuned):
            if not all(
                np.isfinite(source.read(part)).all() for part in row_blocks(source.tensor.shape)
            ):
                return f"{source.reader.path}: {source.name} contains NaN or infinity"
        return f"{self.tuned.reader.path}: {self.tuned.name} has values too large to square"


Pairs: TypeAlias = dict[str, StoredPair]


class Compared(NamedTuple):
    """The tensors of two models."""

    matrices: Pairs
    """The weights that an adapter can change, by module path."""
    others: Mapping[str, tuple[Source | None, Source]]
    """All other tensors of TUNED by name, with BASE's; None for a tensor that BASE does not have,
    or has in another shape."""


def compare_names(base: Model, tuned: Model, modules: str | None) -> Compared:
    """Match the tensors of two models by name.

    Raises
    ------
    CheckpointError
        No name is common, TUNED lacks a matrix or has it in another shape, a matrix is quantised,
        nothing tells how a square one is stored, or `modules` fits none.
    """
    for model in (base, tuned):
        if model.is_pipeline:
            raise CheckpointError(
                f"{model.path}: is a pipeline of diffusers: give the folder of one component"
            )
    before, after = base.sources(), tuned.sources()
    if before.keys().isdisjoint(after):
        raise CheckpointError(
            f"{tuned.path}: has no tensor of {base.path}: {min(after, default='nothing')} and "
            f"{min(before, default='nothing')} are the first names; give two models of one kind"
        )
    matrices = {
        path: StoredPair(before[f"{path}.weight"], _partner(path, before, after, base, tuned), kind)
        for path, kind in _kinds(base, before, modules)
    }
    others: dict[str, tuple[Source | None, Source]] = {}
    for name, source in after.items():
        if name.removesuffix(".weight") not in matrices:
            old = before.get(name)
            same = old is not None and old.tensor.shape == source.tensor.shape
            others[name] = (old if same else None, source)
    return Compared(matrices, others)


def _partner(
    path: str, before: Mapping[str, Source], after: Mapping[str, Source], base: Model, tuned: Model
) -> Source:
    """Return TUNED's tensor for a matrix of BASE."""
    name = f"{path}.weight"
    old, new = before[name], after.get(name)
    advice = "leave the module out with --modules, or give the model that was trained from BASE"
    if new is None:
        raise CheckpointError(f"{tuned.path}: lacks {name} of BASE: {advice}")
    if new.tensor.shape != old.tensor.shape:
        raise CheckpointError(
            f"{tuned.path}: {name} must have shape {old.tensor.shape} as in BASE, got "
            f"{new.tensor.shape}: {advice}"
        )
    for source, model in ((old, base), (new, tuned)):
        if source.tensor.dtype not in DTYPES or name in model.quantised:
            how = quantised_as(source) or f"dtype {source.tensor.dtype}"
            raise CheckpointError(
                f"{source.reader.path}: {name} is quantised ({how}): give the model before its "
                "quantisation"
            )
    return new


def _kinds(
    base: Model, sources: Mapping[str, Source], modules: str | None
) -> Iterator[tuple[str, LayerKind]]:
    """Yield the path and the kind of each matrix of BASE that `modules` selects."""
    shapes = {name: source.tensor.shape for name, source in sources.items()}
    model_type, found = base.config.get("model_type"), False
    tied = tied_in_file(shapes, base.config)
    has_transposed = may_transpose(shapes, model_type)
    for name, shape in shapes.items():
        kind = None if tied is not None and name in tied.in_file else _kind(name, shape)
        path = name.removesuffix(".weight")
        if kind is None or not (modules is None or re.search(modules, path)):
            continue
        found = True
        if kind.name == "linear" and has_transposed:
            transposed = is_transposed(name, shapes, model_type, {}, flag=False)
            if transposed is None:
                raise CheckpointError(
                    f"{base.path}: nothing tells whether {name} is stored (out, in) or (in, out): "
                    "leave the module out with --modules"
                )
            kind = LayerKind("transposed") if transposed else kind
        yield path, kind
    if not found:
        wanted = "a matrix" if modules is None else f"a matrix in a module of {modules!r}"
        raise CheckpointError(f"{base.path}: must have {wanted}, got tensors of other kinds alone")


def _kind(name: str, shape: tuple[int, ...]) -> LayerKind | None:
    """Return the kind of a matrix or convolution; None for every other tensor.

    The weight of a depthwise convolution is (channels, 1, ...). PEFT's A reads the channels of all
    groups, so no adapter of PEFT fits it.
    """
    path = name.removesuffix(".weight")
    if path == name or not 2 <= len(shape) <= 5 or 0 in shape:
        return None
    if len(shape) == 2:
        last = path.rpartition(".")[2]
        is_tokens = is_embedding(name) or _EMBEDDING.fullmatch(last)
        return None if is_tokens and not is_head(name) else LayerKind()
    if _EXPERTS.search(path) or shape[1] == 1 < shape[0]:
        return None
    return LayerKind("conv")


def relative_change(base: Source | None, tuned: AnySource) -> float:
    """Return ‖after − before‖ / ‖before‖ of a tensor; infinity where that is not a number.

    So it is for a new tensor, another shape, integers that differ, and NaN.
    """
    if base is None:
        return math.inf
    if are_equal(base, tuned):
        return 0.0
    if base.tensor.dtype not in DTYPES or tuned.tensor.dtype not in DTYPES:
        return math.inf
    change = size = 0.0
    shape = base.tensor.shape
    for part in row_blocks(shape) if shape else [None]:
        old, new = (source.read(part).astype(np.float64).ravel() for source in (base, tuned))
        change += float(np.sum((new - old) ** 2))
        size += float(old @ old)
    if change == 0:
        return 0.0
    found = math.sqrt(change / size) if size else math.inf
    return found if math.isfinite(found) else math.inf
