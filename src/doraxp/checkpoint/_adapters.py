"""Adapters in a file: described by its header, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from doraxp._base.types import Adapter, Array, Config
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._safetensors import DTYPES, CheckpointError, Reader
from doraxp.layers import AdaptedLayer


class StoredLayer(NamedTuple):
    """One layer's adapter in a file."""

    config: Config
    kind: LayerKind
    shape: tuple[int, ...]
    """The shape that the base weight is stored in."""
    names: Adapter
    """What A, B and m are called in the file."""
    factors_transposed: bool = False
    """Whether A is stored (in, rank) and B (rank, out)."""


@dataclass(frozen=True)
class AdapterSet(Mapping[str, AdaptedLayer]):
    """The adapters in a file by module path; each is read when it is asked for.

    Made by `doraxp.checkpoint.load_adapters`.
    """

    format: str
    """"peft", "mlx", "lycoris" or "nvlabs"."""
    reader: Reader
    layers: Mapping[str, StoredLayer]
    """What is known without reading them."""
    replacements: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the base that the file has in full: their names there, and in the file."""
    base_change: str | None = None
    """The way of initialisation that changed the base weights; None for those that did not."""
    trained_biases: str | None = None
    """What a PEFT configuration says of biases that were trained: "all" or "lora_only"."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise CheckpointError(f"{self.reader.path}: there is no DoRA adapter in it")
        for path, layer in self.layers.items():
            _check_layer(self.reader, path, layer)

    def __getitem__(self, path: str) -> AdaptedLayer:
        layer = self.layers[path]
        *stack, out, inner = layer.kind.matrix_shape(layer.shape)
        a, b, m = (self._read(name) for name in layer.names)
        if layer.factors_transposed:
            a, b = a.T, b.T
        rank = layer.config.rank
        adapter = Adapter(
            a.reshape(*stack, rank, inner), b.reshape(*stack, out, rank), m.reshape(*stack, out)
        )
        return AdaptedLayer(adapter, layer.config, layer.kind, layer.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def _read(self, name: str) -> Array:
        array = self.reader.read(name)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self.reader.path}: {name} has NaN or infinity in it")
        return array


def _check_layer(reader: Reader, path: str, layer: StoredLayer) -> None:
    """Hold the three tensors to each other and to the rank."""
    rank = layer.config.rank
    *_, out, inner = layer.kind.matrix_shape(layer.shape)
    sizes = Adapter(rank * inner, out * rank, out)
    for name, size in zip(layer.names, sizes, strict=True):
        tensor = reader.tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{reader.path}: {name} must be of dtype {', '.join(DTYPES)}, got {tensor.dtype}"
            )
        if tensor.nbytes != size * DTYPES[tensor.dtype].itemsize:
            raise CheckpointError(
                f"{reader.path}: {name} has shape {tensor.shape}, which does not fit rank {rank} "
                f"and the weight {layer.shape} that the others of {path} make"
            )
