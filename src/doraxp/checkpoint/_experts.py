"""The parts of a merge into experts: one for each, whether BASE has them as one tensor or apart.

A fused tensor (experts, rows, columns) is seen as a matrix, in which the experts are one below the
other. So the part of an expert is a window of rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import CONFIG, StoredLayer
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._expert_names import ExpertNames
from doraxp.checkpoint._names import Place
from doraxp.checkpoint._tasks import MergedTensor

TRANSPOSED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""The families whose experts have ``is_transposed`` in transformers: PEFT adds (B A)ᵀ to them."""


def expert_parts(
    whole: MergedTensor, place: Place, config: Mapping[str, object]
) -> Iterator[MergedTensor]:
    """Yield the part of each expert that a tensor of the base has.

    Parameters
    ----------
    whole : MergedTensor
        The tensor of the base, and the layer of all experts.
    place : Place
        It has the expert's number where the tensor is of one expert.
    config : dict
        The base's config.json.

    Raises
    ------
    CheckpointError
        The shapes do not fit, or nothing tells whether the experts are stored transposed.
    """
    source, layer = whole.source, whole.layer
    shape = source.tensor.shape
    experts, *sides = layer.shape
    if place.expert is None:
        if len(shape) != 3 or shape[0] != experts:
            raise _misfit(place, shape, layer)
        _, height, width = shape
        is_flipped = _is_flipped(place, (height, width), layer, config)
        flat = source.flat()
        for expert in range(experts):
            own = flat.rows(expert * height, (expert + 1) * height)
            found = _of_expert(layer, expert, own.tensor.shape, is_flipped=is_flipped)
            yield replace(whole, source=own, layer=found, expert=expert)
        return
    height, width = sides if shape[1] == sides[1] else sides[::-1]
    is_flipped = _is_flipped(place, (height, width), layer, config)
    if is_flipped and layer.names.magnitude is not None:
        raise CheckpointError(
            f"{place.tensor} is of one expert, and the adapter {whole.path} is of experts stored "
            "(in, out): merge it into a base that has them as one tensor"
        )
    found = _of_expert(layer, place.expert, shape, is_flipped=is_flipped)
    rows = None if place.own is None else (place.own,)
    yield replace(whole, layer=found._replace(rows=rows), expert=place.expert)


def _of_expert(
    layer: StoredLayer, expert: int, shape: tuple[int, ...], *, is_flipped: bool
) -> StoredLayer:
    """Return the layer of one expert, whose weight is stored in `shape`."""
    names = layer.names
    assert isinstance(names, ExpertNames)
    has_norms_of_columns = is_flipped and names.magnitude is not None
    kind = LayerKind("transposed" if has_norms_of_columns else "linear")
    own = names._replace(expert=expert, is_flipped=is_flipped and not has_norms_of_columns)
    return layer._replace(kind=kind, shape=shape, names=own)


def _is_flipped(
    place: Place, there: tuple[int, int], layer: StoredLayer, config: Mapping[str, object]
) -> bool:
    """Return whether (B A)ᵀ is added to an expert's weight, which has the shape `there`."""
    names = layer.names
    assert isinstance(names, ExpertNames)
    _, out, inner = layer.kind.matrix_shape(layer.shape)
    if there not in ((out, inner), (inner, out)) or (
        not names.is_packed and there != layer.shape[1:]
    ):
        raise _misfit(place, there, layer)
    if names.is_packed and out != inner:
        return there == (inner, out)
    if not names.by_model:
        return layer.kind.is_transposed
    families = {config.get("model_type")}
    text = config.get("text_config")
    families |= {text.get("model_type")} if isinstance(text, dict) else set()
    if not families.isdisjoint(TRANSPOSED):
        return True
    problem = f"the experts of {place.tensor} are square, and nothing tells which axis is the input"
    if not names.has_version:
        raise CheckpointError(
            f"{problem}: add to {CONFIG} peft_version, the version of PEFT that wrote the adapter"
        )
    if families <= {None}:
        raise CheckpointError(f"{problem}: put the model's config.json beside BASE")
    return False


def _misfit(place: Place, shape: tuple[int, ...], layer: StoredLayer) -> CheckpointError:
    return CheckpointError(
        f"{place.tensor} has shape {shape}, but its adapter is for experts {layer.shape}"
    )
