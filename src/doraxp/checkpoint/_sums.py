"""The plan of a sum: changes of several adapters, or a part of one change.

::

    W' = W + Σ strength (W'ᵢ − W)        W'ᵢ  the merge of adapter i alone

The changes of the weights add up, and not those of V: the gain m / n of one adapter does not scale
the update of another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._config_edits import ConfigEdits
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._plan import Plan
from doraxp.checkpoint._safetensors import DTYPES, AnySource, Source, are_equal
from doraxp.checkpoint._tasks import (
    CopiedTensor,
    JoinedTensor,
    MergedTensor,
    Part,
    ReplacedTensor,
    SummedTensor,
    Task,
    parts_of,
)

_ALONE = "merge that adapter alone first, with strength 1"


class Summand(NamedTuple):
    """The plan of one adapter, and how many times its changes are added."""

    plan: Plan
    adapters: AdapterSet
    strength: float


class _Piece(NamedTuple):
    """Some rows of a tensor that one summand changes."""

    start: int
    stop: int
    part: MergedTensor | ReplacedTensor
    summand: Summand


def summed(summands: Sequence[Summand], base: Mapping[str, Source]) -> Plan:
    """Return the plan of a sum of changes. One adapter of strength 1 has its own plan.

    `base` has all tensors of the base; with strengths of 0 alone the result is a copy of it.

    Raises
    ------
    CheckpointError
        A change cannot be scaled or added, such as that of a tensor that the base does not have.
    """
    active = [summand for summand in summands if summand.strength]
    if not active:
        tasks: dict[str, Task] = {name: CopiedTensor(source) for name, source in base.items()}
        return Plan(tasks, "", ConfigEdits(), (), base)
    if len(active) == 1 and active[0].strength == 1:
        return active[0].plan
    edits = _edits(active)
    sources = {name: one for summand in active for name, one in summand.plan.sources.items()}
    changed: dict[str, Task] = {}
    for name in dict.fromkeys(name for summand in active for name in summand.plan.tasks):
        tasks_of = [(one, one.plan.tasks[name]) for one in active if name in one.plan.tasks]
        _check_head(name, [one for one, _ in tasks_of], active)
        changes = [(one, task) for one, task in tasks_of if not isinstance(task, CopiedTensor)]
        if changes:
            changed[name] = _sum(name, sources.get(name), changes)
    names = dict.fromkeys(name for summand in active for name in summand.plan.tasks)
    copied = {name: CopiedTensor(sources[name]) for name in names if name not in changed}
    unused = tuple(path for summand in active for path in summand.plan.unused)
    return Plan(changed | copied, "", edits, unused, sources)


def _edits(active: Sequence[Summand]) -> ConfigEdits:
    """Return the changes of the configuration, which all adapters that have some must share."""
    edited = [summand for summand in active if summand.plan.edits]
    for summand in edited:
        edits = summand.plan.edits
        if summand.plan.lead or replace(edits, untied=False):
            raise CheckpointError(
                f"{summand.adapters.reader.path}: brings new tensors or another vocabulary, which "
                f"cannot be scaled or added: {_ALONE}"
            )
    return edited[0].plan.edits if edited else ConfigEdits()


def _check_head(name: str, having: Sequence[Summand], active: Sequence[Summand]) -> None:
    """Raise CheckpointError where one adapter separates a head that another changes as one."""
    if len(having) == len(active):
        return
    source = having[0].plan.sources.get(name)
    for summand in active:
        tasks = summand.plan.tasks
        if name not in tasks and any(
            not isinstance(task, CopiedTensor) and task.source == source for task in tasks.values()
        ):
            raise CheckpointError(
                f"{summand.adapters.reader.path}: changes {name} and the embeddings as one tensor, "
                f"and {having[0].adapters.reader.path} changes one of them: they cannot be added"
            )


def _sum(name: str, source: Source | None, changes: Sequence[tuple[Summand, Task]]) -> Task:
    """Return the task of a tensor that some adapters change."""
    summand, task = changes[0]
    if len(changes) == 1 and summand.strength == 1:
        return task
    for summand, task in changes:
        _check(name, source, summand, task)
    assert source is not None  # `_check` refuses a new tensor
    whole, parts_there = source, [part for _, task in changes for part in parts_of(task)]
    source = next((flat for one in parts_there if (flat := source.like(one.source)).shape), source)
    pieces = [piece for summand, task in changes for piece in _pieces(summand, task, source)]
    cuts = sorted({0, source.tensor.shape[0], *(edge for piece in pieces for edge in piece[:2])})
    parts = [_segment(name, source, first, last, pieces) for first, last in pairwise(cuts)]
    return parts[0] if len(parts) == 1 and source == whole else JoinedTensor(whole, tuple(parts))


def _check(name: str, source: Source | None, summand: Summand, task: Task) -> None:
    path = summand.adapters.reader.path
    own, there = task.source.tensor, None if source is None else source.tensor
    problems = (
        (there is None, "is new"),
        (there is not None and own.shape != there.shape, f"has another shape, {own.shape}"),
        (own.dtype not in DTYPES, f"has dtype {own.dtype}, without fractions"),
        (not own.shape, "is one number"),
    )
    problem = next((text for is_so, text in problems if is_so), None)
    if problem is not None:
        raise CheckpointError(
            f"{path}: {name} {problem}, so it cannot be scaled or added: {_ALONE}"
        )
    for part in parts_of(task):
        is_own = isinstance(part, MergedTensor) and part.source.reader is summand.adapters.reader
        # PEFT saves embeddings and heads that it did not change beside their adapters.
        if is_own and source is not None and not _same_numbers(part.source, source):
            raise CheckpointError(
                f"{path}: has {name} in full, other than BASE's, and an adapter of it too, so it "
                f"cannot be scaled or added: {_ALONE}"
            )


def _same_numbers(one: AnySource, other: AnySource) -> bool:
    """Return whether two tensors of one shape have the same numbers, in dtypes of their own."""
    return are_equal(one, other) or all(
        np.array_equal(one.read(rows).astype("f8"), other.read(rows).astype("f8"))
        for rows in row_blocks(one.tensor.shape)
    )


def _pieces(summand: Summand, task: Task, source: Source) -> Iterator[_Piece]:
    start = 0
    for part in parts_of(task):
        if isinstance(part, ReplacedTensor) and isinstance(part.source, Source):
            part = replace(part, source=part.source.like(source))
        if isinstance(part, MergedTensor) and part.source.reader is summand.adapters.reader:
            part = replace(part, source=source)
        stop = start + part.source.tensor.shape[0]
        if isinstance(part, MergedTensor | ReplacedTensor):
            yield _Piece(start, stop, part, summand)
        start = stop


def _segment(name: str, source: Source, first: int, last: int, pieces: Sequence[_Piece]) -> Part:
    """Return the part of some rows, in each of which the same adapters act."""
    whole = (first, last) == (0, source.tensor.shape[0])
    own = source if whole else source.rows(first, last)
    acting = [piece for piece in pieces if piece.start <= first and last <= piece.stop]
    if not acting:
        return CopiedTensor(own)
    terms = tuple(_cut(name, piece, first, last) for piece in acting)
    if len(terms) == 1 and acting[0].summand.strength == 1:
        return terms[0]
    return SummedTensor(own, terms, tuple(piece.summand.strength for piece in acting))


def _cut(name: str, piece: _Piece, first: int, last: int) -> MergedTensor | ReplacedTensor:
    """Return the part of a piece for some of its rows."""
    part = piece.part
    if (first, last) == piece[:2]:
        return part
    start, stop = first - piece.start, last - piece.start
    path = piece.summand.adapters.reader.path
    is_whole = isinstance(part, MergedTensor) and part.layer.kind.is_transposed
    if is_whole or not isinstance(part.source, Source):
        raise CheckpointError(
            f"{path}: needs all rows of {name}, of which another adapter changes some: {_ALONE}"
        )
    source = part.source.rows(start, stop)
    if isinstance(part, ReplacedTensor):
        return replace(part, source=source)
    layer = part.layer
    rows = tuple(_within(layer.rows or (slice(0, layer.shape[0]),), start, stop))
    layer = layer._replace(shape=(last - first, *layer.shape[1:]), rows=rows)
    return replace(part, source=source, layer=layer)


def _within(places: Sequence[slice], start: int, stop: int) -> Iterator[slice]:
    """Yield the part of some slices, laid end to end, from `start` to `stop`."""
    at = 0
    for place in places:
        size = place.stop - place.start
        first, last = max(start - at, 0), min(stop - at, size)
        if first < last:
            yield slice(place.start + first, place.start + last)
        at += size
