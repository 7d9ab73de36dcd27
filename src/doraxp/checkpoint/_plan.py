"""Which tensor of the base takes which adapter; everything that does not fit is said at once."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from doraxp._base.safetensors import Tensor
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import AdapterSet, StoredLayer
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._safetensors import DTYPES, CheckpointError

_OTHER_WAY = {"linear": LayerKind("transposed"), "transposed": LayerKind("linear")}


class Task(NamedTuple):
    """What becomes of one tensor of the base."""

    path: str | None
    """The module whose adapter is merged into it; None for none."""
    kind: LayerKind
    """How that module stores its weight."""
    replacement: str | None
    """The tensor of the adapter's file that stands for it; None for the base's own."""


def plan(model: Model, adapters: AdapterSet) -> dict[str, Task]:
    """Return the tasks by tensor; tensors without one are copied.

    Raises
    ------
    CheckpointError
        With every adapter that has no weight, or none for itself alone, every shape that does not
        fit, every quantised weight, and adapters that need another base.
    """
    tensors = {name: reader.tensors[name] for name, reader in model.reader_of().items()}
    weights = {path: f"{path}.weight" for path in adapters.layers}
    names = _names(tensors, {**weights, **{name: name for name in adapters.replacements}}, adapters)
    problems = []
    replaced = {names[name]: source for name, source in adapters.replacements.items()}
    for name, source in replaced.items():
        shape = adapters.reader.tensors[source].shape
        if name not in tensors:
            problems.append(f"{source} has no tensor {name} to replace")
        elif tensors[name].shape != shape or adapters.reader.tensors[source].dtype not in DTYPES:
            problems.append(f"{source} {shape} does not fit {name} {tensors[name].shape}")
    tasks = {name: Task(None, LayerKind(), source) for name, source in replaced.items()}
    for path, layer in adapters.layers.items():
        name = names[path]
        if name in tasks and (other := tasks[name].path) is not None:
            problems.append(f"{other} and {path} are both for {name}")
            continue
        try:
            tasks[name] = Task(path, _fit(name, layer, tensors), replaced.get(name))
        except CheckpointError as error:
            problems.append(str(error))
    adapted = {name: task for name, task in tasks.items() if task.path is not None}
    problems += _ambiguous(adapted, adapters, tensors)
    if adapters.base_change and not all(task.replacement for task in adapted.values()):
        problems.append(
            f"the adapter was initialised by {adapters.base_change}, which changed the base "
            "weights, and the file does not have them"
        )
    biases = {f"{name.removesuffix('weight')}bias" for name in adapted} & tensors.keys()
    if adapters.trained_biases and (lacking := sorted(biases - replaced.keys())):
        problems.append(
            f"adapter_config.json says bias {adapters.trained_biases}, but the file lacks "
            f"{', '.join(lacking)}: some versions of PEFT leave trained biases out"
        )
    missing = next((names[path] for path in adapters.layers if names[path] not in tensors), None)
    if missing is not None:
        near = max(tensors, key=lambda name: _shared_end(name, missing), default="nothing")
        problems.insert(0, f"near {missing} the base has {near}")
    if problems:
        raise CheckpointError(f"{adapters.reader.path}: " + "; ".join(problems))
    return tasks


def _fit(name: str, layer: StoredLayer, tensors: Mapping[str, Tensor]) -> LayerKind:
    """Return how the weight is stored: for two axes, its shape says more than a flag."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"the base has no {name} for an adapter of shape {layer.shape}")
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name} is of dtype {tensor.dtype}: quantised, it takes no merge")
    if tensor.shape == layer.shape:
        return layer.kind
    if layer.kind.name in _OTHER_WAY and tensor.shape == layer.shape[::-1]:
        return _OTHER_WAY[layer.kind.name]
    raise CheckpointError(f"{name} has shape {tensor.shape}, its adapter is for {layer.shape}")


def _shared_end(one: str, other: str) -> int:
    """Return how many of the last parts of two names are the same."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _ambiguous(
    tasks: Mapping[str, Task], adapters: AdapterSet, tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """Find square weights in a file whose flag was seen to be wrong."""
    flipped = [
        name
        for name, task in tasks.items()
        if task.path is not None and task.kind != adapters.layers[task.path].kind
    ]
    for name, task in tasks.items():
        shape = tensors[name].shape
        if flipped and task.kind.name in _OTHER_WAY and shape == shape[::-1]:
            yield (
                f"{name} is square, and fan_in_fan_out was wrong for {flipped[0]}: "
                "whether it is stored (out, in) cannot be told"
            )


def _names(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, str], adapters: AdapterSet
) -> dict[str, str]:
    """Return what the base calls each wanted tensor.

    A model with a head and the model without it differ by one leading name: it is dropped or
    added where then more is found, and what still is not found is an error.
    """
    if adapters.format == "lycoris":
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
    """Return the names that stand for kohya's, which have an underscore for every dot."""
    known: dict[str, str] = {}
    for name in tensors:
        plain = name.removesuffix(".weight").replace(".", "_")
        if name.endswith(".weight"):
            if plain in known:
                raise CheckpointError(f"{name} and {known[plain]} are one in this adapter's names")
            known[plain] = name
    short = {path: re.sub(r"^(lora_unet|lora_te\d*|lora|lycoris)_", "", path) for path in wanted}
    return {path: known.get(short[path], name) for path, name in wanted.items()}
