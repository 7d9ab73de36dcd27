"""The functions of a format's module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from doraxp._base.types import Array
from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._safetensors import Reader
from doraxp.checkpoint._updated_layer import AnyLayer


class Format(Protocol):
    """A format that can be read."""

    def recognises(self, reader: Reader, parts: Collection[str]) -> bool:
        """Return True if a file is in this format.

        `parts` are the last three dotted parts of all names in the file.
        """

    def read(self, reader: Reader) -> AdapterSet:
        """Describe the adapters in a file, from its header and its configuration."""


class Written(NamedTuple):
    """The content of an adapter's folder."""

    tensors: dict[str, Array]
    config: JsonObject | None
    """Of ``adapter_config.json``; None for a format without that file."""
    metadata: Mapping[str, str]
    """Entries of the file's header."""


@runtime_checkable
class WritableFormat(Format, Protocol):
    """A format that can also be written: a folder of one file of tensors and a configuration."""

    NAME: str
    """As `doraxp.checkpoint.save_adapters` takes it."""
    FILE: str
    """The name of the file of tensors."""

    def write(self, adapters: Mapping[str, AnyLayer]) -> Written:
        """Return the folder's content; ValueError where it cannot hold an adapter exactly."""
