"""`Options`: the choices of a merge, and the dtypes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from doraxp._base.safetensors import Tensor
from doraxp._base.scalars import check_count
from doraxp.checkpoint._safetensors import DTYPES

_CHOICES = {
    "backend": ("numpy", "torch", "cupy"),
    "compute": ("float32", "float64", None),
    "dtype": (*DTYPES, None),
    "rounding": ("nearest", "stochastic"),
    "targets": ("bf16", "same"),
}


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
    targets: str = "bf16"
    """How a merged weight is stored that is quantised in the base: "bf16" in bfloat16, or in
    `dtype`; "same" in the format of the base, which may lose the update."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                *most, last = map(repr, choices)
                raise ValueError(
                    f"{name} must be {', '.join(most)} or {last}, got {getattr(self, name)!r}"
                )
        seed = check_count("seed", self.seed)
        if seed >= 1 << 64:
            raise ValueError(f"seed must be below {1 << 64}, got {seed}")
        object.__setattr__(self, "seed", seed)  # an integer of NumPy cannot be written as JSON


def merge_dtype(read: Tensor, written: Tensor, options: Options) -> str:
    """Return the dtype to compute in, "float32" or "float64"."""
    narrow = {read.dtype, written.dtype} <= {"F16", "BF16"}
    return options.compute or ("float32" if narrow else "float64")
