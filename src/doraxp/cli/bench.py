"""`doraxp bench`: the cost of an adapted layer beside the bare one, and beside PEFT's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from doraxp import bench
from doraxp._terminal.figures import write_json
from doraxp._terminal.messages import output_that_may_fail, print_error
from doraxp._terminal.progress import progress_by_parts
from doraxp._terminal.runtimes import BACKENDS
from doraxp._terminal.tables import new_console, print_caption, print_names
from doraxp.cli._arguments import backend, integer, lacks, output

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY = "Measure time and memory, beside bare products and beside PEFT."
DETAILS = (
    "All run in one process, and are checked for the same answers. Ratios come first. PEFT takes "
    "part where it is installed."
)
EXAMPLE = "doraxp bench --backend numpy --shapes 256x256 --tokens 32 --rank 4"
STATUS_1 = None
CUPY, TORCH = "cupy", "torch"
DEFAULTS: dict[str, list[Any]] = {
    "shapes": [(4096, 4096)],
    "tokens": [1, 512],
    "rank": [16],
    "dtype": ["float32"],
}
CUDA_DEFAULTS: dict[str, list[Any]] = {
    **DEFAULTS,
    "tokens": [1, 128, 4096],
    "dtype": ["bfloat16", "float32"],
}
"""The defaults with `--device cuda`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        metavar="OUTxIN",
        help="shapes of the weight (default: 4096x4096)",
    )
    for name, meaning in (("tokens", "numbers of tokens in x"), ("rank", "ranks of the adapter")):
        default = DEFAULTS[name]
        parser.add_argument(
            f"--{name}",
            type=integer(1),
            nargs="+",
            metavar="N",
            help=f"{meaning} (default: {' '.join(map(str, default))})",
        )
    parser.add_argument(
        "--dtype",
        choices=bench.DTYPES,
        nargs="+",
        help="dtypes in which the weight is stored (default: float32)",
    )
    parser.add_argument(
        "--backend",
        type=backend,
        action="append",
        metavar="{" + ",".join(BACKENDS) + "}",
        help="array library, repeatable; PEFT takes part where torch does and it is installed "
        f"(default: those of {', '.join(bench.LIBRARIES)} that are installed); cupy by itself, and "
        "on the workloads of the docs unless you ask for others",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where PyTorch computes, with --backend torch by itself; cuda has steps and "
        "evaluation, of 4096x4096 in bfloat16 and float32 with 1, 128 and 4096 tokens unless you "
        "ask for others (default: %(default)s)",
    )
    parser.add_argument(
        "--autocast",
        action="store_true",
        help="call PyTorch's layers under its autocast, in bfloat16; with --backend torch by "
        "itself; steps and evaluation",
    )
    parser.add_argument(
        "--tasks",
        choices=bench.TASKS,
        nargs="+",
        help="tasks to measure (default: all; without cupy all but backward, which is a part of "
        "step)",
    )
    parser.add_argument(
        "--rounds",
        type=integer(2),
        default=5,
        metavar="N",
        help="number of samples of each contestant (default: %(default)s)",
    )
    parser.add_argument(
        "--curves",
        action="store_true",
        help="measure steps over tokens, rank and size instead, around the last of --shapes, "
        "--tokens, --rank and --dtype, and fit the exponents",
    )
    parser.add_argument("--plot", type=output(".png"), metavar="FILE", help="save a picture")
    parser.add_argument(
        "--json", type=output(".json"), metavar="FILE", help="write all figures, of each round"
    )


def shape(text: str) -> tuple[int, int]:
    """Parse OUTxIN."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be OUTxIN, as 4096x11008, got {text!r}")
    return int(match[1]), int(match[2])


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables, save the figures."""
    plotting = ("matplotlib",) if arguments.plot is not None else ()
    if lacks("bench", "rich", "threadpoolctl", "ml_dtypes", *plotting):
        return 2
    try:
        jobs = _jobs(arguments)
    except ValueError as error:
        return _refuse(str(error))
    libraries, missing = bench.libraries(arguments.backend)

    def save(results: list[bench.Measured], curves: Mapping[str, bench.Curve]) -> None:
        if arguments.json is not None:
            write_json(arguments.json, bench.report(results, libraries, missing, curves))

    try:  # a run that is stopped leaves the figures of the tasks that it finished
        results = _measure(jobs, libraries, arguments.rounds, lambda results: save(results, {}))
    except bench.WrongAnswerError as error:
        return _refuse(f"wrong answer: {error}")
    curves = bench.collect(_base(arguments), results) if arguments.curves else {}
    save(results, curves)
    if arguments.plot is not None and curves:
        bench.save_curves(curves, arguments.plot)
    elif arguments.plot is not None:
        bench.save_ratios(results, arguments.plot)
    with output_that_may_fail("doraxp bench"):
        console = new_console()
        if curves:
            bench.print_exponents(curves, console)
        else:
            bench.print_tables(results, console)
        rounds = f"Medians of {arguments.rounds} rounds; ± half the distance of the quartiles."
        print_caption(rounds, console)
        _print_conditions(results, missing, console)
        for label, path in (("Figures", arguments.json), ("Picture", arguments.plot)):
            if path is not None:
                print_names(f"{label}: {path}", console)
    return 0


def _jobs(arguments: argparse.Namespace) -> list[bench.Job]:
    """Fill in the defaults and return the jobs; ValueError names an argument that does not fit."""
    on_gpu = CUPY in (arguments.backend or ())
    if on_gpu and set(arguments.backend) != {CUPY}:
        raise ValueError(f"--backend {CUPY} must be alone, got {arguments.backend}")
    on_cuda = arguments.device == "cuda"
    is_default = not any(getattr(arguments, name) for name in DEFAULTS)
    for name, value in (CUDA_DEFAULTS if on_cuda else DEFAULTS).items():
        setattr(arguments, name, getattr(arguments, name) or value)
    tasks = arguments.tasks or [task for task in bench.TASKS if on_gpu or task != "backward"]
    if on_cuda or arguments.autocast:
        tasks = _tasks_of_torch(arguments)
    if arguments.curves:
        jobs = bench.curve_jobs(_base(arguments))
    elif on_gpu and is_default:
        jobs = bench.jobs(bench.gpu_suite(), tasks)
    else:
        sizes = product(arguments.shapes, arguments.rank, arguments.dtype, arguments.tokens)
        workloads = (
            _workload(arguments, out, inner, tokens, rank, dtype)
            for (out, inner), rank, dtype, tokens in sizes
        )
        jobs = bench.jobs(workloads, tasks)
    _check_ranks(jobs, arguments)
    if arguments.plot is not None and {job.task for job in jobs} == {"adamw"}:
        raise ValueError(
            "--plot draws times over the bare product's, but adamw has no bare product"
        )
    return jobs


def _tasks_of_torch(arguments: argparse.Namespace) -> list[str]:
    """Return the tasks on PyTorch's CUDA device or under autocast.

    ValueError names an argument that does not fit them.
    """
    asked = "--device cuda" if arguments.device == "cuda" else "--autocast"
    if set(arguments.backend or ()) != {TORCH}:
        raise ValueError(f"{asked} needs --backend {TORCH} by itself, got {arguments.backend}")
    if others := set(arguments.tasks or ()).difference(bench.TORCH_TASKS):
        known = " and ".join(bench.TORCH_TASKS)
        raise ValueError(f"{asked} has the --tasks {known} alone, got {' '.join(sorted(others))}")
    if arguments.autocast and (others := set(arguments.dtype) - {"float32", "bfloat16"}):
        raise ValueError(
            f"--autocast needs --dtype float32 or bfloat16, got {' '.join(sorted(others))}"
        )
    if arguments.device == "cuda" and (reason := bench.why_not_on_cuda()) is not None:
        raise ValueError(f"--device cuda cannot run here: {reason}")
    return arguments.tasks or list(bench.TORCH_TASKS)


def _workload(
    arguments: argparse.Namespace, out: int, inner: int, tokens: int, rank: int, dtype: str
) -> bench.Workload:
    return bench.Workload(
        out, inner, tokens, rank, dtype, autocast=arguments.autocast, device=arguments.device
    )


def _check_ranks(jobs: list[bench.Job], arguments: argparse.Namespace) -> None:
    for workload, _ in jobs:
        most = min(workload.out, workload.inner)
        if workload.rank <= most:
            continue
        sizes = f"{workload.out}x{workload.inner}"
        if arguments.curves and workload.rank not in arguments.rank:
            least = max(job.workload.rank for job in jobs)
            raise ValueError(
                f"--shapes must be at least {least}x{least} for the ranks of --curves, got {sizes}"
            )
        raise ValueError(f"--rank must be in 1..{most} for {sizes}, got {workload.rank}")


def _base(arguments: argparse.Namespace) -> bench.Workload:
    """Return the workload that the curves go around."""
    out, inner = arguments.shapes[-1]
    last = (getattr(arguments, name)[-1] for name in ("tokens", "rank", "dtype"))
    return _workload(arguments, out, inner, *last)


def _measure(
    jobs: list[bench.Job],
    libraries: list[str],
    rounds: int,
    on_job: Callable[[list[bench.Measured]], None],
) -> list[bench.Measured]:
    """Measure all jobs, with a progress bar; `on_job` gets the results so far after each."""
    results: list[bench.Measured] = []
    with bench.fresh_process() as process, progress_by_parts() as progress:
        bar = progress.add_task("", total=len(jobs) * (rounds + 2))
        for workload, task in jobs:
            progress.update(bar, description=f"{workload}: {task}")
            results += bench.measure(
                task,
                workload,
                libraries,
                rounds=rounds,
                process=process,
                on_part=lambda: progress.advance(bar),
            )
            on_job(results)
    return results


def _print_conditions(
    results: list[bench.Measured], missing: dict[str, str], console: Console
) -> None:
    """Print the conditions of the run: threads, kernels, device, and libraries that are missing."""
    console.print("Threads: " + _listed(bench.threads()))
    if kernels := bench.blas_kernels():
        console.print("BLAS kernels: " + _listed(kernels))
    if (device := bench.device_of(results)) is not None:
        console.print(f"Device: {device['name']}")
        console.print("Times are the device's; the host needs its own to make a call of it.")
    for name, reason in missing.items():
        print_names(f"Without {name}: {reason}", console)


def _listed(named: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())


def _refuse(message: str) -> int:
    print_error("doraxp bench", message)
    return 2
