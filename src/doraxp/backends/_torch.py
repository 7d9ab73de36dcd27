"""PyTorch's overrides: tensors outside of autograd's graph, mixed precision, and no large copies.

    x (tokens, in)   W (out, in)   L = x Aᵀ (tokens, rank)   z = x Vᵀ (tokens, out)   g (out,)

PyTorch's allocator gives large arrays on the host back to the system at once, and the first write
to fresh memory takes several times as long as a later one. So each temporary (tokens, out) that is
not made saves a few percent of a step.

Where the device multiplies 16-bit numbers itself, a layer whose x, dy and W have one 16-bit dtype
is computed in mixed precision: `doraxp.testing` states the roundings. Elsewhere products take W
through float32, in blocks.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import numpy as np

from doraxp._base.types import Adapter, DType, Reduce, Snapshot
from doraxp.backends._direction import Arithmetic, Factored, Factors, ProductDirection
from doraxp.backends._dtypes import as_dtype, compute_dtype, transpose
from doraxp.backends._generic import (
    LayerGradients,
    Norm,
    Operations,
    OutputGradients,
    safe_row_norms,
    same_values,
)
from doraxp.backends._precision import is_exact
from doraxp.backends._torch_layers import TorchLayerOperations

Tensor: TypeAlias = Any
"""A `torch.Tensor`. mypy refuses that class as the type of an argument here, because the methods
override those of `Operations`, which take any `Array`."""
ConsumedTensor: TypeAlias = Tensor
"""A `Tensor` that the function may write to: its caller must not read it again."""

BLOCK = 2**20
"""The numbers of a weight that are cast at once, 4 MiB in float32: they stay in a CPU's cache."""
DEVICE_BLOCK = 2**24
"""The same on a GPU, 64 MiB: there a launch costs more than memory."""
PARTS = 3
"""Parts of 8 bits that hold all 24 bits of a float32."""


class TorchFactored(Factored):
    """V given by its factors. In mixed precision, z has the dtype of x and W."""

    __slots__ = ()

    def outputs(
        self, x: Tensor, low: Tensor, gain: Tensor, bias: Tensor | None,
        base: ConsumedTensor | None = None, dropped: Tensor | None = None, *, ops: Arithmetic,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return z and y. With a 16-bit x like W, the product adds L (s B)ᵀ and rounds once.

        ::

            C = round(L (s B / ρ)ᵀ)     z = round(ρ⊙round(x Wᵀ + C))     y = round(g⊙z + bias)
        """
        weight, _, scaled_b, row_scale = self.factors
        if base is not None or x.dtype == low.dtype:
            return super().outputs(x, low, gain, bias, base, dropped, ops=ops)
        import torch

        one: Tensor = None
        if row_scale is not None:
            one = row_scale + (row_scale == 0)  # 1 for a row of zeros
            scaled_b = scaled_b / one[..., None]
        update = (low @ transpose(scaled_b)).to(x.dtype)  # (tokens, out)
        z = _add_product(update, x, transpose(weight))
        if row_scale is not None:
            torch.mul(z, one[..., None, :], out=z)
        y = torch.empty_like(z)
        if bias is None:
            torch.mul(z, gain[..., None, :], out=y)
        else:
            torch.addcmul(bias[..., None, :], z, gain[..., None, :], out=y)
        return z, y

    def with_weight(self, weight: Tensor) -> TorchFactored:
        """Return the direction with another object for W."""
        return TorchFactored(self.factors._replace(weight=weight))


class TorchOperations(TorchLayerOperations, Operations):
    """The operations on PyTorch tensors."""

    def can_read_values(self, array: Tensor) -> bool:
        """Return whether `array` is on the host and has values. A fake tensor has none."""
        from torch._subclasses import FakeTensor

        return array.device.type == "cpu" and not isinstance(array, FakeTensor)

    def detached(self, array: Tensor) -> Tensor:
        """Return `array` without its graph. A layer would else keep the graphs of all its steps."""
        return array.detach()

    def operand_dtype(
        self, array: Tensor, weight: Tensor, dtype: DType, *, masked: bool = False,
        z: DType | None = None,
    ) -> DType:  # fmt: skip
        """Return the own dtype of an x or dy of 16 bits like W where the device multiplies these.

        Within `exact_products` it is `dtype`.
        """
        own = array.dtype
        if own != weight.dtype or own.itemsize > 2 or dtype != self.xp.float32:
            return dtype
        exact = is_exact() or not multiplies(array.device.type, own) if z is None else z == dtype
        return dtype if exact else own

    # Products

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return left right in the compute dtype. A large matrix is cast by blocks."""
        low = left.dtype.itemsize < 4
        if left.dtype == right.dtype and not low:
            if left.stride(-1) != 1 and right.stride(-1) != 1:
                # BLAS takes 20 times as long for two transposed factors if one of them is thin.
                return (right.mT @ left.mT).mT
            return left @ right
        dtype = compute_dtype(left, right, xp=self.xp)
        few = max(left.numel(), right.numel()) <= BLOCK
        # A stack is cast whole.
        if few or left.ndim != 2 or _is_transformed(left, right):
            return as_dtype(left, dtype, xp=self.xp) @ as_dtype(right, dtype, xp=self.xp)
        if not self.can_read_values(left) and dtype == self.xp.float32:
            if left.dtype == right.dtype:
                return _widened(left, right)
            if right.dtype == self.xp.bfloat16:
                return _by_parts(left, right)
            if left.dtype == self.xp.bfloat16:
                return _by_parts(right.mT, left.mT).mT
        if right.dtype == dtype or (left.dtype != dtype and left.numel() > right.numel()):
            return self._product_by_blocks(right.mT, left.mT, dtype).mT
        return self._product_by_blocks(left, right, dtype)

    def _product_by_blocks(self, left: Tensor, right: Tensor, dtype: DType) -> Tensor:
        """Return left right, (i, k) (k, j) -> (i, j), with columns of `right` cast block by block.

        Blocks of columns and not of rows: each column of the result is then written once.
        """
        left = as_dtype(left, dtype, xp=self.xp)
        inner, columns = right.shape
        result = left.new_empty((left.shape[0], columns))
        for here in self._blocks(columns, inner, right):
            self.xp.mm(left, right[:, here].to(dtype), out=result[:, here])
        return result

    def _blocks(self, count: int, size: int, array: Tensor) -> Iterator[slice]:
        """Return slices of `count` rows of `size` numbers each, for parts that are cast at once."""
        step = max(1, (BLOCK if self.can_read_values(array) else DEVICE_BLOCK) // size)
        return (slice(start, start + step) for start in range(0, count, step))

    def accumulate(self, total: ConsumedTensor, left: Tensor, right: Tensor) -> Tensor:
        """Return total + left right. BLAS adds while it multiplies, so no temporary is made."""
        if total.ndim == 2:
            return total.addmm_(left, right)
        return super().accumulate(total, left, right)

    # Before and after the products with V

    def output_gradients(
        self, d: Tensor, z: Tensor, gain: Tensor, norm: Tensor, scaled_b: Tensor,
        *, exact: bool, with_bias: bool,
    ) -> OutputGradients:  # fmt: skip
        """Return the gradients. One array holds dy⊙z first, and then dz and the rows below it.

        Saves that temporary and the copy that `concat` makes.
        """
        if _is_transformed(d, z, gain, norm, scaled_b):
            return super().output_gradients(
                d, z, gain, norm, scaled_b, exact=exact, with_bias=with_bias
            )
        xp = self.xp
        *stack, tokens, out = d.shape
        rank = scaled_b.shape[-1] if exact else 0
        rows = d.new_empty((*stack, tokens + rank, out))
        dz = rows[..., :tokens, :]
        dm = self.over_norm(self.token_sums(xp.mul(d, z, out=dz)), norm)
        xp.mul(gain[..., None, :], d, out=dz)
        p = gain * dm if exact else None
        if p is not None:
            below = self.over_norm(-p[..., None] * scaled_b, norm)  # (out, rank)
            rows[..., tokens:, :] = xp.matrix_transpose(below)
        dbias = self.token_sums(d) if with_bias else None
        return OutputGradients(rows, rows @ scaled_b, dm, p, dbias)

    def gradients(
        self, d: Tensor, x: Tensor, low: Tensor, z: Tensor, norm: Norm, scaling: float,
        dtype: DType, *, exact: bool, with_bias: bool, round_later: bool,
    ) -> LayerGradients:  # fmt: skip
        """Return dz V, dA, dB and dm. In mixed precision dz is rounded, for dz V alone.

        ::

            dz = round(ρ⊙g⊙dy)     C′ = round(dy (g⊙s B) A)     dx = round(dz W + C′)

        If dy has more bits than z, neither dz nor C′ is rounded.
        """
        how = {"exact": exact, "with_bias": with_bias, "round_later": round_later}
        if z.dtype == low.dtype:
            d, x = (as_dtype(each, low.dtype, xp=self.xp) for each in (d, x))
            return super().gradients(d, x, low, z, norm, scaling, dtype, **how)
        xp = self.xp
        direction = cast(TorchFactored, norm.direction)  # no other has a z of 16 bits
        weight, a, scaled_b, row_scale = direction.factors
        gain = norm.gain
        wide = d.to(low.dtype)
        dbias = self.token_sums(wide) if with_bias else None
        dm = self.over_norm(self.token_sums(wide * z), norm.norm)
        db = gain[..., None] * (transpose(wide) @ low)
        dlow = wide @ (gain[..., None] * scaled_b)  # dz s B, (tokens, rank)
        del wide
        da = self.product(transpose(dlow), x)
        p = gain * dm if exact else None
        if p is not None:
            below = transpose(self.over_norm(-p[..., None] * scaled_b, norm.norm))
            _, pull = direction.product(below, below @ scaled_b, 0, low.dtype, ops=self)
            da += pull
            db -= p[..., None] * norm.unit_projection
        db *= scaling
        slope = gain if row_scale is None else row_scale * gain
        dz = xp.mul(d, slope[..., None, :], out=xp.empty_like(d))
        if round_later or d.dtype != z.dtype:  # a dz of more bits is not rounded
            dx = self.accumulate(self.product(dz, weight), dlow, a)
            dx = dx if round_later else dx.to(dtype)
        else:
            dx = _add_product((dlow @ a).to(d.dtype), dz, weight)
        return LayerGradients(dx, da, db, dm, p, dbias)

    def token_sums(self, array: Tensor) -> Tensor:
        """Return the sums over the tokens: PyTorch adds no long chains."""
        return self.xp.sum(array, dim=-2)

    def over_norm(self, values: Tensor, norm: Tensor) -> Tensor:
        """Return values / n by rows, and 0 where n = 0, by three calls of PyTorch."""
        if _is_transformed(values, norm):
            return super().over_norm(values, norm)
        if values.ndim > norm.ndim:
            norm = norm[..., None]
        return (values / norm).masked_fill_(norm == 0, 0)

    # The norm

    def row_dots(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the scalar products of rows, in half of the time of the standard's function."""
        linalg: Any = self.xp.linalg
        return linalg.vecdot(left, right)

    def row_squares(self, weight: Tensor, dtype: DType) -> Tensor:
        """Return ‖wᵢ‖² as the square of PyTorch's norm. A 16-bit W is cast a block at a time.

        The root of such a square is that norm again, to the last bit: a fresh adapter of PEFT,
        whose m is PyTorch's norm of W, has a gain of 1.
        """
        linalg: Any = self.xp.linalg
        norms = linalg.vector_norm
        if weight.dtype == dtype or weight.ndim != 2 or _is_transformed(weight):
            return norms(as_dtype(weight, dtype, xp=self.xp), axis=-1) ** 2
        squares = weight.new_empty(weight.shape[0], dtype=dtype)
        for here in self._blocks(weight.shape[0], weight.shape[1], weight):
            squares[here] = norms(weight[here].to(dtype), axis=-1) ** 2
        return squares

    def norm_and_direction(
        self, weight: Tensor, adapter: Adapter, scaling: float, row_scale: Tensor | None,
        squares: Tensor, products: tuple[Tensor, Tensor] | None = None,
        reduce: Reduce | None = None,
    ) -> Norm:  # fmt: skip
        """Return n, g, V Aᵀ / n and V. On a device, n is measured on V, a block of rows at a time.

        No row is suspect then, and no value is read. z and dx are made from the factors in all
        rows: where these cancel, both have the errors of the factors.
        """
        leaves: tuple[Tensor, ...] = adapter
        if reduce is not None or self.can_read_values(weight) or _is_transformed(weight, *leaves):
            return super().norm_and_direction(
                weight, adapter, scaling, row_scale, squares, products, reduce
            )
        dtype: Any = squares.dtype
        a, b, magnitude = (as_dtype(leaf, dtype, xp=self.xp) for leaf in leaves)
        factors = Factors(weight, a, b if scaling == 1 else scaling * b, row_scale)
        norm, projection = self._measured(factors)
        gain, unit = self.over_norm(magnitude, norm), self.over_norm(projection, norm)
        return Norm(norm, gain, unit, TorchFactored(factors))

    def _measured(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return n and V Aᵀ, from blocks of rows of V."""
        weight, a, scaled_b, row_scale = cast(tuple[Tensor, ...], factors)
        norm = a.new_empty(weight.shape[:-1])
        projection = a.new_empty(scaled_b.shape)
        for element in itertools.product(*map(range, weight.shape[:-2])):
            for rows in self._blocks(weight.shape[-2], weight.shape[-1], weight):
                here = (*element, rows)
                v = weight[here].to(a.dtype, copy=True)
                if row_scale is not None:
                    v *= row_scale[here][:, None]
                v.addmm_(scaled_b[here], a[element])
                norm[here] = self._row_norms(v)
                self.xp.mm(v, a[element].mT, out=projection[here])
        return norm, projection

    def _row_norms(self, rows: Tensor) -> Tensor:
        """Return ‖vᵢ‖. Squares of float32 neither overflow nor underflow in float64."""
        if rows.dtype == self.xp.float32:
            linalg: Any = self.xp.linalg
            return linalg.vector_norm(rows, axis=-1, dtype=self.xp.float64)
        return safe_row_norms(rows, xp=self.xp)

    def _measure_on_v(
        self, trusted: Tensor, norm: ConsumedTensor, factors: Factors, reduce: Reduce | None
    ) -> tuple[Tensor, ProductDirection]:
        """Return the norms and V: its factors where every row is trusted."""
        norm, direction = super()._measure_on_v(trusted, norm, factors, reduce)
        if isinstance(direction, Factored):
            direction = TorchFactored(direction.factors)
        return norm, direction

    # A prepared norm must not be used with another adapter

    def unchanged(self, snapshot: Snapshot | None, then: Adapter, now: Adapter) -> bool:
        """Return whether `now` is still the adapter `then`: one comparison for each plain array."""
        if isinstance(snapshot, Adapter) and all(map(self.has_memory, (*snapshot, *now))):
            return all(map(self._same, snapshot, now))
        return super().unchanged(snapshot, then, now)

    def _same(self, then: Tensor, now: Tensor) -> bool:
        """Return whether two plain arrays have one shape, one dtype and the same values.

        NumPy compares a hundred thousand numbers in a third of the time of `torch.equal`. Most
        changes are seen in the first number whose bits differ.
        """
        if then.dtype != now.dtype or then.shape != now.shape:
            return False
        differ = self.bits(then) != self.bits(now)
        if not differ.any():
            return True
        first = int(differ.argmax())
        a, b = (array.detach().view(-1)[first].item() for array in (then, now))
        if a != b and (a == a or b == b):  # neither 0 and −0 nor NaN twice
            return False
        return same_values(then, now, xp=self.xp)

    def has_memory(self, tensor: Tensor) -> bool:
        """Return whether `bits` can look at a tensor: a plain and contiguous one on the host."""
        import torch

        if torch._C._are_functorch_transforms_active():  # it may stand for many
            return False
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        on_host = plain and tensor.device.type == "cpu"
        return on_host and tensor.is_contiguous() and tensor.data_ptr() != 0

    def bits(self, tensor: Tensor) -> Any:
        """Return the numbers of a tensor as integers in an array of NumPy, in the same memory.

        The array does not keep the memory: read it before anything can free that. `Tensor.numpy`
        keeps it, and then PyTorch cannot resize it any more, as FSDP does.
        """
        size = tensor.element_size()
        memory = (ctypes.c_char * (size * tensor.numel())).from_address(tensor.data_ptr())
        return np.frombuffer(memory, f"i{size}")


@functools.cache
def multiplies(kind: str, dtype: DType) -> bool:
    """Return whether a device of this kind multiplies arrays of a 16-bit dtype by itself.

    A CPU without instructions for it takes up to 150 times as long as for float32.
    """
    import torch

    if kind != "cpu":
        return True
    name = {"bfloat16": "bf16", "float16": "fp16"}[str(dtype).removeprefix("torch.")]
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


def _widened(left: Tensor, right: Tensor) -> Tensor:
    """Return left right of 16-bit arrays in float32, (i, k) (k, j) -> (i, j)."""
    import torch

    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _by_parts(left: Tensor, right: Tensor) -> Tensor:
    """Return left right of float32 and bfloat16, (i, k) (k, j) -> (i, j); only sums are rounded.

    A float32 is the sum of three bfloat16 numbers, its parts. One product takes the parts of all
    rows. The parts of float16 would underflow.
    """
    import torch

    parts, rest = [], left
    for _ in range(PARTS):
        parts.append(rest.to(right.dtype))
        rest = rest - parts[-1]
    product = _widened(torch.cat(parts), right)
    return product.reshape(PARTS, *left.shape[:1], -1).sum(0)


def _add_product(total: ConsumedTensor, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left right of 16-bit arrays, rounded once: (*stack, i, k) (*stack, k, j)."""
    if total.ndim == 2:
        return total.addmm_(left, right)
    flat = (array.reshape(-1, *array.shape[-2:]) for array in (total, left, right))
    first, *factors = flat
    return first.baddbmm_(*factors).reshape(total.shape)


def _is_transformed(*arrays: Tensor) -> bool:
    """Return whether PyTorch differentiates or maps over the arrays. It forbids `out=` then."""
    import torch

    if torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled() and any(array.requires_grad for array in arrays):
        return True
    if torch.autograd.forward_ad._current_level < 0:
        return False
    duals = map(torch.autograd.forward_ad.unpack_dual, arrays)
    return any(dual.tangent is not None for dual in duals)
