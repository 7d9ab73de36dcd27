"""The threads and the BLAS kernels of this process, on which all times depend."""

from __future__ import annotations

import sys

from doraxp._base.extras import require


def threads() -> dict[str, int]:
    """Return the number of threads of each pool in this process."""
    require("bench", "threadpoolctl", of="the list of threads")
    import threadpoolctl

    counts = {
        str(pool["prefix"]): int(pool["num_threads"]) for pool in threadpoolctl.threadpool_info()
    }
    torch = sys.modules.get("torch")  # it is linked with its own MKL, which only torch can ask
    return counts if torch is None else {**counts, "torch": torch.get_num_threads()}


def blas_kernels() -> dict[str, str]:
    """Return, for each BLAS, the processor that its kernels are for.

    The environment variable OPENBLAS_CORETYPE may have chosen another one than the machine has.
    """
    require("bench", "threadpoolctl", of="the list of kernels")
    import threadpoolctl

    pools = threadpoolctl.threadpool_info()
    return {pool["prefix"]: pool["architecture"] for pool in pools if "architecture" in pool}
