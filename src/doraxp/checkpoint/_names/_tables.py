"""The renames of model families: names of modules in memory, and those of their tensors on disk.

``families.json`` has them, as they were found by value: a model was saved, adapted, merged and
saved again, and the tensor that changed is the module's. `DROPPED` components are left out of both
names before a table is used.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Set
from importlib import resources
from typing import NamedTuple, TypeAlias

Rename: TypeAlias = Callable[[str], str]

DROPPED = frozenset({"model", "language_model"})
WRAPPERS = frozenset(
    {
        "base_model",
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
)
"""Components that PEFT, DDP, torch.compile, FSDP and activation checkpointing add."""


class Table(NamedTuple):
    """The renames of some families of models."""

    families: frozenset[str]
    """Their ``model_type`` in config.json."""
    rename: Rename
    permuted: re.Pattern[str] | None
    """The modules whose rows these families store in another order than that in memory."""


def without(components: Set[str], name: str) -> str:
    """Return a name without these components."""
    parts = name.split(".")
    if components.isdisjoint(parts):
        return name
    return ".".join(part for part in parts if part not in components)


@functools.cache
def tables() -> tuple[Table, ...]:
    """Return the tables of all families."""
    text = resources.files(__package__).joinpath("families.json").read_text("utf-8")
    return tuple(
        Table(
            frozenset(entry["families"]),
            _by_parts(entry["renames"]) if "renames" in entry else _by_names(entry["names"]),
            re.compile(entry["permuted"]) if "permuted" in entry else None,
        )
        for entry in json.loads(text)
    )


def _by_parts(renames: Mapping[str, str]) -> Rename:
    """Return the rename of runs of whole components, the longest first."""
    order = sorted(renames, key=lambda old: (-old.count("."), -len(old)))
    pattern = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, order))})(?![^.])")

    def rename(name: str) -> str:
        renamed = pattern.sub(lambda match: renames[match[0]], name)
        return ".".join(filter(None, renamed.split(".")))

    return rename


def _by_names(names: Mapping[str, str]) -> Rename:
    """Return the rename of whole names, in which a component N stands for a number."""
    shapes = {_numbers_as_n(old): new for old, new in names.items()}

    def rename(name: str) -> str:
        new = shapes.get(_numbers_as_n(name), name)
        numbers = iter(part for part in name.split(".") if part.isdecimal())
        return ".".join(next(numbers, "") if part == "N" else part for part in new.split("."))

    return rename


def _numbers_as_n(name: str) -> str:
    return ".".join("N" if part.isdecimal() else part for part in name.split("."))
