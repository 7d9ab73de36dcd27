"""`Sample`: some rows of a weight, as the audit looks at them again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import Adapter, Config
from doraxp.checkpoint._precision import dtype_name, narrowest
from doraxp.checkpoint._rows import matrix_rows
from doraxp.checkpoint._safetensors import DTYPES, AnySource
from doraxp.checkpoint._slack import Wide
from doraxp.layers import AdaptedLayer

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
    adapter: Adapter
    """A, and those rows of B and m, in float64."""
    config: Config
    dtypes: Dtypes

    def rounded(self, values: Wide) -> Wide:
        """Return numbers as the file would have them."""
        with np.errstate(over="ignore"):
            return values.astype(DTYPES[self.dtypes.stored]).astype(np.float64)


def take_sample(source: AnySource, stored: AnySource, layer: AdaptedLayer) -> Sample:
    """Return groups of rows that are evenly spaced, the first and the last row included.

    Parameters
    ----------
    source, stored : Source
        W and S, of one shape.
    layer : AdaptedLayer
    """
    out, inner = layer.kind.matrix_shape(layer.shape)
    size = min(out, max(_ROWS, _NUMBERS // inner))
    slab = -(-size // SLABS)
    starts = np.linspace(0, max(0, out - slab), SLABS).astype(int).tolist()
    rows = np.unique([row for start in starts for row in range(start, start + slab)])
    rows = rows[rows < out]
    a, b, m = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
    base, found = (matrix_rows(one, rows, layer.kind) for one in (source, stored))
    dtypes = Dtypes(
        narrowest(found, stored.tensor.dtype),
        source.tensor.dtype,
        *(dtype_name(np.asarray(leaf)) for leaf in layer.adapter),
    )
    return Sample(rows, base, found, Adapter(a, b[rows], m[rows]), layer.config, dtypes)
