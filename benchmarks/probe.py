"""Time the variants that the design of the CuPy backend left open, on a GPU.

    python benchmarks/probe.py machine FOLDER     the device, its two ceilings; builds the kernels
    python benchmarks/probe.py variants FOLDER    a line for each variant

It needs a GPU, CuPy, PyTorch and ml_dtypes. Each line has a name, a shape, a time in µs and that
time ÷ the time of a reference, and is added to FOLDER/figures.jsonl. Times are the device's, by its
events, unless the line says "host". A variant that cannot run is a line with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import cupy
from device_figures import append
from gpu_kernels import draw
from probe_launches import hosts, launches
from probe_lines import SAMPLES, Call, Probe
from probe_passes import runs, stores
from probe_products import orders, skinny

import doraxp
from doraxp import bench
from doraxp.backends import cuda_kernels

PACKAGES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "peft", "cuda-core")
GROUPS = (stores, runs, orders, skinny, hosts, launches)
LARGE = 1 << 30, 8192
"""Numbers of a copy, 4 GiB, and rows and columns of a product: far more than the cache holds."""


def machine(folder: Path) -> None:
    """Print the device, build all kernels, and measure the two ceilings."""
    (size, n), device, versions = LARGE, bench.device(), {"doraxp": doraxp.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    append(folder, "machine", device=device, versions=versions)
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{device['name']}, driver {device['driver']}, {listed}", flush=True)
    numbers = draw(size)
    to = cupy.empty_like(numbers)
    copy = partial(to.data.copy_from_device_async, numbers.data, numbers.nbytes)
    bytes_per_second = 2 * numbers.nbytes / least_seconds(copy)
    a, b = (draw(n, n, dtype="bfloat16") for _ in range(2))
    operations_per_second = 2 * n**3 / least_seconds(lambda: a @ b)
    ceilings = {
        "copy_bytes_per_second": bytes_per_second,
        "bfloat16_operations_per_second": operations_per_second,
    }
    append(folder, "ceilings", **ceilings)
    print(
        f"copy {bytes_per_second / 1e12:.2f} TB/s, read and written; bfloat16 product of {n}³ "
        f"{operations_per_second / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    build_all()


def least_seconds(call: Call) -> float:
    """Return the median seconds of a call on the device."""
    call()
    return statistics.median(bench.gpu_seconds(cupy, call, 10) for _ in range(SAMPLES))


def build_all() -> None:
    """Build the kernels for all dtypes at once. CuPy keeps them on disk for the next processes."""
    builds = list(cuda_kernels().builds.values())
    workers = min(len(builds), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(build, builds))
    print(f"{len(builds)} builds of the kernels", flush=True)


def build(options: tuple[str, ...]) -> None:
    """Build the kernels for one set of dtypes."""
    cupy.RawModule(code=cuda_kernels().source, options=options).compile()


def variants(folder: Path) -> None:
    """Measure all variants."""
    probe = Probe(folder)
    for group in GROUPS:
        print(str(group.__doc__).partition("\n")[0], flush=True)
        with probe.reported(group.__name__, "all"):
            group(probe)
        cupy.get_default_memory_pool().free_all_blocks()


def main() -> None:
    """Measure the part that the command line names."""
    parts = {"machine": machine, "variants": variants}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    parts[arguments.part](arguments.folder)


if __name__ == "__main__":
    main()
