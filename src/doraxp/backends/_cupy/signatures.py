"""The parameters of every kernel in `kernels/`, by name, type and order.

The comments there say what each parameter means. A test compares the declarations with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from doraxp.backends._cupy.parameters import (
    Compute,
    ConstCompute,
    ConstInts,
    ConstLeaf,
    ConstMarks,
    ConstProduct,
    ConstStorage,
    ConstTile,
    ConstVoid,
    Index,
    Int,
    Ints,
    Marks,
    Number,
    Product,
    Storage,
    Tile,
    Void,
    kernel_name,
)
from doraxp.backends._cupy.source import BUILDS, SOURCE


class Outputs(NamedTuple):
    """z = ρ⊙base + update and y = g⊙z + bias."""

    base: ConstProduct
    update: ConstProduct | None
    row_scale: ConstCompute | None
    gain: ConstCompute
    bias: ConstCompute | None
    z: Product | None
    y: Storage
    tokens: Index
    out: Index


class Gradients(NamedTuple):
    """dz = g⊙dy, and the sums of dy⊙z and of dy over chunks of tokens."""

    dy: ConstStorage
    z: ConstProduct
    gain: ConstCompute
    dz: Product
    sum_dyz: Compute
    sum_dy: Compute | None
    tokens: Index
    rows: Index
    out: Index
    per_chunk: Index


class SumChunks(NamedTuple):
    """The sums of `partial` over its chunks."""

    partial: ConstCompute
    result: Compute
    chunks: Index
    out: Index


class NormRows(NamedTuple):
    """dm, p, and the rows of the norm's gradient below dz."""

    sum_dyz: ConstCompute
    gain: ConstCompute
    norm: ConstCompute
    b: ConstCompute
    dm: Compute
    p_result: Compute
    dz: Product
    tokens: Index
    out: Index
    rank: Index


class Turning(NamedTuple):
    """db ← scaling (db − p⊙unit), by rows."""

    db: Compute
    p: ConstCompute
    unit: ConstCompute
    size: Index
    rank: Index
    scaling: Number


class Token(NamedTuple):
    """z = x Vᵀ and y = g⊙z + bias, or z = matrix x, for one token."""

    matrix: ConstVoid
    matrix_is_stored: Int
    x: ConstVoid
    x_is_stored: Int
    a: ConstCompute | None
    b: ConstCompute | None
    row_scale: ConstCompute | None
    suspect: ConstMarks | None
    low_rank: ConstCompute | None
    gain: ConstCompute | None
    bias: ConstCompute | None
    z: Product
    y: Void | None
    rows: Index
    out: Index
    inner: Index
    rank: Index
    by_block: Int


class Assemble(NamedTuple):
    """n, g and V Aᵀ / n from products with A, and a mark for each suspect row."""

    u: ConstCompute
    b: ConstCompute
    bg: ConstCompute
    squares: ConstCompute
    row_scale: ConstCompute | None
    gram: ConstCompute
    magnitude: ConstCompute
    norm: Compute
    gain: Compute
    unit: Compute
    suspect: Marks
    rows: Index
    out: Index
    rank: Index
    floor: Number
    cancellation: Number


class Norms(NamedTuple):
    """n = ‖V‖ from the chunks of ‖V‖², measured on V where that is out of range, and g = m / n."""

    partial: ConstCompute
    weight: ConstStorage
    turned: Int
    a: ConstCompute | None
    b: ConstCompute | None
    row_scale: ConstCompute | None
    magnitude: ConstCompute | None
    norm: Compute
    gain: Compute | None
    chunks: Index
    out: Index
    inner: Index
    rank: Index
    floor: Number


class OverNorm(NamedTuple):
    """values / n by rows, 0 where n = 0."""

    values: ConstCompute
    norm: ConstCompute
    result: Compute
    size: Index
    per_row: Index


class Split(NamedTuple):
    """A float32 array as the sum of `part_count` parts of 16 bits."""

    a: ConstCompute
    parts: Storage
    shrink: Compute | None
    rows: Index
    columns: Index
    part_count: Int


class Cast(NamedTuple):
    """A float32 array, rounded to 16 bits."""

    array: ConstCompute
    result: Storage
    size: Index


class SumParts(NamedTuple):
    """The sum over the products of the parts of a factor."""

    products: ConstCompute
    shrink: ConstCompute | None
    result: Compute
    size: Index
    columns: Index
    parts: Int
    on_left: Int
    beta: Number


class GuardNorms(NamedTuple):
    """n of the suspect rows, and g and V Aᵀ / n, from V itself."""

    suspect: ConstMarks
    rows: Index
    weight: ConstStorage
    turned: Int
    a: ConstCompute | None
    b: ConstCompute | None
    row_scale: ConstCompute | None
    norm: Compute
    magnitude: ConstCompute | None
    gain: Compute | None
    unit: Compute | None
    out: Index
    inner: Index
    rank: Index


class ListSuspects(NamedTuple):
    """The list of the suspect rows that are not zero, and their count."""

    suspect: Marks
    norm: ConstCompute
    listed: Ints
    listed_count: Ints
    switches: Compute
    rows: Index


class GuardOutputs(NamedTuple):
    """The columns of z and y that belong to listed rows."""

    listed: ConstInts
    listed_count: ConstInts
    weight: ConstStorage
    turned: Int
    a: ConstCompute | None
    b: ConstCompute | None
    row_scale: ConstCompute | None
    x: ConstVoid
    x_is_stored: Int
    z: Product
    z_element: Index
    z_token: Index
    z_row: Index
    y: Void | None
    gain: ConstCompute | None
    bias: ConstCompute | None
    tokens: Index
    out: Index
    inner: Index
    rank: Index


class GuardInputs(NamedTuple):
    """The sum of d[:, i] Vᵢ over the listed rows i."""

    listed: ConstInts
    listed_count: ConstInts
    weight: ConstStorage
    turned: Int
    a: ConstCompute | None
    b: ConstCompute | None
    row_scale: ConstCompute | None
    d: ConstProduct
    result: Product
    tokens: Index
    out: Index
    inner: Index
    rank: Index


class GuardHide(NamedTuple):
    """d[:, i] = 0 for the listed rows i."""

    listed: ConstInts
    listed_count: ConstInts
    d: Product
    tokens: Index
    out: Index


class GuardLow(NamedTuple):
    """d b, computed again if any row is listed."""

    listed_count: ConstInts
    d: ConstProduct
    b: ConstCompute
    low: Compute
    tokens: Index
    out: Index
    rank: Index


class Tiles(NamedTuple):
    """s B and A in parts, in the order in which tensor cores load them, and their scales."""

    a: ConstCompute
    b: ConstCompute
    result: Tile
    shrink: Compute
    rows: Index
    columns: Index
    rank: Index
    turned: Int


class Merge(NamedTuple):
    """W' = g⊙V."""

    weight: ConstStorage
    tiles: ConstTile | None
    shrink: ConstCompute | None
    row_scale: ConstCompute | None
    gain: ConstCompute
    merged: Storage
    rows: Index
    columns: Index
    rank: Index
    turned: Int
    reversed: Int


class Squares(NamedTuple):
    """The parts of ‖V‖² by rows that each warp computes."""

    weight: ConstStorage
    tiles: ConstTile | None
    shrink: ConstCompute | None
    row_scale: ConstCompute | None
    partial: Compute
    rows: Index
    columns: Index
    rank: Index
    turned: Int


class MergeWide(NamedTuple):
    """W' = g⊙V, in float64."""

    weight: ConstStorage
    a: ConstCompute
    b: ConstCompute
    row_scale: ConstCompute | None
    gain: ConstCompute
    merged: Storage
    out: Index
    inner: Index
    rank: Index


class Adamw(NamedTuple):
    """A step of AdamW for all leaves."""

    leaves: ConstLeaf
    leaf_count: Int
    beta1: Number
    rest1: Number
    beta2: Number
    rest2: Number
    eps: Number
    correct1: Number
    correct2: Number


_DECLARED: tuple[type[tuple[Any, ...]], ...] = (
    Outputs,
    Gradients,
    SumChunks,
    NormRows,
    Turning,
    Token,
    Assemble,
    Norms,
    OverNorm,
    Split,
    Cast,
    SumParts,
    GuardNorms,
    ListSuspects,
    GuardOutputs,
    GuardInputs,
    GuardHide,
    GuardLow,
    Tiles,
    Merge,
    Squares,
    MergeWide,
    Adamw,
)
KERNELS = {kernel_name(declared): declared for declared in _DECLARED}
"""The declarations by the names of the kernels, in the order of the source."""


class CudaKernels(NamedTuple):
    """All that a compiler needs to build the CUDA kernels of the CuPy backend."""

    source: str
    """The text of the source, for NVRTC."""
    names: tuple[str, ...]
    """The names of the kernels, in the order of the source."""
    builds: dict[str, tuple[str, ...]]
    """The compiler's options for each combination of dtypes, by the dtypes' names."""


def cuda_kernels() -> CudaKernels:
    """Return the CUDA kernels of the CuPy backend, as source. It needs neither CuPy nor a GPU.

    Examples
    --------
    >>> cuda_kernels().builds["bfloat16 float32 float32"]
    ('-std=c++17', '-Dstorage_t=bf16_t', '-Dproduct_t=float', '-Dcompute_t=float')
    """
    builds = {" ".join(types): types.options() for types in BUILDS}
    return CudaKernels(SOURCE, tuple(KERNELS), builds)
