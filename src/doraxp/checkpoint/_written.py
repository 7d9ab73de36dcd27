"""The tensors of a result, and the fate of each quantised weight of the base.

::

    copied        all its tensors, byte for byte
    dense         one tensor in 16 bits, as it is merged into
    requantised   the same tensors with new codes and scales

The experts of a layer are one module for the libraries that load them, so all of them are dense if
one is.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

from doraxp.checkpoint._config_edits import ConfigEdits
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._options import Options
from doraxp.checkpoint._quantised.declared import undeclared
from doraxp.checkpoint._safetensors import RAW
from doraxp.checkpoint._tasks import (
    CopiedTensor,
    RequantisedTensor,
    ScalesTensor,
    Task,
    WrittenTask,
    written_as,
)
from doraxp.checkpoint._tied import is_embedding

Fate: TypeAlias = Literal["copied", "dense", "requantised"]
"""The fate of a quantised weight."""
_EXPERTS = re.compile(r"(.*\.experts)\.")


def fates_of(
    model: Model, tasks: Mapping[str, Task], lead: str, options: Options
) -> dict[str, Fate]:
    """Return the fate of each quantised weight that can be read, by its name in the base."""
    fates: dict[str, Fate] = {}
    for name, weight in model.readable.items():
        task = tasks[f"{lead}{name}"]
        fates[name] = "copied"
        if not isinstance(task, CopiedTensor):
            fits = task.source.tensor.shape == weight.quantisation.shape
            fates[name] = "requantised" if options.targets == "same" and fits else "dense"
    dense = {_experts(name) for name, fate in fates.items() if fate == "dense"} - {""}
    return {name: "dense" if _experts(name) in dense else fate for name, fate in fates.items()}


def with_dense(
    edits: ConfigEdits,
    model: Model,
    tasks: Mapping[str, Task],
    lead: str,
    fates: Mapping[str, Fate],
) -> ConfigEdits:
    """Return the changes of the configuration that name the dense modules of a quantised model."""
    if not model.is_folder or not {"dense", "requantised"} & set(fates.values()):
        return edits
    made = [_module(f"{lead}{name}") for name, fate in fates.items() if fate == "dense"]
    quantised = {f"{lead}{name}" for name in fates}
    others = [_module(name) for name, task in tasks.items() if _is_matrix(name, task, quantised)]
    dense = dict.fromkeys([*made, *undeclared(model.config, others)])
    return replace(edits, dense=tuple(dense))


def _is_matrix(name: str, task: Task, quantised: Container[str]) -> bool:
    """Return whether a tensor may be the weight of a linear module that was dense before."""
    return (
        name.endswith(".weight")
        and name not in quantised
        and len(task.source.tensor.shape) == 2
        and not is_embedding(name)
    )


def _module(name: str) -> str:
    """Return the module of a weight: of one of several experts all of them."""
    return _experts(name) or name.removesuffix(".weight")


def unloadable(model: Model, fates: Mapping[str, Fate]) -> str | None:
    """Return the experts that become dense where transformers 5.24 knows packed ones alone.

    These are the packed codes of compressed-tensors. There are no words for such experts.
    """
    packed = (
        name
        for name, fate in fates.items()
        if fate == "dense"
        and _experts(name)
        and model.readable[name].quantisation.tensors[0].endswith("weight_packed")
    )
    return next(map(_experts, packed), None)


def _experts(name: str) -> str:
    """Return the module of all experts that a weight is in, else ""."""
    match = _EXPERTS.match(name)
    return match[1] if match else ""


def written_tasks(
    names: Iterable[str],
    model: Model,
    tasks: Mapping[str, Task],
    lead: str,
    fates: Mapping[str, Fate],
) -> dict[str, WrittenTask]:
    """Return the tasks of the tensors that are written in place of some of the base.

    Parameters
    ----------
    names : iterable of str
        The tensors on disk, by the base's names.
    model : Model
        The base.
    tasks : mapping of str to Task
        By the names of the result.
    lead : str
        The part that those have before the names of the base.
    fates : mapping of str to Fate
    """
    written: dict[str, WrittenTask] = {}
    names = dict.fromkeys(names)
    for name in names:
        weight = model.weight_of.get(name)
        if weight is None:
            written[f"{lead}{name}"] = tasks[f"{lead}{name}"]
            continue
        codes, *others = weight.quantisation.tensors
        fate = fates[weight.name]
        if fate == "copied":
            written[f"{lead}{name}"] = CopiedTensor(model.stored[name], is_part=True)
        elif name == codes and fate == "dense":
            written[f"{lead}{weight.name}"] = tasks[f"{lead}{weight.name}"]
        elif name == codes:
            task = tasks[f"{lead}{weight.name}"]
            written[f"{lead}{codes}"] = RequantisedTensor(task, weight)
            apart = (other for other in others if other not in names)  # in another shard
            written |= {f"{lead}{other}": ScalesTensor(model.stored[other]) for other in apart}
        elif fate == "requantised" and codes in names:
            written[f"{lead}{name}"] = ScalesTensor(model.stored[name])
    return written


def by_width(tasks: Mapping[str, WrittenTask], options: Options) -> dict[str, WrittenTask]:
    """Return the tasks of a file with the wider dtypes first, else in their order.

    So each tensor begins at a multiple of the size of its numbers.
    """
    dtypes = {name: RAW.get(written_as(task, options).dtype) for name, task in tasks.items()}
    sizes = {name: dtype.itemsize if dtype else 1 for name, dtype in dtypes.items()}
    return dict(sorted(tasks.items(), key=lambda item: -sizes[item[0]]))
