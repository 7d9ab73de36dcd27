"""`Sample`: some rows of a weight, as the audit looks at them again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import Adapter, Config
from doraxp._core.updates import LowRank
from doraxp.checkpoint._matrix import source_rows
from doraxp.checkpoint._precision import PRECISION, dtype_name, narrowest
from doraxp.checkpoint._safetensors import DTYPES, AnySource
from doraxp.checkpoint._slack import Wide
from doraxp.checkpoint._updated_layer import UpdatedLayer, dtypes_of

SLABS = 16
_ROWS, _NUMBERS = 16, 1 << 17
"""A sample has 16 groups of rows: at least 16 rows, and more where they are short."""


class Dtypes(NamedTuple):
    """The dtypes of S, W, A, B and m, as safetensors files name them."""

    stored: str
    """The narrowest that has all numbers of S in the sample: a merge in 16 bits may be saved as
    float32."""
    weight: str
    lora_a: str
    lora_b: str
    magnitude: str


class Sample(NamedTuple):
    """Some rows of a matrix: before the merge, as a file has them, and their adapter."""

    rows: NDArray[np.intp]
    """Their places, (k,)."""
    base: Wide
    """W, (k, in)."""
    stored: Wide
    """S, (k, in)."""
    adapter: Adapter | LowRank
    """A, and those rows of B and m, in float64; a LowRank without m."""
    config: Config
    dtypes: Dtypes

    def rounded(self, values: Wide) -> Wide:
        """Return numbers as the file would have them."""
        with np.errstate(over="ignore"):
            return values.astype(DTYPES[self.dtypes.stored]).astype(np.float64)


def take_sample(source: AnySource, stored: AnySource, layer: UpdatedLayer) -> Sample:
    """Return groups of rows that are evenly spaced, the first and the last row included.

    Parameters
    ----------
    source, stored : Source
        W and S, of one shape.
    layer : UpdatedLayer
    """
    kind = layer.rows_kind
    out, inner = kind.matrix_shape(layer.shape)
    size = min(out, max(_ROWS, _NUMBERS // inner))
    slab = -(-size // SLABS)
    starts = np.linspace(0, max(0, out - slab), SLABS).astype(int).tolist()
    rows = np.unique([row for start in starts for row in range(start, start + slab)])
    rows = rows[rows < out]
    factors, m = _factors(layer, rows), layer.magnitude
    base, found = (source_rows(one, rows, kind) for one in (source, stored))
    adapter = factors if m is None else Adapter(*factors, m[rows])
    dtypes = Dtypes(
        narrowest(found, stored.tensor.dtype), source.tensor.dtype, *adapter_dtypes(layer)
    )
    return Sample(rows, base, found, adapter, layer.config, dtypes)


def adapter_dtypes(layer: UpdatedLayer) -> tuple[str, str, str]:
    """Return the dtypes of A, B and m; those of another update stand for A and B."""
    update, m = layer.adapter
    names = [dtype_name(np.empty(0, dtype)) for dtype in dtypes_of(update)] or ["F32"]
    coarse = max(names, key=lambda name: PRECISION[name].epsilon)
    a, b = names if isinstance(update, LowRank) else (coarse, coarse)
    return a, b, b if m is None else dtype_name(np.asarray(m))


def _factors(layer: UpdatedLayer, rows: NDArray[np.intp]) -> LowRank:
    """Return A and rows of B; of another update than B A, two factors whose product it is."""
    factors = layer.factors
    if factors is not None:
        return factors._replace(lora_b=np.asarray(factors.lora_b)[rows])
    update = layer.update_rows(rows) / layer.config.scaling  # (k, in)
    out, inner = update.shape
    return LowRank(update, np.eye(out)) if out <= inner else LowRank(np.eye(inner), update)
