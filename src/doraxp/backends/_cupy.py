"""CuPy on NVIDIA GPUs: fused kernels, and products that take the weight as it is stored.

Imports without CuPy and without a GPU. Values are never read on the host.

A product of a float32 array with a bfloat16 weight is exact in its factors: the array is the sum of
three of bfloat16, and cuBLAS adds up three products in float32. `reduced_precision` rounds instead.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from doraxp._types import Array, Reduce
from doraxp.backends._cuda import THREADS, Cuda, Types, layout
from doraxp.backends._generic import Factors, Operations

LOW = ("float16", "bfloat16")
FEW = 1024  # rows of a factor whose parts go into one product: the result has them all
PARTS = 3  # of 8 bits each: all 24 of a float32
WARPS = THREADS // 32  # rows that a block of the row kernels takes
TOKENS = 32  # of a chunk, whose sums a thread takes
RUN = 4  # tokens that a thread of `outputs` takes, so that it reads gain and bias once for them
GUARDS = 64  # blocks of the guard's kernels: it has few rows, or none
MEASURERS = 1024  # blocks that look for its rows
ROWS, TILE = 4, 8  # rows of a thread of `merge`, tokens of one of the guard's
LEAF_BLOCK = 4 * THREADS  # numbers of a block of `adamw`
KINDS = ("float16", "bfloat16", "float32", "float64")  # as `adamw` counts them
LEAF = np.dtype(
    [(name, np.uint64) for name in ("p", "g", "mu", "nu", "new_p", "new_mu", "new_nu")]
    + [(name, np.int64) for name in ("size", "first_block", "p_type", "g_type")]
    + [(name, np.float64) for name in ("rate", "decay")]
)
"""`Leaf` of the source."""
LIMIT = 65535  # of a grid's y and z
_REDUCED: ContextVar[bool] = ContextVar("reduced", default=False)


def why_not() -> str | None:
    """Return why CuPy cannot run here, or None where it can."""
    if importlib.util.find_spec("cupy") is None:
        return "not installed: pip install 'doraxp[cuda13]', or [cuda12] for a CUDA 12 driver"
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:  # a broken CUDA installation raises more than ImportError
        return f"installed, but the import failed: {type(error).__name__}: {error}"
    if not cupy.cuda.is_available():
        return "installed, but no NVIDIA device was found (is the driver there? try nvidia-smi)"
    return None


@contextlib.contextmanager
def reduced_precision() -> Iterator[None]:
    """Let CuPy's products round their factors: the speed of the tensor cores.

    Within, float32 factors are rounded to TF32's 10 bits, or beside a float16 or bfloat16 weight to
    its dtype. Of x and dy in the weight's own dtype, z, g⊙dy and dx are stored in it too. Sums are
    made in float32 either way. The gradients' errors are then those of PyTorch's mixed precision.
    Other libraries are not concerned.
    """
    token = _REDUCED.set(True)
    try:
        yield
    finally:
        _REDUCED.reset(token)


class Suspects(NamedTuple):
    """The rows of V, not of zeros, that the guard's kernels form again where they are needed."""

    rows: Array  # (stack · out,) int32; the first `count` are indices of rows
    count: Array  # (1,) int32
    switches: Array  # (2,): 1, and 1 where count > 0, else 0
    factors: Factors


class CupyOperations(Operations):
    """The operations on CuPy arrays."""

    def __init__(self, xp: Any, cuda: Any = None) -> None:
        super().__init__(xp)
        self.cuda = cuda or Cuda()

    def may_look(self, array: Array) -> bool:
        """Never: reading a value waits for the whole queue."""
        return False

    def check_current(self, name: str, array: Array) -> None:
        """Kernels go to the current device, whatever they are given."""
        number = self.cuda.device()
        if array.device.id != number:
            raise ValueError(
                f"{name} is on CUDA device {array.device.id}, but the current one is {number}: "
                f"use `with cupy.cuda.Device({array.device.id}):`"
            )

    def operand_dtype(self, array: Array, weight: Array, dtype: Any) -> Any:
        """Saves the cast of x and dy: tensor cores take them as they are."""
        own = _name(array)
        low = own in LOW and own == _name(weight) and np.dtype(dtype) == np.float32
        return array.dtype if low else dtype

    # Products

    def times_transposed(self, x: Array, weight: Array, dtype: Any) -> Array:
        """Saves the cast of a low-precision W."""
        return self._multiply(x, self.xp.matrix_transpose(weight), dtype)

    def times(self, d: Array, weight: Array, dtype: Any) -> Array:
        """Saves the cast of a low-precision W."""
        return self._multiply(d, weight, dtype)

    def project(self, weight: Array, a: Array, dtype: Any) -> Array:
        """Saves the cast of a low-precision W: A has rows enough for tensor cores in its parts."""
        return self._multiply(weight, self.xp.matrix_transpose(a), dtype, narrow="right")

    def product(self, left: Array, right: Array) -> Array:
        """Saves the cast of an x or dy in its own dtype."""
        dtype = np.promote_types(_wide(left), _wide(right))
        few = min(left.shape[-2], right.shape[-1])
        narrow = "left" if left.shape[-2] == few else "right"
        return self._multiply(left, right, dtype, narrow=narrow if few <= FEW else None)

    def accumulate(self, total: Array, left: Array, right: Array) -> Array:
        """Saves the temporary of the product, and adding it: BLAS adds while it multiplies."""
        return self._multiply(left, right, total.dtype, out=total, beta=1.0)

    def _multiply(
        self, left: Array, right: Array, dtype: Any, *, out: Array | None = None,
        beta: float | Array = 0.0, narrow: str | None = None,
    ) -> Array:  # fmt: skip
        """Return out ← left right + beta out, by products of two axes; `out` is in `dtype`.

        The factor that `narrow` names has few rows, or columns: its parts go into one product.
        """
        if out is None:
            shape = (*left.shape[:-1], right.shape[-1])
            out = self.cuda.empty(shape, dtype)
        if 0 in out.shape:
            return out
        if left.shape[-1] == 0:
            out[...] = 0
            return out
        for element in np.ndindex(left.shape[:-2]):
            self._multiply_two(left[element], right[element], out[element], beta, narrow)
        return out

    def _multiply_two(
        self, left: Array, right: Array, out: Array, beta: float | Array, narrow: str | None
    ) -> None:
        xp, reduced = self.xp, _REDUCED.get()
        names = _name(left), _name(right)
        if names[0] != names[1]:
            low = next((array for array in (left, right) if _name(array) in LOW), None)
            wide = left if low is right else right
            if low is None or _name(wide) != "float32":  # float64, or two kinds of half
                common = np.promote_types(_wide(left), _wide(right))
                left, right = (xp.astype(array, common, copy=False) for array in (left, right))
            elif reduced:
                rounded = xp.astype(wide, low.dtype)
                left, right = (low, rounded) if low is left else (rounded, right)
            else:
                self._multiply_parts(left, right, out, beta, narrow)
                return
        elif names[0] not in LOW and out.dtype != left.dtype:
            left, right = (xp.astype(array, out.dtype) for array in (left, right))
        self.cuda.gemm(_piece(left, xp), _piece(right, xp), out, beta, tf32=reduced)

    def _multiply_parts(
        self, left: Array, right: Array, out: Array, beta: float | Array, narrow: str | None
    ) -> None:
        """Multiply a float32 factor by one of half precision, exact in both."""
        xp = self.xp
        on_left = _name(left) == "float32"
        wide, low = (left, right) if on_left else (right, left)
        if narrow == ("left" if on_left else "right"):
            rows = wide if on_left else xp.matrix_transpose(wide)  # (few, k)
            product = self._few_rows(rows, low if on_left else xp.matrix_transpose(low))
            product = product if on_left else xp.matrix_transpose(product)
            out[...] = product if beta == 0.0 else product + out
            return
        low = _piece(low, xp)
        if _name(low) == "float16":  # its exponents are too few for the parts of any float32
            parts = [_piece(wide, xp)]
            low = xp.astype(low, xp.float32)
        else:
            columns = wide.strides[-1] != wide.itemsize
            rows = xp.matrix_transpose(wide) if columns else wide
            parts = list(self._split(rows, low)[0])
            parts = [xp.matrix_transpose(part) for part in parts] if columns else parts
        for part in parts:
            self.cuda.gemm(*((part, low) if on_left else (low, part)), out, beta)
            beta = 1.0

    def _few_rows(self, rows: Array, low: Array) -> Array:
        """Return rows low, (few, k) by (k, n), from one product: low is read once."""
        xp = self.xp
        parts, shrink = self._split(rows, low)
        few, k = rows.shape
        product = self.cuda.empty((PARTS, few, low.shape[1]), xp.float32)
        flat = xp.reshape(product, (PARTS * few, -1))
        self.cuda.gemm(xp.reshape(parts, (PARTS * few, k)), _piece(low, xp), flat, 0.0)
        product = xp.sum(product, axis=0)
        return product if shrink is None else shrink[:, None] * product

    def _split(self, rows: Array, low: Array) -> tuple[Array, Array | None]:
        """Return the parts (PARTS, rows, k) in the dtype of `low`, and what to scale rows by."""
        rows = _packed(rows, self.xp)
        parts = self.cuda.empty((PARTS, *rows.shape), low.dtype)
        shrink = self.cuda.empty((rows.shape[0],), rows.dtype) if _name(low) == "float16" else None
        sizes = *map(np.int64, rows.shape), np.int32(PARTS)
        types = Types(_name(low), "float32", "float32")
        self.cuda.launch("split", types, (rows.shape[0], 1, 1), rows, parts, shrink, *sizes)
        return parts, shrink

    # The two hot passes

    def outputs(
        self, x: Array, base: Array | None, factors: Factors, low_rank: Array, formed: Any,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Saves a pass over z: the guard writes to the columns that it serves, and to no other."""
        if not isinstance(formed, Suspects) or base is not None:
            return super().outputs(x, base, factors, low_rank, formed, gain, bias)
        low = _name(x) in LOW
        kind = x.dtype if low and _REDUCED.get() else gain.dtype
        z = self._multiply(x, self.xp.matrix_transpose(factors.weight), kind)
        update = low_rank, factors.scaled_b
        z, y = self._finish(z, factors.row_scale, update, gain, bias, x.dtype if low else kind)
        self._guard_outputs(formed, x, z, (y, gain, bias))
        return z, y

    def scale_and_shift(
        self, z: Array, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Saves four passes over z."""
        return self._finish(_packed(z, self.xp), row_scale, update, gain, bias, gain.dtype)

    def _finish(
        self, z: Array, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None, dtype: Any,
    ) -> tuple[Array, Array]:  # fmt: skip
        *stack, tokens, out = z.shape
        added = None
        if update is not None:
            low_rank, transposed = update[0], self.xp.matrix_transpose(update[1])
            if row_scale is None:
                z = self._multiply(low_rank, transposed, z.dtype, out=z, beta=1.0)
            else:
                added = self._multiply(low_rank, transposed, z.dtype)
        y = self.cuda.empty(z.shape, dtype)
        if y.size:
            changed = None if row_scale is None and added is None else z
            vectors = (_packed(v, self.xp) for v in (row_scale, gain, bias))
            types = Types(_name(y), _name(z), _name(gain))
            grid = _columns(out, y), min(-(-tokens // RUN), LIMIT), math.prod(stack)
            sizes = np.int64(tokens), np.int64(out)
            self.cuda.launch("outputs", types, grid, z, added, *vectors, changed, y, *sizes)
        return z, y

    def scale_and_sum(
        self, d: Array, z: Array, gain: Array, room: int, *, total: bool = False
    ) -> tuple[Array, Array, Array | None]:
        """Saves all passes but one: d and z are read once."""
        xp = self.xp
        d = _packed(d, xp)
        *stack, tokens, out = d.shape
        kind = d.dtype if _REDUCED.get() and z.dtype == d.dtype else gain.dtype
        z = _packed(xp.astype(z, kind, copy=False), xp)
        rows = self.cuda.empty((*stack, tokens + room, out), kind)
        each = -(-tokens // min(LIMIT, max(1, -(-tokens // TOKENS)))) or 1
        chunks = max(1, -(-tokens // each))
        along = self.cuda.empty((*stack, chunks, out), gain.dtype)
        totals = self.cuda.empty((*stack, chunks, out), gain.dtype) if total else None
        types = Types(_name(d), _name(z), _name(gain))
        grid = _columns(out, d), chunks, math.prod(stack)
        sizes = (np.int64(size) for size in (tokens, tokens + room, out, each))
        self.cuda.launch("gradients", types, grid, d, z, gain, rows, along, totals, *sizes)
        e = self._sum_chunks(along)
        return rows[..., :tokens, :], e, None if totals is None else self._sum_chunks(totals)

    def _sum_chunks(self, partial: Array) -> Array:
        *stack, chunks, out = partial.shape
        result = self.cuda.empty((*stack, out), partial.dtype)
        grid = -(-out // THREADS), 1, math.prod(stack)
        sizes = np.int64(chunks), np.int64(out)
        self.cuda.launch("sum_chunks", _alike(partial), grid, partial, result, *sizes)
        return result

    def append(self, scaled: Array, rows: Array) -> Array:
        """Saves the copy: there is room in the array that `scaled` is the head of."""
        whole: Array = scaled.base
        whole[..., scaled.shape[-2] :, :] = self.xp.astype(rows, whole.dtype, copy=False)
        return whole

    # The norm

    def row_squares(self, weight: Array, dtype: Any) -> Array:
        """Saves the (out, in) temporaries: W is read once, as it is stored."""
        weight = _packed(weight, self.xp)
        squares = self.cuda.empty(weight.shape[:-1], dtype)
        types = Types(_name(weight), _name(squares), _name(squares))
        sizes = np.int64(squares.size), np.int64(weight.shape[-1])
        grid = -(-squares.size // WARPS), 1, 1
        self.cuda.launch("row_squares", types, grid, weight, squares, *sizes)
        return squares

    def assemble(
        self, u: Array, gram: Array, a_squares: Array, squares: Array, scaled_b: Array,
        row_scale: Array | None, terms: int, cancellation: float,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Saves some twenty launches."""
        xp, scalar = self.xp, np.dtype(u.dtype).type
        info = np.finfo(u.dtype)
        bg = self.product(scaled_b, gram)
        *_, out, rank = scaled_b.shape
        norm, suspect = (self.cuda.empty(squares.shape, kind) for kind in (u.dtype, xp.bool))
        projection = self.cuda.empty(u.shape, u.dtype)
        terms_of = u, scaled_b, bg, squares, row_scale, xp.reshape(a_squares, (-1,))
        given = (_packed(array, xp) for array in terms_of)
        sizes = (np.int64(size) for size in (squares.size, out, rank))
        floor = scalar(terms * float(info.smallest_normal) / float(info.eps))
        self.cuda.launch(
            "assemble", _alike(u), (-(-squares.size // WARPS), 1, 1),
            *given, norm, projection, suspect, *sizes, floor, scalar(cancellation),
        )  # fmt: skip
        return norm, projection, suspect

    def over_norm(self, values: Array, norm: Array) -> Array:
        """Saves four launches."""
        values, norm = _packed(values, self.xp), _packed(norm, self.xp)
        result = self.cuda.empty(values.shape, values.dtype)
        if values.size:
            grid = -(-values.size // THREADS), 1, 1
            sizes = np.int64(values.size), np.int64(values.size // norm.size)
            self.cuda.launch("over_norm", _alike(values), grid, values, norm, result, *sizes)
        return result

    # The guard: its kernels form a suspect row where they need it, and skip the others

    def guard(
        self, suspect: Array, norm: Array, factors: Factors, dtype: Any,
        reduce: Reduce | None = None,
    ) -> tuple[Array, Any]:  # fmt: skip
        """Saves V: rows are formed where they are needed. `norm` is written to."""
        if reduce is not None:
            return super().guard(suspect, norm, factors, dtype, reduce)
        factors = Factors(*(_packed(array, self.xp) for array in factors))
        rows = self.cuda.empty((norm.size,), np.int32)
        count, switches = self.cuda.empty((1,), np.int32), self.cuda.empty((2,), norm.dtype)
        found = Suspects(rows, count, switches, factors)
        size, grid = np.int64(norm.size), (min(norm.size, MEASURERS), 1, 1)
        self._launch_guard("guard_norms", factors, (suspect, size), norm.dtype, grid, (norm,))
        self.cuda.launch("list_suspects", _alike(norm), (1, 1, 1), suspect, norm, *found[:3], size)
        return norm, found

    def guarded_times_transposed(
        self, formed: Any, x: Array, factored: Callable[[Array], Array]
    ) -> Array:
        """Replace the columns of the factored x Vᵀ that belong to suspect rows."""
        if not isinstance(formed, Suspects):
            return self.product(x, self.xp.matrix_transpose(formed))
        z = factored(x)
        self._guard_outputs(formed, x, z, (None, None, None))
        return z

    def _guard_outputs(self, formed: Suspects, x: Array, z: Array, last: tuple[Any, ...]) -> None:
        """Write z[..., i] = x Vᵢᵀ, and for `last` = (y, gain, bias) y[..., i] too."""
        x = _packed(x, self.xp)
        tokens = x.shape[-2]
        if tokens == 0:
            return
        stored = x.dtype == formed.factors.weight.dtype
        wide = formed.switches.dtype
        step, along = (stride // z.itemsize for stride in z.strides[-2:])
        element = z.shape[-2] * z.shape[-1]
        types = _name(formed.factors.weight), _name(z), _name(formed.switches)
        grid = GUARDS, min(-(-tokens // TILE), LIMIT), 1
        y, gain, bias = last
        given = (
            x, np.int32(stored), z, *map(np.int64, (element, step, along)), y,
            _packed(gain, self.xp), _packed(bias, self.xp), np.int64(tokens),
        )  # fmt: skip
        self._launch_guard("guard_outputs", formed.factors, formed[:2], wide, grid, given, types)

    def guarded_times(self, formed: Any, d: Array, factored: Callable[[Array], Array]) -> Array:
        """Keep the columns of d of suspect rows out of the factored d V, and add their part."""
        xp = self.xp
        if not isinstance(formed, Suspects):
            return self.product(d, formed)
        weight, a, scaled_b, row_scale = formed.factors
        d = _packed(d, xp)
        *stack, tokens, out = d.shape
        inner, elements = weight.shape[-1], math.prod(stack)
        result = self.cuda.empty((*stack, tokens, inner), d.dtype)
        if tokens == 0:
            return result
        wide = formed.switches.dtype
        types = _name(weight), _name(d), _name(formed.switches)
        grid = -(-inner // THREADS), min(-(-tokens // TILE), LIMIT), elements
        given = d, result, np.int64(tokens)
        self._launch_guard("guard_inputs", formed.factors, formed[:2], wide, grid, given, types)
        sizes = np.int64(tokens), np.int64(out)
        grid = -(-tokens // THREADS), GUARDS, 1
        self.cuda.launch("guard_hide", Types(*types), grid, *formed[:2], d, *sizes)
        low = self.product(d, scaled_b)
        self._multiply(low, a, d.dtype, out=result, beta=formed.switches)
        if row_scale is not None:
            d = xp.astype(row_scale[..., None, :] * d, d.dtype, copy=False)
        return self._multiply(d, weight, d.dtype, out=result, beta=1.0)

    def _launch_guard(
        self, name: str, factors: Factors, which: tuple[Any, ...], dtype: Any,
        grid: tuple[int, int, int], given: tuple[Any, ...],
        types: tuple[str, str, str] | None = None,
    ) -> None:  # fmt: skip
        weight, a, scaled_b, row_scale = factors
        *_, out, inner = weight.shape
        rank = 0 if a is None else a.shape[-2]
        kind = np.dtype(dtype).name
        sizes = (np.int64(size) for size in (out, inner, rank))
        self.cuda.launch(
            name, Types(*(types or (_name(weight), kind, kind))), grid, *which,
            weight, a, scaled_b, row_scale, *given, *sizes,
        )  # fmt: skip

    # Merge and AdamW

    def merge(self, factors: Factors, gain: Array, dtype: Any) -> Array:
        """Saves every (out, in) temporary: W is read once and W' written once."""
        weight, a, scaled_b, row_scale = (_packed(array, self.xp) for array in factors)
        *stack, out, inner = weight.shape
        merged = self.cuda.empty(weight.shape, weight.dtype)
        types = Types(_name(weight), _name(gain), _name(gain))
        grid = _columns(inner, weight), min(-(-out // ROWS), LIMIT), math.prod(stack)
        sizes = (np.int64(size) for size in (out, inner, a.shape[-2]))
        given = weight, a, scaled_b, row_scale, _packed(gain, self.xp), merged
        self.cuda.launch("merge", types, grid, *given, *sizes)
        return merged

    def adamw(
        self, leaves: dict[str, tuple[Array, ...]], rates: dict[str, Any], decays: dict[str, Any],
        numbers: tuple[Any, ...],
    ) -> dict[str, tuple[Array, Array, Array]] | None:  # fmt: skip
        """Saves all launches but one, or two where some leaves are of float64."""
        given = (*rates.values(), *decays.values(), *numbers)
        if not all(isinstance(number, float) for number in given):
            return None  # one is on the device
        stepped: dict[str, tuple[Array, Array, Array]] = {}
        for wide in (np.dtype(np.float32), np.dtype(np.float64)):
            group = {path: each for path, each in leaves.items() if _wide(each[0]) == wide}
            if group:
                stepped |= self._adamw(group, rates, decays, numbers, wide)
        return stepped

    def _adamw(
        self, leaves: dict[str, tuple[Array, ...]], rates: dict[str, Any], decays: dict[str, Any],
        numbers: tuple[float, ...], wide: Any,
    ) -> dict[str, tuple[Array, Array, Array]]:  # fmt: skip
        xp, blocks, held = self.xp, 0, []
        stepped: dict[str, tuple[Array, Array, Array]] = {}
        table = np.zeros(len(leaves), LEAF)
        for row, (path, arrays) in enumerate(leaves.items()):
            p, g, *moments = (_packed(array, xp) for array in arrays)
            moments = [xp.astype(moment, wide, copy=False) for moment in moments]
            new = [self.cuda.empty(p.shape, dtype) for dtype in (p.dtype, wide, wide)]
            pointers = (self.cuda.pointer(array) for array in (p, g, *moments, *new))
            codes = (KINDS.index(_name(array)) for array in (p, g))
            table[row] = (*pointers, p.size, blocks, *codes, rates[path], decays[path])
            blocks += -(-p.size // LEAF_BLOCK)
            held.append((p, g, *moments))  # until the launch
            stepped[path] = (new[0], new[1], new[2])
        if blocks:
            leaf_table = self.cuda.upload(table.view(np.uint8))
            scalars = map(wide.type, numbers)
            size = np.int32(len(leaves))
            types = Types(*[wide.name] * 3)
            self.cuda.launch("adamw", types, (blocks, 1, 1), leaf_table, size, *scalars)
        return stepped


def _name(array: Array) -> str:
    return str(array.dtype)


def _wide(array: Array) -> Any:
    return np.dtype(np.float32) if _name(array) in LOW else array.dtype


def _alike(array: Array) -> Types:
    return Types(*[_name(array)] * 3)


def _columns(length: int, stored: Array) -> int:
    """Return how many blocks cover so many columns, at 16 bytes of `stored` to a thread."""
    return -(-length * int(stored.itemsize) // (16 * THREADS))


def _packed(array: Array, xp: Any) -> Any:
    """Return an array, or None, row by row in memory: itself where it lies so."""
    if array is None or array.flags.c_contiguous:
        return array
    return xp.asarray(array, copy=True, order="C")


def _piece(matrix: Array, xp: Any) -> Array:
    """Return a matrix whose rows or columns are in one piece, as BLAS wants it."""
    try:
        layout(matrix)
    except ValueError:  # pieces, rows in reverse or one row for all
        return _packed(matrix, xp)
    return matrix
