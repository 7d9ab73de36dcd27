"""The array libraries that doraxp supports, and the operations that it runs on each."""

from doraxp.backends._boundary import check_shaped, operations, operations_of_plain
from doraxp.backends._cupy.signatures import CudaKernels, cuda_kernels
from doraxp.backends._direction import Dense, Direction, Factored, Factors, ProductDirection
from doraxp.backends._dtypes import as_dtype, compute_dtype, is_integer, transpose
from doraxp.backends._generic import Norm, Operations, safe_row_norms
from doraxp.backends._libraries import Status, available
from doraxp.backends._namespaces import array_namespace, device
from doraxp.backends._packed import Packed
from doraxp.backends._precision import exact_products, reduced_precision
from doraxp.backends._rows import by_rows, is_by_rows
from doraxp.backends._windows import Windows, sources, unfolded

__all__ = [
    "CudaKernels",
    "Dense",
    "Direction",
    "Factored",
    "Factors",
    "Norm",
    "Operations",
    "Packed",
    "ProductDirection",
    "Status",
    "Windows",
    "array_namespace",
    "as_dtype",
    "available",
    "by_rows",
    "check_shaped",
    "compute_dtype",
    "cuda_kernels",
    "device",
    "exact_products",
    "is_by_rows",
    "is_integer",
    "operations",
    "operations_of_plain",
    "reduced_precision",
    "safe_row_norms",
    "sources",
    "transpose",
    "unfolded",
]
