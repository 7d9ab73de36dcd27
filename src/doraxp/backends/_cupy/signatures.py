"""The parameters of every kernel in `kernels/`, by name, type and order.

The comments there say what each parameter means. A test compares the declarations with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from doraxp.backends._cupy.parameters import (
    Compute,
    ConstCompute,
    ConstInts,
    ConstMarks,
    ConstProduct,
    ConstStorage,
    ConstTile,
    ConstVoid,
    Index,
    Int,
    Ints,
    Leaves,
    Marks,
    Number,
    Product,
    Storage,
    Tile,
    Void,
    kernel_name,
)
from doraxp.backends._cupy.source import BUILDS, SOURCE


class Project(NamedTuple):
    """M Fᵀ, for M of 16 bits and F of few rows."""

    matrix: ConstStorage
    factor: ConstCompute
    result: Compute
    rows: Index
    columns: Index
    rank: Index
    turned: Int
    tiles: Int
    groups: Int


class Pull(NamedTuple):
    """The sums of Fᵀ M + F₂ᵀ M₂ over chunks of rows, for M of 16 bits and F of few columns."""

    matrix: ConstStorage
    factor: ConstCompute
    rows: Index
    matrix2: ConstStorage | None
    factor2: ConstCompute | None
    rows2: Index
    result: Compute
    columns: Index
    rank: Index
    per_chunk: Index


class PrepareAdapter(NamedTuple):
    """A and s B in the compute dtype, A Aᵀ, and 0 in `any`."""

    a: ConstVoid
    a_is_stored: Int
    b: ConstVoid
    b_is_stored: Int
    wide_a: Compute | None
    scaled_b: Compute
    gram: Compute | None
    any: Ints
    out: Index
    inner: Index
    rank: Index
    scaling: Number


class ExpandedNorm(NamedTuple):
    """n, g, V Aᵀ / n and g⊙b from products with A, and a mark for each suspect row."""

    u: ConstCompute
    weight: ConstStorage
    turned: Int
    a: ConstCompute
    b: ConstCompute
    bg: ConstCompute | None
    gram: ConstCompute
    squares: ConstCompute | None
    row_scale: ConstCompute | None
    magnitude: ConstCompute
    norm: Compute
    gain: Compute
    unit: Compute
    gained: Compute
    suspect: Marks
    any: Ints
    rows: Index
    out: Index
    inner: Index
    rank: Index
    floor: Number
    cancellation: Number


class AdaptedNorm(NamedTuple):
    """The same as `ExpandedNorm`, from a W of 16 bits by rows."""

    weight: ConstStorage
    a: ConstCompute
    b: ConstCompute
    gram: ConstCompute
    squares: ConstCompute | None
    row_scale: ConstCompute | None
    magnitude: ConstCompute
    norm: Compute
    gain: Compute
    unit: Compute
    gained: Compute
    suspect: Marks
    any: Ints
    out: Index
    inner: Index
    rank: Index
    tiles: Int
    groups: Int
    floor: Number
    cancellation: Number


class Outputs(NamedTuple):
    """z ← ρ⊙z and y = g⊙z + bias, with the suspect rows' columns of both."""

    z: Product
    row_scale: ConstCompute | None
    gain: ConstCompute
    bias: ConstCompute | None
    y: Void
    stored: Int
    any: ConstInts
    suspect: ConstMarks
    weight: ConstStorage
    turned: Int
    a: ConstCompute
    b: ConstCompute
    x: ConstVoid
    shift: ConstCompute | None
    tokens: Index
    out: Index
    inner: Index
    rank: Index


class Update(NamedTuple):
    """low factorᵀ / ρ, with the suspect rows' part of d V."""

    low: ConstCompute
    factor: ConstCompute
    over: ConstCompute | None
    result: Product
    rows: Index
    columns: Index
    rank: Index
    by_rows: Int
    any: ConstInts | None
    suspect: ConstMarks | None
    weight: ConstStorage | None
    turned: Int
    a: ConstCompute | None
    b: ConstCompute | None
    row_scale: ConstCompute | None
    gain: ConstCompute | None
    norm: ConstCompute | None
    p: ConstCompute | None
    d: ConstVoid | None
    d_is_stored: Int
    x: ConstVoid | None
    x_is_stored: Int
    tokens: Index
    out: Index


class Gradients(NamedTuple):
    """dz = ρ⊙g⊙dy, and the sums of dy⊙z and of dy over chunks of tokens."""

    dy: ConstStorage
    z: ConstProduct
    gain: ConstCompute
    row_scale: ConstCompute | None
    suspect: ConstMarks
    dz: Product
    sum_dyz: Compute
    sum_dy: Compute | None
    tokens: Index
    rows: Index
    out: Index
    per_chunk: Index


class MixedGradients(NamedTuple):
    """`Gradients`, and the sums low = dy gained and dyᵀ L, by one pass over dy and z."""

    dy: ConstStorage
    z: ConstStorage
    gain: ConstCompute
    row_scale: ConstCompute | None
    suspect: ConstMarks
    gained: ConstCompute
    low_rank: ConstCompute
    dz: Storage
    sum_dyz: Compute
    sum_dy: Compute | None
    low: Compute
    db: Compute
    tokens: Index
    out: Index
    rank: Index
    per_chunk: Index


class SumChunks(NamedTuple):
    """The sums of `partial` over its chunks."""

    partial: ConstCompute
    result: Compute
    chunks: Index
    out: Index


class RowGradients(NamedTuple):
    """dm, p, dbias, dB, and the rows of the norm's gradient."""

    sum_dyz: ConstCompute
    sum_dy: ConstCompute | None
    chunks: Index
    db_sums: ConstCompute
    db_chunks: Index
    by_rank: Int
    gain: ConstCompute
    norm: ConstCompute
    b: ConstCompute
    unit: ConstCompute
    row_scale: ConstCompute | None
    suspect: ConstMarks
    exact: Int
    scaling: Number
    dm: Compute
    p_result: Compute
    dbias: Compute | None
    db: Compute
    pull: Compute | None
    rows: Compute | None
    square: Compute | None
    over: Compute | None
    low_sums: ConstCompute | None
    low_chunks: Index
    low_size: Index
    low: Compute | None
    tokens: Index
    out: Index
    rank: Index
    per_block: Index
    row_blocks: Index


class GradientA(NamedTuple):
    """dA from its sums over chunks, the rank-wide square, and the suspect rows."""

    partial: ConstCompute
    chunks: Index
    square: ConstCompute | None
    square_chunks: Index
    result: Compute
    any: ConstInts
    suspect: ConstMarks
    weight: ConstStorage
    turned: Int
    a: ConstCompute
    b: ConstCompute
    row_scale: ConstCompute | None
    gain: ConstCompute
    norm: ConstCompute
    p: ConstCompute | None
    d: ConstVoid
    d_is_stored: Int
    x: ConstVoid
    x_is_stored: Int
    tokens: Index
    out: Index
    inner: Index
    rank: Index


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

    leaves: Leaves
    leaf_count: Int
    beta1: Number
    rest1: Number
    beta2: Number
    rest2: Number
    eps: Number
    correct1: Number
    correct2: Number


class Unpack(NamedTuple):
    """Numbers of a packed weight."""

    codes: ConstMarks
    table: ConstCompute
    scale: ConstCompute
    bias: ConstCompute | None
    result: Storage
    first: Index
    size: Index
    inner: Index
    shift: Int
    height: Index
    width: Index
    across: Index


_DECLARED: tuple[type[tuple[Any, ...]], ...] = (
    Project,
    Pull,
    PrepareAdapter,
    ExpandedNorm,
    AdaptedNorm,
    Outputs,
    Update,
    Gradients,
    MixedGradients,
    SumChunks,
    RowGradients,
    GradientA,
    Token,
    Norms,
    OverNorm,
    Split,
    Cast,
    SumParts,
    Tiles,
    Merge,
    Squares,
    MergeWide,
    Adamw,
    Unpack,
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
