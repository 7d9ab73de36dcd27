"""Passes over (tokens, out) and (out, rank) on NVIDIA GPUs: each reads its arrays once."""

from __future__ import annotations

import math

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.arrays import DeviceArray, column_blocks, one_type, packed, types_of
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.products import Products, is_reduced
from doraxp.backends._cupy.signatures import Gradients, NormRows, Outputs, OverNorm, Turning
from doraxp.backends._cupy.source import LIMIT, THREADS, blocks

LEAST, CHUNK, CHUNKS = 4, 32, 64
"""The fewest and the most tokens of a chunk, and how many chunks there are in between."""
RUN = 4
"""Tokens that a thread of `outputs` takes. It loads gain and bias once for them."""


class Passes:
    """The passes before and after the products."""

    def __init__(self, xp: Namespace, cuda: Cuda, products: Products) -> None:
        self.xp, self.cuda, self.products = xp, cuda, products

    def outputs(
        self, z: DeviceArray, row_scale: DeviceArray | None,
        update: tuple[DeviceArray, DeviceArray] | None, gain: DeviceArray, bias: DeviceArray | None,
        dtype: DType,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return z ← ρ⊙z + L (s B)ᵀ for `update` = (L, s B), and y = g⊙z + bias in `dtype`.

        Overwrites `z`, which must be in C order.
        """
        *stack, tokens, out = z.shape
        y = self.cuda.empty(z.shape, dtype)
        if y.size == 0:
            return z, y
        row_scale, gain, bias = (packed(v, self.xp) for v in (row_scale, gain, bias))
        types = types_of(y, z, gain)
        added = None
        if update is not None:
            low_rank, transposed = update[0], self.xp.matrix_transpose(update[1])
            if row_scale is None:
                z = self.products.multiply(low_rank, transposed, z.dtype, out=z, beta=1.0)
            else:
                added = self.products.multiply(low_rank, transposed, z.dtype)
        changed = None if row_scale is None and added is None else z
        arguments = Outputs(
            base=z, update=added, row_scale=row_scale, gain=gain, bias=bias, z=changed, y=y,
            tokens=tokens, out=out,
        )  # fmt: skip
        grid = column_blocks(out, y), min(blocks(tokens, RUN), LIMIT), math.prod(stack)
        self.cuda.launch(arguments, types, grid)
        return z, y

    def gradients(
        self, d: DeviceArray, z: DeviceArray, gain: DeviceArray, room: int, *, total: bool
    ) -> tuple[DeviceArray, DeviceArray, DeviceArray | None]:
        """Return g⊙d, Σ_tokens d⊙z and, with `total`, Σ_tokens d.

        The first array has `room` more rows than d, which are not written yet: see `norm_rows`.
        """
        xp = self.xp
        d = packed(d, xp)
        *stack, tokens, out = d.shape
        kind = d.dtype if is_reduced() and z.dtype == d.dtype else gain.dtype
        z = packed(xp.astype(z, kind, copy=False), xp)
        rows = self.cuda.empty((*stack, tokens + room, out), kind)
        each, chunks = _chunks(tokens)
        along = self.cuda.empty((*stack, chunks, out), gain.dtype)
        totals = self.cuda.empty((*stack, chunks, out), gain.dtype) if total else None
        arguments = Gradients(
            dy=d, z=z, gain=gain, dz=rows, sum_dyz=along, sum_dy=totals, tokens=tokens,
            rows=tokens + room, out=out, per_chunk=each,
        )  # fmt: skip
        grid = column_blocks(out, d), chunks, math.prod(stack)
        self.cuda.launch(arguments, types_of(d, z, gain), grid)
        e = self.products.sum_chunks(along)
        return rows, e, None if totals is None else self.products.sum_chunks(totals)

    def norm_rows(
        self,
        rows: DeviceArray,
        tokens: int,
        e: DeviceArray,
        gain: DeviceArray,
        norm: DeviceArray,
        scaled_b: DeviceArray,
    ) -> tuple[DeviceArray, DeviceArray]:
        """Return dm = e / n and p = g⊙dm, and write (q⊙(s B))ᵀ below the first rows of `rows`.

        q is −p / n. `rows` comes from `gradients`; its first `tokens` rows are g⊙d.
        """
        *stack, out, rank = scaled_b.shape
        dm, p = (self.cuda.empty(e.shape, e.dtype) for _ in range(2))
        arguments = NormRows(
            sum_dyz=e, gain=gain, norm=norm, b=packed(scaled_b, self.xp), dm=dm, p_result=p,
            dz=rows, tokens=tokens, out=out, rank=rank,
        )  # fmt: skip
        grid = blocks(out, THREADS), min(rank, LIMIT), math.prod(stack)
        self.cuda.launch(arguments, types_of(rows, rows, e), grid)
        return dm, p

    def turning(
        self, db: DeviceArray, p: DeviceArray, unit_projection: DeviceArray, scaling: float
    ) -> DeviceArray:
        """Return db ← s (db − p⊙(V Aᵀ / n)). Overwrites `db`."""
        arguments = Turning(
            db=db, p=p, unit=unit_projection, size=db.size, rank=db.shape[-1], scaling=scaling
        )
        self.cuda.launch(arguments, one_type(db), (blocks(db.size, THREADS), 1, 1))
        return db

    def over_norm(self, values: DeviceArray, norm: DeviceArray) -> DeviceArray:
        """Return values / n by rows, and 0 where n = 0."""
        values, norm = packed(values, self.xp), packed(norm, self.xp)
        result = self.cuda.empty(values.shape, values.dtype)
        if values.size:
            arguments = OverNorm(
                values=values, norm=norm, result=result, size=values.size,
                per_row=values.size // norm.size,
            )  # fmt: skip
            self.cuda.launch(arguments, one_type(values), (blocks(values.size, THREADS), 1, 1))
        return result


def _chunks(tokens: int) -> tuple[int, int]:
    """Return the number of tokens of a chunk, and the number of chunks."""
    each = max(LEAST, min(CHUNK, tokens // CHUNKS), blocks(tokens, LIMIT))
    return each, max(1, blocks(tokens, each))
