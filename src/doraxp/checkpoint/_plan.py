"""The plan of a merge: where each tensor of the result comes from.

`plan` compares an adapter with a base by their headers alone, and reports all problems at once.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from doraxp._base.safetensors import Tensor
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import CONFIG, AdapterSet, StoredLayer
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._safetensors import DTYPES, Source

_OTHER_WAY = {"linear": LayerKind("transposed"), "transposed": LayerKind("linear")}


@dataclass(frozen=True)
class MergedTensor:
    """A weight that the adapter of a module is merged into."""

    source: Source
    """The weight before the merge: the base's, or one that the adapter's file has in full."""
    path: str
    """The module."""
    layer: StoredLayer
    """Its adapter, with the kind and the shape of the base's weight."""


@dataclass(frozen=True)
class ReplacedTensor:
    """A tensor that the adapter's file has in full."""

    source: Source
    """The tensor in the adapter's file."""


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor that no adapter changes."""

    source: Source
    """The tensor in the base."""


Task: TypeAlias = MergedTensor | ReplacedTensor | CopiedTensor
"""The way in which one tensor of the result is made."""


def plan(model: Model, adapters: AdapterSet) -> dict[str, Task]:
    """Return the task of each tensor of the base: first those that change, then the copied ones.

    Raises
    ------
    CheckpointError
        The message lists every adapter without a weight, every weight with two adapters, every
        shape that does not fit, every quantised weight, and a base that is not the adapter's.
    """
    sources = {name: Source(reader, name) for name, reader in model.reader_of().items()}
    tensors = {name: source.tensor for name, source in sources.items()}
    wanted = {path: f"{path}.weight" for path in adapters.layers}
    names = _names(tensors, {**wanted, **{name: name for name in adapters.replacements}}, adapters)
    replaced = {
        names[name]: Source(adapters.reader, own) for name, own in adapters.replacements.items()
    }
    merged, unmerged = _merged_tensors(adapters, names, sources, replaced)
    problems = [
        *_doubles(adapters, names),
        *_misfits(replaced, tensors),
        *unmerged,
        *_ambiguous(merged, adapters),
        *_untrained_parts(merged, replaced, tensors, adapters),
    ]
    missing = next((names[path] for path in adapters.layers if names[path] not in tensors), None)
    if missing is not None:
        near = max(tensors, key=lambda name: _shared_end(name, missing), default="nothing")
        problems.insert(0, f"near {missing} the base has {near}")
    if problems:
        raise CheckpointError(f"{adapters.reader.path}: " + "; ".join(problems))
    changed: dict[str, Task] = {name: ReplacedTensor(source) for name, source in replaced.items()}
    changed |= merged
    copied = {name: CopiedTensor(source) for name, source in sources.items() if name not in changed}
    return changed | copied


def _merged_tensors(
    adapters: AdapterSet,
    names: Mapping[str, str],
    sources: Mapping[str, Source],
    replaced: Mapping[str, Source],
) -> tuple[dict[str, MergedTensor], list[str]]:
    """Return the weights that have an adapter, and a message for each adapter that does not fit."""
    merged: dict[str, MergedTensor] = {}
    problems = []
    for path, layer in adapters.layers.items():
        name = names[path]
        if name in merged:
            problems.append(f"{merged[name].path} and {path} are both for {name}")
        elif name not in sources:
            problems.append(f"the base has no {name} for an adapter of shape {layer.shape}")
        else:
            try:
                stored = _as_stored(name, layer, sources[name].tensor)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                source = replaced.get(name, sources[name])
                merged[name] = MergedTensor(source, path, stored)
    return merged, problems


def _doubles(adapters: AdapterSet, names: Mapping[str, str]) -> Iterator[str]:
    """Yield a message for each two whole tensors that are for one tensor of the base."""
    first: dict[str, str] = {}
    for name, own in adapters.replacements.items():
        other = first.setdefault(names[name], own)
        if other != own:
            yield f"{other} and {own} are both for {names[name]}"


def _misfits(replaced: Mapping[str, Source], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a message for each whole tensor that does not fit the base."""
    for name, source in replaced.items():
        shape, dtype = source.tensor.shape, source.tensor.dtype
        if name not in tensors:
            yield f"the base has no tensor {name} for {source.name} to replace"
        elif tensors[name].shape != shape:
            yield f"{source.name} {shape} does not fit {name} {tensors[name].shape}"
        elif dtype not in DTYPES:
            yield f"{source.name} must be of dtype {', '.join(DTYPES)}, got {dtype}"
        elif tensors[name].dtype not in DTYPES:
            yield (
                f"{source.name} of dtype {dtype} cannot replace {name} of dtype "
                f"{tensors[name].dtype}: remove it from the adapter"
            )


def _as_stored(name: str, layer: StoredLayer, tensor: Tensor) -> StoredLayer:
    """Return the layer with the kind and shape in which the base stores the weight.

    For a weight of two axes the shape says more than the adapter's flag.
    """
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{name} is quantised (dtype {tensor.dtype}) and cannot be merged into"
        )
    if tensor.shape == layer.shape:
        return layer
    if layer.kind.name in _OTHER_WAY and tensor.shape == layer.shape[::-1]:
        return layer._replace(kind=_OTHER_WAY[layer.kind.name], shape=tensor.shape)
    raise CheckpointError(f"{name} has shape {tensor.shape}, but its adapter is for {layer.shape}")


def _ambiguous(merged: Mapping[str, MergedTensor], adapters: AdapterSet) -> Iterator[str]:
    """Yield a message for each square weight, if the file's flag was wrong for another weight."""
    flipped = [
        name for name, task in merged.items() if task.layer.kind != adapters.layers[task.path].kind
    ]
    for name, task in merged.items():
        shape = task.layer.shape
        if flipped and task.layer.kind.name in _OTHER_WAY and shape == shape[::-1]:
            yield (
                f"{name} is square, and fan_in_fan_out was wrong for {flipped[0]}: "
                "it is not known whether it is stored (out, in) or (in, out)"
            )


def _untrained_parts(
    merged: Mapping[str, MergedTensor],
    replaced: Mapping[str, Source],
    tensors: Mapping[str, Tensor],
    adapters: AdapterSet,
) -> Iterator[str]:
    """Yield a message where the file lacks weights or biases that the training changed."""
    if adapters.base_change and not merged.keys() <= replaced.keys():
        yield (
            f"the adapter was initialised by {adapters.base_change}, which changed the base "
            "weights, and the file does not have them"
        )
    biases = {f"{name.removesuffix('weight')}bias" for name in merged} & tensors.keys()
    if adapters.trained_biases and (lacking := sorted(biases - replaced.keys())):
        yield (
            f"{CONFIG} says bias {adapters.trained_biases}, but the file lacks "
            f"{', '.join(lacking)}: some versions of PEFT leave trained biases out"
        )


def _shared_end(one: str, other: str) -> int:
    """Return the number of last dotted parts that two names share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _names(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, str], adapters: AdapterSet
) -> dict[str, str]:
    """Return the base's name of each wanted tensor.

    A model with a head and the model without it differ by one leading name. This drops or adds
    one where the base then has more of the tensors. A tensor that is still missing is an error of
    the plan.
    """
    if adapters.dots_lost:
        return _from_underscores(tensors, wanted)
    first, names = next(iter(wanted.values())), set(wanted.values())
    leads = Counter(lead for lead, _, rest in (x.partition(".") for x in tensors) if rest in names)
    ways = [
        dict(wanted),
        {key: name.removeprefix(f"{first.partition('.')[0]}.") for key, name in wanted.items()},
    ]
    found = [sum(name in tensors for name in way.values()) for way in ways]
    (lead, most), (other, next_most) = [*leads.most_common(2), ("", 0), ("", 0)][:2]
    if most <= max(found):
        return ways[found.index(max(found))]
    if most == next_most:
        raise CheckpointError(
            f"{adapters.reader.path}: {first} may be that of {lead} or of {other} in the base"
        )
    return {key: f"{lead}.{name}" for key, name in wanted.items()}


def _from_underscores(tensors: Mapping[str, Tensor], wanted: Mapping[str, str]) -> dict[str, str]:
    """Return the base's names for kohya's names, which have an underscore for each dot."""
    known: dict[str, str] = {}
    for name in tensors:
        plain = name.removesuffix(".weight").replace(".", "_")
        if name.endswith(".weight"):
            if plain in known:
                raise CheckpointError(
                    f"{name} and {known[plain]} have the same name in this adapter's file"
                )
            known[plain] = name
    short = {path: re.sub(r"^(lora_unet|lora_te\d*|lora|lycoris)_", "", path) for path in wanted}
    return {path: known.get(short[path], name) for path, name in wanted.items()}
