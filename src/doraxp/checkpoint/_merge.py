"""`Merge`: a base and an adapter that fit together, before the merge begins."""

from __future__ import annotations

import filecmp
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from doraxp._base.safetensors import Tensor
from doraxp._base.scalars import check_real
from doraxp.checkpoint._adapters import CONFIG, AdapterSet
from doraxp.checkpoint._config_edits import ConfigEdits
from doraxp.checkpoint._errors import changed
from doraxp.checkpoint._fit import AS_FILED, Fit
from doraxp.checkpoint._formats import load_adapters
from doraxp.checkpoint._model import INDEXES, Model, open_model
from doraxp.checkpoint._norm_guard import residual_fits
from doraxp.checkpoint._options import Options
from doraxp.checkpoint._plan import plan
from doraxp.checkpoint._quantised.reader import quantised_in
from doraxp.checkpoint._safetensors import Reader, Source
from doraxp.checkpoint._stamp import Stamp, check_stamps, stamps_at
from doraxp.checkpoint._sums import Summand, summed
from doraxp.checkpoint._tasks import (
    Changed,
    CopiedTensor,
    JoinedTensor,
    Part,
    ReplacedTensor,
    Task,
    WrittenTask,
    merged_in,
    part_name,
    parts_of,
    written_as,
)
from doraxp.checkpoint._tied import is_embedding, is_head, tied_head
from doraxp.checkpoint._written import (
    Fate,
    by_width,
    fates_of,
    unloadable,
    with_dense,
    written_tasks,
)

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "chat_template*", "added_tokens.json", "vocab.*",
    "merges.txt",
)  # fmt: skip
_WHOLE_TOKENIZER, _SENTENCEPIECE = "tokenizer.json", Path("tokenizer.model")


class Weighted(NamedTuple):
    """An adapter of a sum."""

    path: str | os.PathLike[str]
    strength: float = 1.0
    """How many times its change of the weights is added."""
    subfolder: str | None = None
    adapter_name: str | None = None
    """As `load_adapters` takes them."""


class Merge(NamedTuple):
    """A base and adapters that fit together, and how to merge them."""

    model: Model
    adapters: tuple[AdapterSet, ...]
    given: tuple[Weighted, ...]
    """Where each adapter is from, and how many times its change is added."""
    tasks: dict[str, Task]
    """By the names of the base's tensors: first those that change, then the copied ones."""
    options: Options
    fit: Fit
    lead: str
    """The part that the result's names have before those of the base; see `Plan`."""
    edits: ConfigEdits
    """The changes of the model's config.json."""
    unused: tuple[str, ...]
    """Modules of the adapter that are for another part of the model than BASE."""
    fates: Mapping[str, Fate]
    """The fate of each quantised weight of the base, by its name there."""
    stamps: Mapping[Path, Stamp]
    """Of the files without tensors: configurations, the index, and the other files to copy."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """How many times the change by each adapter is added."""
        return tuple(one.strength for one in self.given)

    @property
    def readers(self) -> list[Reader]:
        """The files with tensors: the shards of the base, and the adapters."""
        return [*self.model.shards.values(), *(one.reader for one in self.adapters)]

    def check_inputs(self) -> None:
        """Raise ChangedError unless each file is the one that was planned for."""
        check_stamps({reader.path: reader.stamp for reader in self.readers} | dict(self.stamps))

    @property
    def changed(self) -> dict[str, Changed | ReplacedTensor | JoinedTensor]:
        """The tasks of the tensors that change."""
        return {
            name: task for name, task in self.tasks.items() if not isinstance(task, CopiedTensor)
        }

    def unloadable_experts(self) -> str | None:
        """Return experts that become dense, which transformers could not load; else None."""
        return unloadable(self.model, self.fates)

    @property
    def was_tied(self) -> bool:
        """Whether the embeddings of the base are its output head too."""
        return tied_head(self.model.sources().keys(), self.model.config) is not None

    def changes_unknown_tie(self) -> bool:
        """Return whether embeddings change that may be the head too, as no file tells."""
        return (
            not self.model.config
            and not any(map(is_head, self.tasks))
            and any(map(is_embedding, self.changed))
        )

    def unknown_base(self) -> str | None:
        """Return the initialisation whose residual base this is, if the norms do not tell it."""
        parts = [one for _, part, _ in self.changed_parts() for one in merged_in(part)]
        for adapters in self.adapters if self.fit.residual else ():
            own = [
                part
                for part in parts
                if part.adapters is adapters and part.source.reader is not adapters.reader
            ]
            if adapters.base_change and own and residual_fits(own) is None:
                return adapters.base_change
        return None

    def changed_parts(self) -> Iterator[tuple[str, Part, Tensor]]:
        """Yield the label, the part and the tensor's entry of all that changes.

        A fused tensor has a part for each module; a tensor that is replaced has one.
        """
        for name, task in self.changed.items():
            entry = self._entry(task)
            merged = [part for part in parts_of(task) if isinstance(part, Changed)]
            for part in merged:
                yield part_name(name, task, part), part, entry
            if not merged:
                yield name, next(iter(parts_of(task))), entry

    def _entry(self, task: Task) -> Tensor:
        """Return the entry of a tensor in the result; its dtype may be a format of quantising."""
        weight = quantised_in(task.source)
        if weight is None or self.fates[weight.name] != "requantised":
            return written_as(task, self.options)
        how = weight.quantisation
        return Tensor(how.label, how.shape, weight.stored_bytes)

    def base(self, name: str) -> Source | None:
        """Return the tensor of the base under a name of the result; None for an added one."""
        return self.model.sources().get(name.removeprefix(self.lead))

    def tasks_of(self, shard: str) -> dict[str, WrittenTask]:
        """Return the tasks of one shard of the result, by the names in that file.

        Tensors that the base lacks follow those of its last shard.
        """
        prefix = self.model.prefix(shard)
        names = [prefix + name for name in self.model.shards[shard].tensors]
        written = written_tasks(names, self.model, self.tasks, self.lead, self.fates)
        weights = (self.model.weight_of.get(name) for name in names)
        is_dense = any(one is not None and self.fates[one.name] == "dense" for one in weights)
        if is_dense or list(written) != [f"{self.lead}{name}" for name in names]:
            written = by_width(written, self.options)
        written |= {name: self.tasks[name] for name in self.added if self.model.home(name) == shard}
        return {name.removeprefix(prefix): task for name, task in written.items()}

    @property
    def added(self) -> list[str]:
        """The names of the tensors that the base does not have."""
        there = {f"{self.lead}{name}" for name in self.model.sources()}
        return [name for name in self.tasks if name not in there]

    def entries(self, shard: str) -> dict[str, Tensor]:
        """Return the entries of one shard of the result: dtype, shape and bytes."""
        return {name: written_as(task, self.options) for name, task in self.tasks_of(shard).items()}

    def shard_size(self, shard: str) -> int:
        """Return the bytes of the tensors in one shard of the result."""
        return sum(entry.nbytes for entry in self.entries(shard).values())

    @property
    def size(self) -> int:
        """The bytes of all tensors in the result."""
        return sum(self.shard_size(name) for name in self.model.shards)

    def tokenizers_apart(self) -> dict[str, bool]:
        """Return the tokenizer files beside the adapter that differ from the base's.

        The value is True where the base has a file of that name. Trainers save such files with
        the adapter, and they may have tokens or a chat template that the training used.
        """
        if not self.model.is_folder or self.edits.vocab_size is not None:
            return {}
        base = self.model.path
        files = [file for one in self.adapters for file in tokenizer_files(one.reader.path.parent)]
        return {
            file.name: (base / file.name).is_file()
            for file in files
            if not (base / file.name).is_file()
            or not filecmp.cmp(file, base / file.name, shallow=False)
        }

    def tokenizer(self) -> list[Path]:
        """Return the tokenizer files that replace those of the base: of a grown vocabulary."""
        if not self.model.is_folder or self.edits.vocab_size is None:
            return []
        # A sum has the vocabulary of the base, so one adapter alone changes the weights.
        pairs = zip(self.adapters, self.strengths, strict=True)
        (adapters,) = (adapters for adapters, strength in pairs if strength)
        return tokenizer_files(adapters.reader.path.parent)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a tokenizer in a folder."""
    files = (file for pattern in _TOKENIZER for file in folder.glob(pattern))
    return sorted(file for file in files if file.is_file())


def plan_merge(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Sequence[Weighted],
    options: Options,
    *,
    fit: Fit = AS_FILED,
    subfolder: str | None = None,
    adapter_name: str | None = None,
) -> Merge:
    """Read the headers of a model and of its adapters, and compare them.

    Parameters
    ----------
    base : path
    adapter : path, or sequence of Weighted
        Of several adapters the changes are added: W + Σ strength (W'ᵢ − W). The order does not
        matter, bit for bit.
    options : Options
    fit : Fit
        How the adapter fits the base, where the files do not say it.
    subfolder, adapter_name : str, optional
        As `load_adapters` takes them; of each Weighted that has none of its own.

    Raises
    ------
    CheckpointError
        A file is malformed, or an adapter does not fit the base.
    ValueError
        `adapter` is an empty sequence, or a strength is not a finite number.
    OSError
        A file cannot be read.
    """
    given = [Weighted(adapter)] if isinstance(adapter, str | os.PathLike) else list(adapter)
    if not given:
        raise ValueError("adapter must be a path or at least one Weighted, got none")
    strengths = tuple(check_real("strength", one.strength) for one in given)
    odd = next((one for one in strengths if not math.isfinite(one)), None)
    if odd is not None:
        raise ValueError(f"strength must be finite, got {odd}")
    # Workers of a cluster may run in other folders, so a plan has absolute paths.
    base = Path(base).absolute()
    given = [
        Weighted(
            Path(one.path).absolute(),
            strength,
            subfolder if one.subfolder is None else one.subfolder,
            adapter_name if one.adapter_name is None else one.adapter_name,
        )
        for one, strength in zip(given, strengths, strict=True)
    ]
    beside = (
        file for one in given for file in _configurations(base, Path(one.path), one.subfolder)
    )
    read = list(dict.fromkeys(beside))
    before = stamps_at(read)
    model = open_model(base)
    adapters = tuple(
        load_adapters(one.path, subfolder=one.subfolder, adapter_name=one.adapter_name)
        for one in given
    )
    plans = [plan(model, one, fit) for one in adapters]
    tasks, lead, edits, unused, _ = summed(
        [Summand(*one) for one in zip(plans, adapters, strengths, strict=True)], model.sources()
    )
    copied = [base / file for file in model.others]
    stamps = stamps_at([*read, *copied])
    fates = fates_of(model, tasks, lead, options)
    edits = with_dense(edits, model, tasks, lead, fates)
    merge = Merge(
        model, adapters, tuple(given), tasks, options, fit, lead, edits, unused, fates, stamps
    )
    tokenizer = merge.tokenizer()
    merge = merge._replace(
        model=_without_old_tokens(model, tokenizer), stamps=stamps | stamps_at(tokenizer)
    )
    # A file may have changed, appeared or gone between its stamp and its content.
    apart = [path for path in read if stamps.get(path) != before.get(path)]
    apart += [path for path in copied if path not in stamps]
    if apart:
        raise changed(apart[0])
    return merge


def _without_old_tokens(model: Model, tokenizer: Collection[Path]) -> Model:
    """Return the model without a tokenizer.model that lacks the new tokens of tokenizer.json.

    The converter of llama.cpp reads tokenizer.model first, and then does not know the new tokens.
    """
    names = {file.name for file in tokenizer}
    if (
        _WHOLE_TOKENIZER not in names
        or _SENTENCEPIECE.name in names
        or _SENTENCEPIECE not in model.others
    ):
        return model
    others = tuple(file for file in model.others if file != _SENTENCEPIECE)
    return replace(model, others=others, left_out=(*model.left_out, _SENTENCEPIECE))


def _configurations(base: Path, adapter: Path, subfolder: str | None) -> list[Path]:
    """Return the files without tensors that a plan reads, some of which may not exist."""
    beside = adapter if adapter.is_dir() else adapter.parent
    beside = beside if subfolder is None else beside / subfolder
    folders = [base, *base.glob("*/")] if base.is_dir() else []
    own = [folder / name for folder in folders for name in ("config.json", *INDEXES)]
    return [base / "config.json", *own, beside / CONFIG, beside / "config.json"]
