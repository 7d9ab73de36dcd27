"""A weight that is quantised again: its merged rows are joined to whole groups of the format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from doraxp._base.types import HostArray
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._quantised.reader import QuantisedReader
from doraxp.checkpoint._rows import Block
from doraxp.checkpoint._survival import Survival


class Piece(NamedTuple):
    """Some rows of the new weight."""

    start: int
    """Their place in the matrix (rows, columns) that the weight is, with all stacks flat."""
    exact: HostArray
    """The new rows, (k, columns)."""
    block: Block | None = None
    """The block of a merge that they are, by its own rows; None for a copy."""
    survival: Survival | None = None
    """Measures that block."""

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + len(self.exact)

    def cut(self, start: int, stop: int) -> Piece:
        """Return the part of the piece between two rows of the matrix."""
        own, block = slice(start - self.start, stop - self.start), self.block
        if block is not None:
            first = block.rows.start
            rows = slice(first + own.start, first + own.stop)
            block = block._replace(rows=rows, weight=block.weight[own], merged=block.merged[own])
        return Piece(start, self.exact[own], block, self.survival)

    def kept(self) -> Piece:
        """Return a copy, which the next block does not overwrite."""
        exact, block = self.exact.copy(), self.block
        if block is not None:
            block = block._replace(weight=block.weight.copy(), merged=exact)
        return Piece(self.start, exact, block, self.survival)


Pieces: TypeAlias = Callable[[], Iterable[Piece]]
"""Returns all rows of the new weight from the first to the last, anew at each call."""


def requantise(
    weight: QuantisedReader, pieces: Pieces, write: Callable[[str, HostArray], None]
) -> None:
    """Quantise new rows in the format of a weight, and write its tensors.

    Parameters
    ----------
    weight : QuantisedReader
        The weight in the base.
    pieces : callable
    write : callable
        Takes the name of a tensor on disk in the base and its next numbers.
    """
    quantisation = weight.quantisation
    quantiser, step = quantisation.quantiser(weight.fetch), quantisation.step
    rows = int(np.prod(quantisation.shape[:-1]))
    codes, *others = quantisation.tensors
    if quantiser.passes > 1:
        for group in _whole_groups(pieces(), step, rows):
            quantiser.measure(slice(group[0].start, group[-1].stop), _joined(group))
    for group in _whole_groups(pieces(), step, rows):
        start = group[0].start
        quantised = quantiser.quantise(slice(start, group[-1].stop), _joined(group))
        if not np.isfinite(quantised.weight).all():
            raise CheckpointError(f"{weight.name} has values that its format cannot store")
        write(codes, quantised.stored)
        for piece in group:
            if piece.block is not None and piece.survival is not None:
                own = quantised.weight[piece.start - start : piece.stop - start]
                piece.survival.add(piece.block, own)
    changed = quantiser.rest()
    for name in others:
        write(name, changed[name] if name in changed else weight.sources[name].read())


def _joined(group: list[Piece]) -> HostArray:
    return group[0].exact if len(group) == 1 else np.concatenate([one.exact for one in group])


def _whole_groups(pieces: Iterable[Piece], step: int, rows: int) -> Iterator[list[Piece]]:
    """Yield the pieces in groups, cut where a group must begin: at a multiple of `step`."""
    held: list[Piece] = []
    for piece in pieces:
        start = piece.start
        if held:
            start = min(held[0].start // step * step + step, piece.stop)
            held.append(piece.cut(piece.start, start).kept())
            if start % step and start < rows:
                continue
            yield held
            held = []
        end = piece.stop if piece.stop == rows else piece.stop // step * step
        if start < end:
            yield [piece.cut(start, end)]
        if end < piece.stop:
            held = [piece.cut(max(start, end), piece.stop).kept()]
