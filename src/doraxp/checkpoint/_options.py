"""`Options`: the choices of a merge, and the dtypes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint._safetensors import DTYPES


@dataclass(frozen=True)
class Options:
    """The choices of a merge."""

    backend: str = "numpy"
    """The library that computes: "numpy", "torch" or "cupy"."""
    compute: str | None = None
    """"float32" or "float64"; None for float32 where what is read and written is narrower, else
    float64."""
    dtype: str | None = None
    """The dtype of every floating tensor in the result, such as "F16" or "BF16"; None keeps each
    tensor's own."""
    rounding: str = "nearest"
    """"nearest" or "stochastic", of merged tensors to bfloat16 and float16: stochastic rounding
    keeps, in the mean, an update that is smaller than the distance of two such numbers."""
    seed: int = 0
    """Of the stochastic rounding, in 0..2**64 - 1. The same seed gives the same bytes."""

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be nearest or stochastic, got {self.rounding!r}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in 0..{(1 << 64) - 1}, got {self.seed}")


def written_as(tensor: Tensor, options: Options) -> Tensor:
    """Return the entry that a tensor of the base has in the result."""
    if options.dtype is None or tensor.dtype not in DTYPES or tensor.dtype == options.dtype:
        return tensor
    items = tensor.nbytes // DTYPES[tensor.dtype].itemsize
    return Tensor(options.dtype, tensor.shape, items * DTYPES[options.dtype].itemsize)


def merge_dtype(read: Tensor, written: Tensor, options: Options) -> str:
    """Return the dtype to compute in, "float32" or "float64"."""
    narrow = {read.dtype, written.dtype} <= {"F16", "BF16"}
    return options.compute or ("float32" if narrow else "float64")
