"""The tensors that an adapter's file has in full: in place of the base's, or new ones.

A new one is a head that was trained, or the embeddings of a vocabulary that has grown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from doraxp._base.words import counted
from doraxp.checkpoint._adapters import AdapterSet, Added, TokenRows
from doraxp.checkpoint._config_edits import ConfigEdits
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._fit import Fit, Fitted
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._new_head import check_added, head_edits
from doraxp.checkpoint._safetensors import DTYPES, AnySource, Source, SumSource, are_equal
from doraxp.checkpoint._tasks import CopiedTensor, JoinedTensor, Part, ReplacedTensor
from doraxp.checkpoint._tied import is_embedding, is_head


class WholeTensors(NamedTuple):
    """The tasks of the tensors that an adapter's file has in full."""

    tasks: dict[str, ReplacedTensor | JoinedTensor]
    """By the base's names, or by the adapter's where the base has no such tensor."""
    added: frozenset[str]
    """The names that the base does not have."""
    edits: ConfigEdits
    problems: list[str]


def whole_tensors(model: Model, adapters: AdapterSet, choices: Fit, fitted: Fitted) -> WholeTensors:
    """Return the tasks of the tensors that an adapter's file has in full."""
    tasks: dict[str, ReplacedTensor | JoinedTensor] = {}
    problems: list[str] = []
    for name, own in adapters.replacements.items():
        target = fitted.places[name][0].tensor if name in fitted.places else fitted.own_name(name)
        with _collected(problems):
            source = Source(adapters.reader, own)
            if target in tasks and not are_equal(tasks[target].source, source):
                raise CheckpointError(
                    f"{tasks[target].source.name} and {own} are both for {target}, and differ"
                )
            tasks[target] = _task(name, source, adapters, fitted)
    for name, rows in adapters.tokens.items():
        with _collected(problems):
            target = _target(name, rows.tensor, fitted)
            tasks[target] = _with_rows(tasks.get(target), fitted.sources[target], rows, adapters)
    for name, added in adapters.differences.items():
        if name in fitted.others:
            continue
        with _collected(problems):
            target = _target(name, added.tensor, fitted)
            before = tasks[target].source if target in tasks else fitted.sources[target]
            if not isinstance(before, Source):
                raise CheckpointError(f"{before.name} and {added.tensor} are both for {target}")
            tasks[target] = _sum(before, fitted.sources[target], added, adapters)
    grown = _grown(tasks, fitted)
    problems += _left_small(grown, tasks, fitted)
    edits = ConfigEdits(vocab_size=max(grown.values(), default=None))
    with _collected(problems):
        edits = head_edits(edits, model.config, adapters, choices, fitted, tasks)
    return WholeTensors(tasks, frozenset(tasks.keys() - fitted.sources.keys()), edits, problems)


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Add the message of a CheckpointError to `problems`."""
    try:
        yield
    except CheckpointError as error:
        problems.append(str(error))


def _target(name: str, own: str, fitted: Fitted) -> str:
    """Return the base's tensor for a tensor of the file that cannot be a new one."""
    if name not in fitted.places:
        raise CheckpointError(f"the base has no tensor {name} for {own}")
    return fitted.places[name][0].tensor


def _sum(before: Source, base: Source, added: Added, adapters: AdapterSet) -> ReplacedTensor:
    """Return the task of a tensor to which the adapter's file adds one.

    `before` is the base's, or the one that the file has in full.
    """
    difference = Source(adapters.reader, added.tensor)
    one, other = before.tensor, difference.tensor
    if one.shape != other.shape or not {one.dtype, other.dtype} <= DTYPES.keys():
        raise CheckpointError(
            f"{difference.name} {other.shape} does not fit {base.name} {one.shape}"
        )
    return ReplacedTensor(SumSource(before, difference, added.scale), base.tensor.dtype)


def _task(name: str, source: AnySource, adapters: AdapterSet, fitted: Fitted) -> ReplacedTensor:
    """Return the task of one tensor; raise CheckpointError where it does not fit the base."""
    shape, dtype = source.tensor.shape, source.tensor.dtype
    if name not in fitted.places:
        check_added(name, source, adapters, fitted)
        there, is_other_size = source.tensor, False
    else:
        place = fitted.places[name][0]
        there = fitted.sources[place.tensor].tensor
        other_rows = len(shape) == len(there.shape) > 0 and shape[1:] == there.shape[1:]
        is_saved = adapters.head.place_in(name) is not None
        is_other_size = other_rows and (_has_tokens(place.tensor) or (is_saved and _grows(source)))
        if place.rows is not None or (shape != there.shape and not is_other_size):
            raise CheckpointError(
                f"{source.name} {shape} does not fit {place.tensor} {there.shape}"
            )
    if dtype not in DTYPES and dtype != there.dtype:
        raise CheckpointError(f"{source.name} must be of dtype {', '.join(DTYPES)}, got {dtype}")
    if there.dtype not in DTYPES and dtype != there.dtype:
        raise CheckpointError(
            f"{source.name} of dtype {dtype} cannot replace {name} of dtype {there.dtype}: remove "
            "it from the adapter"
        )
    return ReplacedTensor(source, there.dtype)


def _grows(source: AnySource) -> bool:
    """Return whether the file has the weight of the same module with as many rows."""
    file, rows = source.reader, source.tensor.shape[0]
    lead = source.name.rpartition(".")[0]
    weight = file.tensors.get(f"{lead}.weight")
    return weight is not None and len(weight.shape) > 1 and weight.shape[0] == rows


def _has_tokens(name: str) -> bool:
    """Return whether a tensor has a row for each token."""
    own = f"{name.rpartition('.')[0]}.weight"
    return is_embedding(own) or is_head(own)


def _with_rows(
    before: ReplacedTensor | JoinedTensor | None,
    base: Source,
    tokens: TokenRows,
    adapters: AdapterSet,
) -> JoinedTensor:
    """Return the task of embeddings in which the rows of some tokens are trained ones."""
    source = base
    if before is not None and isinstance(before.source, Source):
        source = before.source
    rows, dtype = source.tensor.shape[0], source.tensor.dtype
    own = Source(adapters.reader, tokens.tensor)
    if own.tensor.shape != (len(tokens.indices), *source.tensor.shape[1:]):
        raise CheckpointError(
            f"{own.name} has shape {own.tensor.shape}, which does not fit "
            f"{counted(len(tokens.indices), 'token')} of {base.name} {source.tensor.shape}"
        )
    if max(tokens.indices) >= rows:
        raise CheckpointError(
            f"{own.name} is for token {max(tokens.indices)}, but {base.name} has "
            f"{counted(rows, 'token')}: merge into the model whose embeddings were resized, "
            "saved before the training"
        )
    parts: list[Part] = []
    place = 0
    for index, row in sorted(zip(tokens.indices, range(len(tokens.indices)), strict=True)):
        if index > place:
            parts.append(CopiedTensor(source.rows(place, index)))
        parts.append(ReplacedTensor(own.rows(row, row + 1), dtype))
        place = index + 1
    if place < rows:
        parts.append(CopiedTensor(source.rows(place, rows)))
    return JoinedTensor(base if base.tensor.shape == source.tensor.shape else source, tuple(parts))


def _grown(tasks: Mapping[str, ReplacedTensor | JoinedTensor], fitted: Fitted) -> dict[str, int]:
    """Return the number of tokens of each tensor that has other tokens than the base."""
    return {
        name: task.source.tensor.shape[0]
        for name, task in tasks.items()
        if name in fitted.sources
        and _has_tokens(name)
        and task.source.tensor.shape != fitted.sources[name].tensor.shape
    }


def _left_small(
    grown: Mapping[str, int],
    tasks: Mapping[str, ReplacedTensor | JoinedTensor],
    fitted: Fitted,
) -> Iterator[str]:
    """Yield a message where one of embeddings and head has grown, and the other has not."""
    if not grown:
        return
    size = max(grown.values())
    tied = set() if fitted.tied is None else {fitted.tied.embedding, *fitted.tied.sources}
    has_other_head = any(name not in fitted.sources for name in tasks)
    for name, source in fitted.sources.items():
        shape = (tasks[name].source if name in tasks else source).tensor.shape
        is_left = (name in tied and name not in tasks) or (has_other_head and is_head(name))
        is_bias = name.endswith("final_logits_bias") or (
            fitted.tied is not None and name == fitted.tied.bias
        )
        if is_bias and shape[-1] != size:
            yield (
                f"the adapter has {size} tokens in {next(iter(grown))}, but {name} has "
                f"{shape[-1]}: give the BASE whose embeddings have the new size"
            )
        if _has_tokens(name) and shape[0] != size and not is_left and name.endswith(".weight"):
            yield _too_small(next(iter(grown)), size, name, shape[0])


def _too_small(grown: str, size: int | None, name: str, rows: int | str) -> str:
    return (
        f"the adapter has {size} tokens in {grown}, but {name} has {rows}: save the adapter with "
        "save_embedding_layers=True, or give the BASE whose embeddings have the new size"
    )
