"""CuPy on NVIDIA GPUs. Imports without CuPy and without a GPU.

No kernels yet: the operations are the generic ones, and have not yet run on a device.
"""

from __future__ import annotations

import importlib
import importlib.util

from doraxp._types import Array
from doraxp.backends._generic import Operations


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


class CupyOperations(Operations):
    """The operations on CuPy arrays."""

    def may_look(self, array: Array) -> bool:
        """Never: reading a value waits for the whole queue."""
        return False
