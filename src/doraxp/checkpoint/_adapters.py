"""The adapters in a file: `AdapterSet` knows them by the header and reads one when asked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from doraxp._base.types import Adapter, Config, HostArray
from doraxp._core.kinds import LayerKind
from doraxp._core.updates import LowRank, Update, UpdateAdapter
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._expert_names import ExpertNames, Stack
from doraxp.checkpoint._safetensors import DTYPES, Reader
from doraxp.checkpoint._update_names import (
    ALGORITHMS,
    TensorNames,
    UpdateNames,
    some_rows,
    tensors_of,
    transposed,
)
from doraxp.checkpoint._updated_layer import UpdatedLayer
from doraxp.layers import AdaptedLayer

CONFIG = "adapter_config.json"
RANK_LIMIT, SIZE_LIMIT = 4096, 1 << 30
"""Above the needs of all trainers, and far below a sparse file of a few bytes on the disk. The
first holds where a side of the weight is shorter; the second is for the numbers of one factor."""


class StoredLayer(NamedTuple):
    """One layer's adapter in a file."""

    config: Config
    kind: LayerKind
    shape: tuple[int, ...]
    """The shape in which the base stores the weight."""
    """It may be flat after the first axis, until the base tells the kernel of a convolution."""
    names: UpdateNames
    factors_transposed: bool = False
    """True where the file stores A as (in, rank) and B as (rank, out)."""
    rows: tuple[slice, ...] | None = None
    """The rows of B and m that are for this weight, in its order; None for all."""
    heads: int | None = None
    """The heads in which the rows of m are interleaved, as torchtune has them; None if they are in
    order."""


class TokenRows(NamedTuple):
    """Rows of embeddings that the file has in full."""

    indices: tuple[int, ...]
    """The tokens, in the order of the rows in the file."""
    tensor: str
    """The rows' name in the file, (tokens, dim)."""


class Added(NamedTuple):
    """A tensor that is added to one of the base's."""

    tensor: str
    """Its name in the file."""
    scale: float = 1.0
    """The number of times that it is added."""


class NewHead(NamedTuple):
    """The head that was trained with an adapter, as the files beside it describe it."""

    modules: tuple[str, ...] = ()
    """The last components of the modules that the file has in full."""
    task: str | None = None
    """PEFT's ``task_type``, such as "SEQ_CLS"."""
    architecture: str | None = None
    """The class of the model that was trained."""
    labels: tuple[str, ...] = ()
    """The names of a classifier's classes; empty where no file tells."""

    def place_in(self, name: str) -> int | None:
        """Return the place in a name of the module that was trained in full; None without one.

        PEFT compares ends, so "classifier" is "pre_classifier" too.
        """
        parts = name.split(".")
        for place in range(len(parts)):
            if ".".join(parts[: place + 1]).endswith(self.modules):
                return place
        return None


NO_HEAD = NewHead()


@dataclass(frozen=True)
class AdapterSet(Mapping[str, "AdaptedLayer | UpdatedLayer"]):
    """The adapters in a file, by module path. Each access reads that adapter from the file.

    An adapter with A, B and m is an AdaptedLayer, any other one an UpdatedLayer.
    `doraxp.checkpoint.load_adapters` makes it.
    """

    format: str
    """"peft", "mlx", "lycoris", "diffusers", "nvlabs" or "torchtune"."""
    reader: Reader
    layers: Mapping[str, StoredLayer]
    """The part that the header tells: rank and scale, kind, shape and names."""
    replacements: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the file has in full: their names in the base, and in the file."""
    base_change: str | None = None
    """The initialisation that changed the base weights; None where they did not change."""
    trained_biases: str | None = None
    """The ``bias`` of a PEFT configuration, "all" or "lora_only"; None without trained biases."""
    differences: Mapping[str, Added] = field(default_factory=dict)
    """Tensors to add to the base's, by their names in the base."""
    is_of_images: bool = False
    """True where the paths begin with the part of an image model that they are for."""
    is_of_pipeline: bool = False
    """True where the paths begin with the component of a pipeline of diffusers."""
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    """Single rows of embeddings that were trained, by the embeddings' name."""
    untrained: Mapping[str, str] = field(default_factory=dict)
    """Copies, from before the training, of tensors that the file has in full: their names in the
    base, and in the file."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """All tensors of a PEFT file but A, B and m: their names in a copy, and in the file."""
    base_name: str = ""
    """PEFT's ``base_model_name_or_path``: the model of the training, where the file tells it."""
    ties_weights: bool = False
    """True where a head that is tied to the embeddings was trained as one with them."""
    head: NewHead = NO_HEAD
    """The head that was trained with the adapter."""
    is_interleaved: bool = False
    """True for torchtune's export, whose m of q and k has torchtune's order of rows."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise CheckpointError(f"{self.reader.path}: the file has no adapter")
        for path, layer in self.layers.items():
            _check_layer(self.reader, path, layer)

    def __getitem__(self, path: str) -> AdaptedLayer | UpdatedLayer:
        layer = self.layers[path]
        is_conv_by_columns = layer.kind.name == "columns" and len(layer.shape) > 2
        has_factors = isinstance(layer.names, TensorNames | ExpertNames)
        if not has_factors or layer.names.magnitude is None:
            return self.read(layer)
        return self.read(layer) if is_conv_by_columns else self._adapted(layer)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def read(self, layer: StoredLayer) -> UpdatedLayer:
        """Read one adapter, and refuse NaN and infinity."""
        names, rank = layer.names, layer.config.rank
        update: Update
        if isinstance(names, ExpertNames):
            update = names.update(self.reader, rank)
        else:
            update = names.update(
                self.reader, self._read, rank, transposed=layer.factors_transposed
            )
        if layer.rows is not None:
            update = some_rows(update, layer.rows)
        if layer.kind.name in ("transposed", "transposed_experts", "embedding"):
            update = transposed(update)
        adapter = UpdateAdapter(update, self.magnitude(layer))
        return UpdatedLayer(adapter, layer.config, layer.kind, layer.shape)

    def _adapted(self, layer: StoredLayer) -> AdaptedLayer:
        """Read one adapter with A, B and m, for the matrix of its kind."""
        update, m = self.read(layer).adapter
        a, b = (np.asarray(leaf) for leaf in cast(LowRank | Stack, update))
        if layer.kind.is_transposed:
            a, b = b.mT, a.mT
        if layer.kind.is_stack:
            m = cast(HostArray, m).reshape(layer.kind.matrix_shape(layer.shape)[:-1])
        return AdaptedLayer(
            Adapter(a, b, cast(HostArray, m)), layer.config, layer.kind, layer.shape
        )

    def magnitude(self, layer: StoredLayer) -> HostArray | None:
        """Read m of one adapter, flat, in the order of the weight's rows; None without one."""
        if layer.names.magnitude is None:
            return None
        if isinstance(layer.names, ExpertNames):
            m = layer.names.read_magnitude(self.reader, layer.names.magnitude)
        else:
            m = self._read(layer.names.magnitude)
        if layer.heads is not None:
            m = m.reshape(layer.heads, -1, 2).swapaxes(1, 2)
        m = m.reshape(-1)
        if layer.rows is None or layer.kind.is_transposed:
            return m
        return np.concatenate([m[one] for one in layer.rows])

    def _read(self, name: str) -> HostArray:
        array = self.reader.read(name)
        if not np.all(np.isfinite(array)):
            raise CheckpointError(f"{self.reader.path}: {name} contains NaN or infinity")
        return array


def with_kernel(layer: StoredLayer, shape: tuple[int, ...]) -> StoredLayer:
    """Return a layer in the base's shape, where the two differ in their last axes alone.

    The factors of LoHa and LoKr do not tell the kernel of a convolution.
    """
    is_same = shape[:1] == layer.shape[:1] and math.prod(shape) == math.prod(layer.shape)
    # PEFT's cores of a convolution in one dimension have a last axis of length 1.
    is_shorter = len(shape) < len(layer.shape) and shape == layer.shape[: len(shape)]
    if not is_same or (len(shape) <= len(layer.shape) and not is_shorter):
        return layer
    kind = LayerKind("conv") if layer.kind.name == "linear" else layer.kind
    return layer._replace(kind=kind, shape=shape)


def algorithm_of(layer: StoredLayer) -> str:
    """Return the kind of update, as trainers name it: "LoHa", or "LoHa+m" with a magnitude.

    LoRA with a magnitude is "DoRA".
    """
    name = ALGORITHMS[type(layer.names)]
    if layer.names.magnitude is None:
        return name
    return "DoRA" if name == "LoRA" else f"{name}+m"


def config_path(reader: Reader) -> Path:
    """Return the path of the configuration beside an adapter's file."""
    return reader.path.parent / CONFIG


def _check_layer(reader: Reader, path: str, layer: StoredLayer) -> None:
    """Raise CheckpointError unless A, B and m have a floating dtype and the sizes of the layer."""
    rank = layer.config.rank
    *stack, out, inner = layer.kind.matrix_shape(layer.shape)
    limit = max(RANK_LIMIT, min(out, inner))
    if rank > limit:
        raise CheckpointError(
            f"{reader.path}: {path}: rank must be at most {limit} for a weight of shape "
            f"{layer.shape}, got {rank}"
        )
    if rank * max(out, inner) > SIZE_LIMIT:
        raise CheckpointError(
            f"{reader.path}: {path}: a factor must have at most {SIZE_LIMIT} numbers, got "
            f"{rank * max(out, inner)} for rank {rank} and a weight of shape {layer.shape}"
        )
    for name in tensors_of(layer.names):
        tensor = reader.tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{reader.path}: {name} must be of dtype {', '.join(DTYPES)}, got {tensor.dtype}"
            )
    if layer.rows is not None:
        return  # the module has more rows than the weight
    names = layer.names
    out *= math.prod(stack)
    sizes = {names.magnitude: out} if names.magnitude is not None else {}
    if isinstance(names, ExpertNames):
        sizes |= {names.lora_a: rank * inner * math.prod(stack), names.lora_b: out * rank}
    if isinstance(names, TensorNames) and names.core is None:
        own, other = (
            (out, inner)
            if layer.kind.name != "columns"
            else (layer.shape[0], math.prod(layer.shape[1:]))
        )
        sizes |= {names.lora_a: rank * other, names.lora_b: own * rank}
    for name, size in sizes.items():
        tensor = reader.tensors[name]
        if math.prod(tensor.shape) != size:
            raise CheckpointError(
                f"{reader.path}: {name} has shape {tensor.shape}, which does not fit rank {rank} "
                f"and the weight {layer.shape} that the other tensors of {path} make"
            )
