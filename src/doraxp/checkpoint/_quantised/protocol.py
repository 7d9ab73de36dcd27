"""A quantised weight on disk: several tensors that are one weight, and each format's arithmetic.

::

    tensors on disk            codes q, scales, and what else the format has
    dequantise                 W = scale⊙q, rounded where the format's own reader rounds
    quantise                   the inverse: the codes whose W is nearest, by the format's own rule

Rows are those of the weight as a matrix: (rows, columns), where a stack (*stack, rows, columns) is
flat. So row r of expert e of a stack (experts, rows, columns) is row e·rows + r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, TypeAlias

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._safetensors import Empty


class Fetch(Protocol):
    """Reads tensors of a weight by their full names."""

    def __call__(self, name: str, rows: slice | None = None) -> HostArray:
        """Return a tensor, or some rows along its first axis, in the dtype of `RAW`.

        The array may be overwritten by the next call with the same name.
        """


class Quantised(NamedTuple):
    """Some rows of a weight, quantised."""

    stored: HostArray
    """The next numbers of the main tensor, in its order: those that are complete by now. Their
    shape does not matter."""
    weight: HostArray
    """The rows as the format's own reader will return them."""


class Packed(NamedTuple):
    """The arrays of a weight in memory, as `doraxp.QuantisedWeight` takes them."""

    codes: HostArray
    table: HostArray
    scale: HostArray
    group: tuple[int, int] | int
    bias: HostArray | None = None


class Quantiser(Protocol):
    """Quantises the rows of one weight, from the first to the last, in blocks."""

    passes: int
    """2 where a scale depends on all rows: then `measure` takes all rows before `quantise` does."""

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Take some rows, float32 or float64, in the first of two passes."""

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return some rows, float32 or float64, in the format."""

    def rest(self) -> dict[str, HostArray]:
        """Return the tensors beside the main one that depend on the weight, by their full names.

        Call it after the last row. All others, such as tables, are those of before.
        """


class Quantisation(Protocol):
    """How one weight is stored."""

    @property
    def label(self) -> str:
        """The format and its groups, for tables: "nf4 64"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, as the model's own library has it in memory."""

    @property
    def dtype(self) -> str:
        """The dtype that the format's own reader returns: "BF16", "F16" or "F32"."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The full names of the tensors on disk; the first one is the main tensor, of the codes."""

    @property
    def step(self) -> int:
        """`quantise` takes blocks of rows that begin at a multiple of this number."""

    @property
    def resolution(self) -> float:
        """The largest error of a number ÷ the largest number of its group, both as stored."""

    def check(self, fetch: Fetch) -> None:
        """Raise CheckpointError where values on disk break a rule of the format."""

    def dequantise(self, rows: slice, fetch: Fetch, empty: Empty) -> HostArray:
        """Return some rows of the weight, in its dtype, in an array that `empty` allocates."""

    def packed(self, fetch: Fetch) -> Packed:
        """Return all of a matrix, still packed; CheckpointError where it is not a matrix."""

    def quantiser(self, fetch: Fetch) -> Quantiser:
        """Return a quantiser that gives tensors of the same shapes and dtypes."""


class Refused(NamedTuple):
    """A quantised weight that no adapter can be merged into. It can be copied."""

    tensors: tuple[str, ...]
    """The full names of its tensors."""
    problem: str
    """The rest of a sentence that begins with the weight's name."""


class UnfitError(Exception):
    """The tensors of a weight do not fit each other. A format's module makes it a Refused."""


Found: TypeAlias = tuple[str, Quantisation | Refused]
"""The name of a weight, such as "layers.0.q_proj.weight", and how it is stored."""


class Settings(NamedTuple):
    """The words of a model's config.json about its quantisation."""

    entries: JsonObject
    """Its ``quantization_config``, of mlx-lm ``quantization``; empty without one."""
    dtype: str
    """The model's own dtype: "BF16", "F16" or "F32"; "BF16" where config.json does not say it."""


class QuantisedFormat(Protocol):
    """The functions of a format's module."""

    def find(
        self, tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch
    ) -> Iterator[Found]:
        """Yield the weights in this format.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            The entries of all tensors of the model.
        settings : Settings
        fetch : Fetch
            For small tensors whose values give the shape. All else is read from the entries.
        """
