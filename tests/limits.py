"""The limits of each library, with their reasons. All else of the support table must be right.

A key is a dtype, a feature of `support.FEATURES`, both with a comma between them, or a word that
only marks tests: `@pytest.mark.uses("NaN")`. A test that uses one of them must fail there.
"""

from __future__ import annotations

from collections.abc import Mapping

NO_HALF = "The standard has no dtype of 16 bits, and array-api-strict has no other."
NO_GRAPH = "The library has no graphs."
NO_TAKE = "`sparse.take` does not accept the integer arrays of sparse itself."
NO_INT32 = "`ndonnx.take` accepts indices of int64 only. The indices of the package are int32."
NO_ZARR = "cubed stores results by Zarr, which has no bfloat16."
EAGER_TAKE = "`cubed.take` computes its indices before the plan is complete."
STORED_BY_CUBED = (
    "forward", "backward", "merge", "rows that cancel", "stacks", "dropout", "jit, graph",
)  # fmt: skip

LIMITS: Mapping[str, Mapping[str, str]] = {
    "numpy": {"jit, graph": NO_GRAPH},
    "strict": {"float16": NO_HALF, "bfloat16": NO_HALF, "jit, graph": NO_GRAPH},
    "torch": {
        "jit, graph": "`torch.compile` breaks the graph where `doraxp.forward` reads a value. The "
        "functions of `doraxp.torch` have no break.",
    },
    "jax": {},
    "dask": {},
    "cupy": {"jit, graph": "CUDA graphs were not tried."},
    "cuda-host": {"jit, graph": "The emulated device has no CUDA graphs."},
    "mlx": {},
    "sparse": {
        **dict.fromkeys(("convolution", "embedding", "quantised weight"), NO_TAKE),
        "jit, graph": NO_GRAPH,
        "NaN": "sparse computes the zeros that it does not store too: 0 / 0 makes them NaN. Its "
        "products ignore NaN beside such a zero.",
    },
    "ndonnx": {
        "bfloat16": "ndonnx has no bfloat16.",
        **dict.fromkeys(("convolution", "quantised weight"), NO_INT32),
    },
    "cubed": {
        **dict.fromkeys(("convolution", "embedding", "quantised weight"), EAGER_TAKE),
        **{f"{feature}, bfloat16": NO_ZARR for feature in STORED_BY_CUBED},
    },
    "blosc2": {
        "*": "Some functions of blosc2 give other shapes and values than the standard says.",
    },
}
"""By lane."""
