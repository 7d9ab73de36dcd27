"""Adapters of any source and any array library, as `save_adapters` is given them, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, cast

from doraxp._base.types import Adapter, Array, Config
from doraxp._core.adapter import convert_form
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._host import on_host
from doraxp.checkpoint._updated_layer import AnyLayer, UpdatedLayer
from doraxp.layers import AdaptedLayer, AdaptedModel, DoRALayer

GivenLayer: TypeAlias = AnyLayer | DoRALayer | tuple[Adapter, Config]


def as_layers(adapters: Mapping[str, GivenLayer]) -> Mapping[str, AnyLayer]:
    """Return the adapters of all layers with arrays of NumPy.

    Raises
    ------
    TypeError
        An entry is of another type.
    ValueError
        A layer has trained weights, which an adapter cannot hold.
    """
    if isinstance(adapters, AdapterSet):
        return adapters  # of a file: read one by one, when they are written
    if isinstance(adapters, AdaptedModel):
        adapters = dict(adapters.adapted)
    return {path: _layer(path, given) for path, given in adapters.items()}


def _layer(path: str, given: GivenLayer) -> AnyLayer:
    if isinstance(given, UpdatedLayer):
        update, magnitude = given.adapter
        m = None if magnitude is None else _fetched(magnitude)
        return given._replace(
            adapter=given.adapter._replace(update=update.mapped(_fetched), magnitude=m)
        )
    if isinstance(given, DoRALayer):
        given = _of_layer(path, given)
    elif not isinstance(given, AdaptedLayer):
        given = _of_pair(path, given)
    return given._replace(adapter=Adapter(*map(_fetched, given.adapter)))


def _fetched(array: Array) -> Array:
    return cast(Array, on_host(array))


def _of_layer(path: str, layer: DoRALayer) -> AdaptedLayer:
    if layer.train_base:
        raise ValueError(
            f"{path}: train_base must be False, because an adapter's file has no weights of the "
            "base: save the merged weights, or use save_training"
        )
    kind = None if layer.operator is None else layer.kind  # else the weight is the matrix already
    adapter, config = convert_form(layer.weight, layer.adapter, layer.config, "weight", kind=kind)
    return AdaptedLayer(adapter, config, layer.kind, layer.stored_shape)


def _of_pair(path: str, given: tuple[Adapter, Config]) -> AdaptedLayer:
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Adapter)):
        raise TypeError(
            f"{path}: must be an AdaptedLayer, an UpdatedLayer, a DoRALayer or a pair of Adapter "
            f"and Config, got {type(given).__name__}"
        )
    adapter, config = given
    shape = (*adapter.magnitude.shape, adapter.lora_a.shape[-1])
    return AdaptedLayer(
        adapter, config, LayerKind("linear" if len(shape) == 2 else "experts"), shape
    )
