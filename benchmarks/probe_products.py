"""Variants of the products: the order of the low-rank update, cuBLAS's beta, skinny factors."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import cupy
import numpy as np
from gpu_kernels import draw
from probe_lines import PRIVATE, SHAPES, TOKENS, Call, Probe, sizes

from doraxp.backends import operations

SKINNY = ((4096, 4096, 16), (4096, 11008, 16), (4096, 28672, 64), (8192, 28672, 64))
"""n, k and r of skinny products: of x (tokens, in) and dy (tokens, out), and of W (out, in)."""
WHOLE_SUMS = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: the backend's mode of cuBLAS."""


def orders(probe: Probe) -> None:
    """The low-rank update before or after the large product, in each dtype of the result.

    z = x Wᵀ + L (s B)ᵀ and dx = dz W + low A. cuBLAS takes the update's factors in bfloat16, in 6 r
    columns: the products of three parts of each that have the digits of a float32. The backend's
    kernel takes them in float32 and splits them itself; C is its result, and the backend then adds
    the product.
    """
    for out, inner, rank in SHAPES:
        for forward, (k, n) in ((True, (inner, out)), (False, (out, inner))):
            for dtype in ("bfloat16", "float32"):
                title = f"{'z' if forward else 'dx'} in {dtype}"
                shape = sizes(out, inner, rank=rank)
                make = partial(Orders.make, TOKENS, k, n, rank, dtype, forward)
                size = 2 * (TOKENS * k + k * n + TOKENS * n * (1 if dtype == "bfloat16" else 2))
                reference = f"{title}: product, beta 0"
                for name, act in ACTS.items():

                    def call(make: Any = make, act: Any = act) -> Call:
                        return partial(act, make())

                    probe.device(f"{title}: {name}", shape, call, size=size, over=reference)


class Orders(NamedTuple):
    """The arrays of a large product and of its low-rank update."""

    left: Any
    right: Any
    low: Any
    """The factors of the update for cuBLAS, (tokens, 6 rank) and (6 rank, n)."""
    columns: Any
    wide_low: Any
    """The factors of the update for the kernel, (tokens, rank), and (n, rank) or (rank, n)."""
    wide_factor: Any
    out: Any
    turned: bool

    @classmethod
    def make(cls, tokens: int, k: int, n: int, rank: int, dtype: str, turned: bool) -> Orders:
        """Draw the arrays; `turned` says that the right factor is a transpose, as Wᵀ is."""

        def right(rows: int) -> Any:
            if turned:
                return draw(n, rows, dtype="bfloat16", scale=rows**-0.5).T
            return draw(rows, n, dtype="bfloat16", scale=rows**-0.5)

        left, low = (draw(tokens, size, dtype="bfloat16") for size in (k, 6 * rank))
        factor = draw(n, rank) if turned else draw(rank, n)
        out = draw(tokens, n, dtype=dtype)
        columns, wide_low = right(6 * rank), draw(tokens, rank)
        return cls(left, right(k), low, columns, wide_low, factor, out, turned)

    def product(self, beta: float) -> None:
        """Make the large product."""
        gemm(self.left, self.right, self.out, beta)

    def update(self, beta: float) -> None:
        """Make the low-rank update."""
        gemm(self.low, self.columns, self.out, beta)

    def update_first(self) -> None:
        """Write the update, and add the product to it."""
        self.update(0.0)
        self.product(1.0)

    def update_after(self) -> None:
        """Write the product, and add the update to it."""
        self.product(0.0)
        self.update(1.0)

    def by_kernel(self) -> Any:
        """Return the update by the backend's kernel."""
        return operations(x=self.left).passes.update(
            self.wide_low, self.wide_factor, self.out.dtype, self.left.dtype, by_rows=self.turned
        )

    def by_backend(self) -> Any:
        """Return the sum as the backend makes it: the kernel writes C, and cuBLAS adds to it."""
        out, products = self.by_kernel(), operations(x=self.left).products
        return products.multiply(self.left, self.right, out.dtype, out=out, beta=1.0)


ACTS: dict[str, Callable[[Orders], Any]] = {
    "product, beta 0": lambda one: one.product(0.0),
    "product, beta 1": lambda one: one.product(1.0),
    "update, beta 0": lambda one: one.update(0.0),
    "update, beta 1": lambda one: one.update(1.0),
    "update first": Orders.update_first,
    "update after": Orders.update_after,
    "C by the backend's kernel": Orders.by_kernel,
    "C by the backend's kernel, then product": Orders.by_backend,
}


def gemm(left: Any, right: Any, out: Any, beta: float) -> None:
    """Set out ← left right + beta out by cublasGemmEx, with sums in float32.

    Each factor is in C order or the transpose of such an array. cuBLAS sees a matrix in C order as
    its transpose, so it is asked for outᵀ = rightᵀ leftᵀ.
    """
    blas, handle = cublas()
    (m, k), n = left.shape, right.shape[1]
    (first, first_step), (second, second_step) = map(laid, (right, left))
    scalars = np.array([1, beta], "f4")
    blas.gemmEx(
        handle, first, second, n, m, k,
        scalars.ctypes.data, right.data.ptr, data_type(right), first_step,
        left.data.ptr, data_type(left), second_step,
        scalars.ctypes.data + 4, out.data.ptr, data_type(out), n,
        blas.CUBLAS_COMPUTE_32F, blas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip


@functools.cache
def cublas() -> tuple[Any, int]:
    """Return cuBLAS and its handle, with the mode set that the backend uses."""
    blas = importlib.import_module("cupy_backends.cuda.libs").cublas
    handle = cupy.cuda.device.get_cublas_handle()
    blas.setMathMode(handle, WHOLE_SUMS)
    return blas, handle


def laid(matrix: Any) -> tuple[int, int]:
    """Return 0 and the step between rows for a matrix in C order, else 1 and that of columns."""
    turned = not matrix.flags.c_contiguous
    return int(turned), matrix.shape[0 if turned else 1]


def data_type(matrix: Any) -> int:
    """Return CUDA's number for the dtype of a matrix."""
    name = {"bfloat16": "CUDA_R_16BF", "float32": "CUDA_R_32F"}[str(matrix.dtype)]
    return int(getattr(cupy.cuda.runtime, name))


def skinny(probe: Probe) -> None:
    """Products with a factor of few columns: own kernels beside cuBLAS on that factor's parts.

    M (n, k) is bfloat16, F is float32 and of 24 bits. M Fᵀ is (n, r), and Fᵀ M is (r, k).
    """
    for n, k, rank in SKINNY:
        shape = sizes(n, k, rank=rank)
        matrix = draw(n, k, dtype="bfloat16")
        for name, few, act in (
            ("M Fᵀ", (rank, k), "project"),
            ("Fᵀ M", (n, rank), "pull"),
        ):
            factor = draw(*few)
            reference = f"{name} by cuBLAS, 3 parts"
            parts = partial(on_parts, matrix, rank, few)
            probe.kernel(reference, shape, parts)
            probe.kernel(
                f"{name} by the backend now", shape, partial(now, act, matrix, factor),
                over=reference,
            )  # fmt: skip
            own = partial(by_own_kernels, act, matrix, factor)
            probe.kernel(f"{name} by own kernels", shape, own, over=reference)


def on_parts(matrix: Any, rank: int, few: tuple[int, int]) -> Call:
    """Return a call of cuBLAS on three parts of a factor at once."""
    n, k = matrix.shape
    if few == (rank, k):
        parts, out = draw(3 * rank, k, dtype="bfloat16").T, cupy.empty((n, 3 * rank), "float32")
        return partial(gemm, matrix, parts, out, 0.0)
    parts, out = draw(3 * rank, n, dtype="bfloat16"), cupy.empty((3 * rank, k), "float32")
    return partial(gemm, parts, matrix, out, 0.0)


def now(act: str, matrix: Any, factor: Any) -> Call:
    """Return a call of the backend's own operation `product`."""
    product = operations(x=matrix).product
    if act == "project":
        return partial(product, matrix, factor.T)
    return partial(product, factor.T, matrix)


def by_own_kernels(act: str, matrix: Any, factor: Any) -> Call:
    """Return a call of the backend's kernels for skinny products."""
    kernels = skinny_of(operations(x=matrix))
    if act == "project":
        return partial(kernels.project, matrix, factor)
    return partial(kernels.pull, factor, matrix)


def skinny_of(ops: Any) -> Any:
    """Return the object that has the own kernels: one that the operations keep, or a new one."""
    kind = importlib.import_module(f"{PRIVATE}.skinny").Skinny
    parts = [ops, *vars(ops).values()]
    kept = (value for part in parts for value in getattr(part, "__dict__", {}).values())
    found = next((value for value in kept if isinstance(value, kind)), None)
    if found is not None:
        return found
    known = {"xp": ops.xp, "cuda": ops.cuda, "products": ops.products}
    return kind(*(known[name] for name in inspect.signature(kind).parameters))
