"""The benchmark: the time and memory of doraxp beside the bare products, and beside PEFT's.

    contestant    one way to do a task, on one library
    workload      the sizes and the dtype of a layer, and the number of tokens
    task          forward, backward, step, evaluation, norm, merge or adamw

The answers of all contestants are checked before any of them is timed.
"""

from doraxp.bench._contestant import Contestant
from doraxp.bench._contestants import contestants
from doraxp.bench._cuda import why_not as why_not_on_cuda
from doraxp.bench._curves import Curve, collect
from doraxp.bench._device import description as device
from doraxp.bench._device import host_seconds as gpu_host_seconds
from doraxp.bench._device import seconds as gpu_seconds
from doraxp.bench._gpu import suite as gpu_suite
from doraxp.bench._machine import blas_kernels, threads
from doraxp.bench._measure import (
    Measured,
    WrongAnswerError,
    check_all,
    measure,
    quartiles,
    time_all,
)
from doraxp.bench._memory import fresh_process, peaks
from doraxp.bench._picture import save_curves, save_ratios
from doraxp.bench._plan import LIBRARIES, Job, curve_jobs, jobs, libraries
from doraxp.bench._report import device_of, report
from doraxp.bench._tables import print_exponents, print_tables
from doraxp.bench._torch import TASKS as TORCH_TASKS
from doraxp.bench._workloads import DTYPES, TASKS, Workload, draw

__all__ = [
    "DTYPES",
    "LIBRARIES",
    "TASKS",
    "TORCH_TASKS",
    "Contestant",
    "Curve",
    "Job",
    "Measured",
    "Workload",
    "WrongAnswerError",
    "blas_kernels",
    "check_all",
    "collect",
    "contestants",
    "curve_jobs",
    "device",
    "device_of",
    "draw",
    "fresh_process",
    "gpu_host_seconds",
    "gpu_seconds",
    "gpu_suite",
    "jobs",
    "libraries",
    "measure",
    "peaks",
    "print_exponents",
    "print_tables",
    "quartiles",
    "report",
    "save_curves",
    "save_ratios",
    "threads",
    "time_all",
    "why_not_on_cuda",
]
