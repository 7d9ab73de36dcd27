"""`Merge`: a base and an adapter that fit together, before the merge begins."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint._adapters import CONFIG, AdapterSet
from doraxp.checkpoint._errors import changed
from doraxp.checkpoint._formats import load_adapters
from doraxp.checkpoint._model import INDEX, Model, open_model
from doraxp.checkpoint._options import Options, written_as
from doraxp.checkpoint._plan import CopiedTensor, MergedTensor, ReplacedTensor, Task, plan
from doraxp.checkpoint._safetensors import Reader
from doraxp.checkpoint._stamp import Stamp, check_stamps, stamps_at

_TOKENIZER = ("tokenizer*", "chat_template*", "added_tokens.json", "vocab.*", "merges.txt")


class Merge(NamedTuple):
    """A base and an adapter that fit together, and how to merge them."""

    model: Model
    adapters: AdapterSet
    tasks: dict[str, Task]
    """By the names of the base's tensors: first those that change, then the copied ones."""
    options: Options
    stamps: Mapping[Path, Stamp]
    """Of the files without tensors: configurations, the index, and the other files to copy."""

    @property
    def readers(self) -> list[Reader]:
        """The files with tensors: the shards of the base, and the adapter."""
        return [*self.model.shards.values(), self.adapters.reader]

    def check_inputs(self) -> None:
        """Raise ChangedError unless each file is the one that was planned for."""
        check_stamps({reader.path: reader.stamp for reader in self.readers} | dict(self.stamps))

    @property
    def changed(self) -> dict[str, MergedTensor | ReplacedTensor]:
        """The tasks of the tensors that change."""
        return {
            name: task for name, task in self.tasks.items() if not isinstance(task, CopiedTensor)
        }

    def written(self) -> dict[str, Tensor]:
        """Return the entries of all tensors in the result, by name: dtype, shape and bytes."""
        return {
            name: written_as(tensor, self.options)
            for shard in self.model.shards.values()
            for name, tensor in shard.tensors.items()
        }

    def shard_size(self, name: str) -> int:
        """Return the bytes of the tensors in one shard of the result."""
        tensors = self.model.shards[name].tensors.values()
        return sum(written_as(tensor, self.options).nbytes for tensor in tensors)

    @property
    def size(self) -> int:
        """The bytes of all tensors in the result."""
        return sum(self.shard_size(name) for name in self.model.shards)

    @property
    def output_heads(self) -> list[str]:
        """The embeddings that change and are also the output head, which changes with them."""
        return sorted(self.model.output_heads() & self.changed.keys())

    def tokenizers_apart(self) -> dict[str, bool]:
        """Return the tokenizer files beside the adapter that differ from the base's.

        The value is True where the base has a file of that name. Trainers save such files with
        the adapter, and they may have tokens or a chat template that the training used.
        """
        if not self.model.is_folder:
            return {}
        folder, base = self.adapters.reader.path.parent, self.model.path
        own = [file for pattern in _TOKENIZER for file in folder.glob(pattern) if file.is_file()]
        there = {file.name: (base / file.name).is_file() for file in sorted(own)}
        return {
            name: known
            for name, known in there.items()
            if not known or not filecmp.cmp(folder / name, base / name, shallow=False)
        }


def plan_merge(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], options: Options
) -> Merge:
    """Read the headers of a model and of an adapter, and compare them.

    Raises
    ------
    CheckpointError
        A file is malformed, or the adapter does not fit the base.
    OSError
        A file cannot be read.
    """
    # Workers of a cluster may run in other folders, so a plan has absolute paths.
    base, adapter = Path(base).absolute(), Path(adapter).absolute()
    beside = adapter if adapter.is_dir() else adapter.parent
    read = [base / "config.json", base / INDEX, beside / CONFIG]
    before = stamps_at(read)
    model, adapters = open_model(base), load_adapters(adapter)
    copied = [base / file for file in model.others]
    stamps = stamps_at([*read, *copied])
    merge = Merge(model, adapters, plan(model, adapters), options, stamps)
    # A file may have changed, appeared or gone between its stamp and its content.
    apart = [path for path in read if stamps.get(path) != before.get(path)]
    apart += [path for path in copied if path not in stamps]
    if apart:
        raise changed(apart[0])
    return merge
