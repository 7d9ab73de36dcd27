"""`separate_head`: whether tied embeddings and head part, and the head's task if they do."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

from doraxp._base.words import counted
from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._safetensors import AnySource, Source, are_equal
from doraxp.checkpoint._tasks import (
    CopiedTensor,
    JoinedTensor,
    MergedTensor,
    ReplacedTensor,
    Task,
    parts_of,
)
from doraxp.checkpoint._tied import Tied


def separate_head(
    tied: Tied,
    changed: dict[str, Task],
    whole: Mapping[str, Task],
    sources: Mapping[str, AnySource],
    adapters: AdapterSet,
) -> bool:
    """Return whether the result has a head of its own, and put its task into `changed`.

    ::

        E  embeddings of the base, after PEFT resized them
        embeddings trained       E' and a head E
        head trained             E and a head
        both trained as one      E' alone

    Where encoder and decoder share the embeddings, each then gets E too. Where the head's bias is
    another tensor of the base, the head then gets its own.

    Parameters
    ----------
    tied : Tied
        The names of the embeddings and of the head.
    changed : dict of str to Task
        The tasks of the tensors that change. The head's is added or removed.
    whole : mapping of str to Task
        The tasks of the tensors that the adapter's file has in full.
    sources : mapping of str to AnySource
        The base's tensors.
    adapters : AdapterSet
    """
    if changed.keys().isdisjoint((*tied.sources, *tied.sources.values())):
        return False
    if not tied.head:
        raise CheckpointError(
            f"{tied.embedding} is the output head too, and the name of the head in a model of this "
            "type is not known: save the base with tie_word_embeddings false and a head of its own"
        )
    is_apart = _are_apart(tied, changed, whole, sources, adapters)
    _part_biases(tied, changed, sources, are_apart=is_apart)
    if not is_apart:
        changed.pop(tied.head, None)
        if tied.embedding in changed:
            changed |= dict.fromkeys(tied.in_file, changed[tied.embedding])
        return False
    if not tied.copies and {tied.embedding, tied.head} <= changed.keys():
        return True
    before = _before(tied, whole, sources, adapters)
    if tied.embedding not in changed and not isinstance(before, CopiedTensor):
        changed[tied.embedding] = before
    for name in (tied.head, *tied.copies):
        changed.setdefault(name, before)
    return True


def separate_shared(
    shared: str,
    copies: Collection[str],
    changed: dict[str, Task],
    whole: Mapping[str, Task],
    sources: Mapping[str, AnySource],
    adapters: AdapterSet,
) -> None:
    """Give encoder and decoder embeddings of their own where the shared ones alone were trained.

    The head of the model has a tensor of its own.
    """
    task = changed.get(shared)
    is_saved = isinstance(task, ReplacedTensor) and "shared" not in adapters.head.modules
    if task is None or is_saved:
        return  # PEFT saves resized embeddings on its own account
    for name in copies:
        changed.setdefault(name, _before(Tied(shared, name), whole, sources, adapters))


def _are_apart(
    tied: Tied,
    changed: Mapping[str, Task],
    whole: Mapping[str, Task],
    sources: Mapping[str, AnySource],
    adapters: AdapterSet,
) -> bool:
    """Return whether the training made two tensors of the embeddings and the head."""
    for name, source in tied.sources.items():
        if name in changed and name != tied.head:
            other = changed.get(source, CopiedTensor(sources[source]))
            if not _are_equal(changed[name], other):
                return True
    embedding, head = changed.get(tied.embedding), changed.get(tied.head)
    if head is None:
        is_one = isinstance(embedding, JoinedTensor) and not tied.rows_alone
        if embedding is None or adapters.ties_weights or is_one:
            return False  # PEFT trains single rows of both as one
        return _before(tied, whole, sources, adapters) != embedding
    return embedding is None or not _are_equal(embedding, head)


def _part_biases(
    tied: Tied, changed: dict[str, Task], sources: Mapping[str, AnySource], *, are_apart: bool
) -> None:
    """Give the head a bias of its own, or put the trained one in place of the base's."""
    if not tied.bias:
        return
    if are_apart:
        bias = changed.get(tied.bias, CopiedTensor(sources[tied.bias]))
        changed.setdefault(tied.head_bias, bias)
    else:
        changed.pop(tied.head_bias, None)


def _before(
    tied: Tied, whole: Mapping[str, Task], sources: Mapping[str, AnySource], adapters: AdapterSet
) -> Task:
    """Return the task of the embeddings as they were before the training."""
    base = sources[tied.embedding]
    saved = {name: whole[name] for name in (tied.embedding, tied.head) if name in whole}
    grown = {name: task for name, task in saved.items() if isinstance(task, ReplacedTensor)}
    for task in saved.values():
        if isinstance(task, JoinedTensor) and task.source.tensor.shape != base.tensor.shape:
            return ReplacedTensor(task.source, base.tensor.dtype)  # the resized ones
    for task in grown.values():
        if ".base_layer." in task.source.name or are_equal(task.source, base):
            return task  # PEFT saved the base's embeddings, which may have been resized
    sizes = {task.source.tensor.shape for task in grown.values()} - {base.tensor.shape}
    if not sizes:
        return CopiedTensor(base)
    for name, file in adapters.untrained.items():
        own = next((task for end, task in grown.items() if name.endswith(end)), None)
        if own is not None:
            return ReplacedTensor(Source(adapters.reader, file), own.dtype)
    (name, task), *_ = grown.items()
    other = tied.head if name == tied.embedding else tied.embedding
    tokens = counted(task.source.tensor.shape[0], "token")
    raise CheckpointError(
        f"the adapter has {tokens} in {name}, but {other} has those of BASE: save the "
        "adapter with save_embedding_layers=True, or give the BASE whose embeddings have the "
        "new size"
    )


def _are_equal(one: Task, other: Task) -> bool:
    """Return whether two tensors are made of the base's rows and of equal ones of the file."""
    return all(
        mine == yours
        or (
            not isinstance(mine, MergedTensor)
            and type(mine) is type(yours)
            and are_equal(mine.source, yours.source)
        )
        for mine, yours in itertools.zip_longest(parts_of(one), parts_of(other))
    )
