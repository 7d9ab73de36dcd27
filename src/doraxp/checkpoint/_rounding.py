"""The rounding of a merged weight to its dtype on disk: to the nearest number, or stochastic.

Stochastic rounding takes one of the two neighbours of x, the farther one with the smaller
probability, so that its mean is x::

    low ≤ x ≤ high      P(high) = (x − low) / (high − low)

An update that is smaller than the distance of two numbers of a 16-bit dtype is then kept in the
mean over many numbers. To nearest, nearly all of it is lost.

The random bits are those of Philox4x64-10, whose n-th output is a function of the key and of n.
The key is the seed and the name of the tensor, and element i takes the 16 bits of position i. So
the bytes depend neither on the machine nor on the order in which the blocks are rounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._engine import Reused
from doraxp.checkpoint._options import Options
from doraxp.checkpoint._precision import count_infinite
from doraxp.checkpoint._safetensors import DTYPES

PIECE = 1 << 16
"""Numbers that are rounded at a time; their bits stay in the cache. A multiple of 16."""
_BFLOAT16 = DTYPES["BF16"]
_PER_COUNTER = 16
"""Numbers that the four words of one counter serve."""


class Stochastic(NamedTuple):
    """The source of the random bits of one tensor."""

    seed: int
    name: str

    def bits(self, start: int, stops: Iterable[int]) -> Iterator[HostArray]:
        """Yield the random bits of the elements from `start` to each of `stops`, as uint16.

        All of `stops` but the last must be multiples of 16.
        """
        digest = hashlib.blake2b(self.name.encode(), digest_size=8).digest()
        counter, skipped = divmod(start, _PER_COUNTER)
        key = [self.seed, int.from_bytes(digest, "little")]
        philox = np.random.Philox(key=key, counter=counter)
        for stop in stops:
            counters = -(-stop // _PER_COUNTER) - counter
            words = philox.random_raw(4 * counters).astype("<u8", copy=False)
            yield words.view("<u2")[skipped : skipped + stop - start]
            start, counter, skipped = stop, counter + counters, 0


def stochastic(name: str, tensor: Tensor, options: Options) -> Stochastic | None:
    """Return the random bits of a merged tensor; None where it is rounded to the nearest number.

    float32 and float64 always are: they keep every update.
    """
    if options.rounding == "nearest" or tensor.dtype not in ("BF16", "F16"):
        return None
    return Stochastic(options.seed, name)


def to_nearest(
    rows: HostArray, dtype: np.dtype[np.generic], memory: Reused | None = None
) -> HostArray:
    """Return `rows` in `dtype`, rounded to the nearest number, ties to even.

    Raises
    ------
    FloatingPointError
        A finite number in `rows` is infinity in `dtype`.
    """
    with np.errstate(over="raise"):
        written = np.ascontiguousarray((memory or Reused()).cast(rows, dtype))
    # NumPy raises for its own dtypes only.
    is_suspect = dtype == _BFLOAT16 and count_infinite(written) > 0
    if is_suspect and (np.isfinite(rows) & ~np.isfinite(written)).any():
        raise FloatingPointError("overflow in bfloat16")
    return written


def to_either(
    rows: HostArray,
    dtype: np.dtype[np.generic],
    source: Stochastic,
    start: int,
    memory: Reused | None = None,
) -> HostArray:
    """Return `rows` in a dtype of 16 bits, each number rounded up or down at random.

    Parameters
    ----------
    rows : array
        Some rows of the tensor, float32 or float64. float64 is rounded to float32 first.
    dtype : dtype
        bfloat16 or float16.
    source : Stochastic
    start : int
        The position in the tensor of the first element of `rows`.
    memory : Reused, optional
        Allocates the result.

    Raises
    ------
    FloatingPointError
        A finite number in `rows` is infinity in `dtype`, rounded to nearest.
    """
    written = (memory or Reused())(rows.shape, dtype)
    numbers, result = np.ascontiguousarray(rows).reshape(-1), written.reshape(-1)
    end = start + numbers.size
    aligned = range(start - start % _PER_COUNTER + PIECE, end, PIECE)
    stops, first = (*aligned, end), 0
    scratch = np.empty(PIECE, np.uint32)
    rounded = _to_bfloat16 if dtype == _BFLOAT16 else _to_float16
    for bits in source.bits(start, stops):
        piece = slice(first, first + bits.size)
        exact, out, first = numbers[piece], result[piece], piece.stop
        with np.errstate(over="ignore"):
            x = exact.astype(np.float32, copy=False)
        rounded(x, bits, out, scratch[: bits.size])
        # NaN, infinity, and numbers beside the largest one, which have no neighbour above.
        if not np.isfinite(x).all() or count_infinite(out):
            odd = ~np.isfinite(x) | ~np.isfinite(out)
            out[odd] = to_nearest(exact[odd], dtype)
    return written


def _to_bfloat16(x: HostArray, bits: HostArray, out: HostArray, scratch: HostArray) -> None:
    """Add the random bits below the last bit of bfloat16, and cut there.

    The bits of a positive float count its neighbours, also those of subnormal numbers.
    """
    np.copyto(scratch, bits)
    np.add(x.view(np.uint32), scratch, out=scratch)
    np.right_shift(scratch, 16, out=scratch)
    np.copyto(out.view(np.uint16), scratch, casting="unsafe")


def _to_float16(x: HostArray, bits: HostArray, out: HostArray, scratch: HostArray) -> None:
    """Do the same with the 13 bits that float16 lacks, or in units of its subnormal numbers."""
    np.right_shift(bits, 3, out=scratch, dtype=np.uint32)
    np.add(x.view(np.uint32), scratch, out=scratch)
    np.bitwise_and(scratch, 0xFFFFE000, out=scratch)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, scratch.view(np.float32), casting="unsafe")
    small = np.flatnonzero(np.abs(x) < 2.0**-14)
    units = np.abs(x[small].astype(np.float64)) * 2.0**24
    steps = np.floor(units + bits[small] * 2.0**-16) * 2.0**-24
    out[small] = np.copysign(steps, x[small])
