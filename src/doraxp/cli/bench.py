"""`doraxp bench`: what an adapted layer costs beside the bare one, and beside PEFT's."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from doraxp.backends import available
from doraxp.cli._arguments import backend, integer, lacks, output
from doraxp.cli._bench import curves, gpu, peft
from doraxp.cli._bench.cases import DTYPES, TASKS, Case
from doraxp.cli._libraries import BACKENDS, versions
from doraxp.cli._report import write_json

SUMMARY = (
    "Measure time and memory of doraxp beside the bare products, and beside PEFT where it is "
    "installed: all in one process, checked for the same answers, ratios first."
)
DEFAULTS = ("numpy", "torch")
DEFAULT_CASES: dict[str, list[Any]] = {
    "shapes": [(4096, 4096)],
    "tokens": [1, 512],
    "rank": [16],
    "dtype": ["float32"],
}
TOKENLESS = ("norm", "merge", "adamw")
"""Tasks that tokens make no difference to: done once for all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--shapes",
        type=shape,
        nargs="+",
        metavar="OUTxIN",
        help="of the weight (default: 4096x4096)",
    )
    for name, what in (("tokens", "in x"), ("rank", "of the adapter")):
        default = DEFAULT_CASES[name]
        parser.add_argument(
            f"--{name}",
            type=integer(1),
            nargs="+",
            metavar="N",
            help=f"{what} (default: {' '.join(map(str, default))})",
        )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        help="that the weight is stored in (default: float32)",
    )
    parser.add_argument(
        "--backend",
        type=backend,
        action="append",
        metavar="{" + ",".join(BACKENDS) + "}",
        help="array library, repeatable; PEFT takes part where torch does and it is installed "
        f"(default: those of {', '.join(DEFAULTS)} that are installed); cupy by itself, and on "
        "the cases of the docs where none are asked for",
    )
    parser.add_argument(
        "--tasks",
        choices=TASKS,
        nargs="+",
        help="(default: all; without cupy all but backward, which is a part of step)",
    )
    parser.add_argument(
        "--rounds",
        type=integer(2),
        default=5,
        metavar="N",
        help="how many samples of each contestant are taken (default: %(default)s)",
    )
    parser.add_argument(
        "--curves",
        action="store_true",
        help="measure steps over tokens, rank and size instead, around the last of --shapes, "
        "--tokens, --rank and --dtype, and fit the exponents",
    )
    parser.add_argument("--plot", type=output(".png"), metavar="FILE", help="save a picture")
    parser.add_argument(
        "--json", type=output(".json"), metavar="FILE", help="write every figure, of each round"
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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from doraxp.cli._bench import memory
    from doraxp.cli._bench.measure import Measured, WrongAnswerError, measure
    from doraxp.cli._bench.report import figures, print_exponents, print_tables
    from doraxp.cli._tables import print_names

    asked = {name: getattr(arguments, name) for name in DEFAULT_CASES}
    on_gpu = gpu.LIBRARY in (arguments.backend or ())
    if on_gpu and set(arguments.backend) != {gpu.LIBRARY}:
        return _refuse(f"--backend {gpu.LIBRARY} must be alone, got {arguments.backend}")
    for name, value in DEFAULT_CASES.items():
        setattr(arguments, name, asked[name] or value)
    arguments.tasks = arguments.tasks or [task for task in TASKS if on_gpu or task != "backward"]
    cases = gpu.suite() if on_gpu and not any(asked.values()) else _cases(arguments)
    jobs = list(dict.fromkeys(_sweeps(arguments) if arguments.curves else _jobs(cases, arguments)))
    for case, _ in jobs:
        most = min(case.out, case.inner)
        if case.rank > most:
            shape = f"{case.out}x{case.inner}"
            if arguments.curves and case.rank not in arguments.rank:
                least = max(curves.SWEEPS["rank"])
                return _refuse(
                    f"--shapes must be at least {least}x{least} for the ranks of --curves, got "
                    f"{shape}"
                )
            return _refuse(f"--rank must be in 1..{most} for {shape}, got {case.rank}")
    if arguments.plot is not None and {task for _, task in jobs} == {"adamw"}:
        return _refuse("--plot draws times over the bare product's, and adamw has none")
    libraries, missing = _libraries(arguments.backend)
    results: list[Measured] = []
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with (
        memory.child() as child,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        bar = progress.add_task("", total=len(jobs) * (arguments.rounds + 2))
        for case, task in jobs:
            progress.update(bar, description=f"{case}: {task}")
            try:
                results += measure(
                    task,
                    case,
                    libraries,
                    rounds=arguments.rounds,
                    child=child,
                    on_part=lambda: progress.advance(bar),
                )
            except WrongAnswerError as error:
                return _refuse(f"wrong answer: {error}")
    console, counts, processors = Console(), threads(), kernels()
    found = curves.collect(_base(arguments), results) if arguments.curves else {}
    if found:
        print_exponents(found, console)
    else:
        print_tables(results, console)
    console.print(f"Medians of {arguments.rounds} rounds; ± half the distance of the quartiles.")
    console.print("Threads: " + _listed(counts))
    if processors:
        console.print("BLAS kernels: " + _listed(processors))
    if on_gpu:
        console.print(f"Device: {gpu.device()['name']}")
        console.print("Times are the device's; the host needs its own to make a call of it.")
    for name, reason in missing.items():
        print_names(f"Without {name}: {reason}", console)
    if arguments.json is not None:
        took_part = dict.fromkeys([*libraries, *(one.library for one in results)])
        names = [name.lower() for name in took_part]
        modules = dict.fromkeys(["numpy", *names, *(["torch"] if "peft" in names else [])])
        head: dict[str, Any] = {"versions": versions(*modules), "threads": counts}
        head |= {"blas_kernels": processors, "missing": missing}
        if on_gpu:
            head["device"] = gpu.device()
        fitted = {name: curves.exponents(name, curve) for name, curve in found.items()}
        fits = {"exponents": fitted} if found else {}
        write_json(arguments.json, {**head, **fits, "results": figures(results)})
        print_names(f"Figures: {arguments.json}", console)
    if arguments.plot is not None:
        from doraxp.cli._bench.picture import save_curves, save_ratios

        save_curves(found, arguments.plot) if found else save_ratios(results, arguments.plot)
        print_names(f"Picture: {arguments.plot}", console)
    return 0


def threads() -> dict[str, int]:
    """Return how many threads each pool of this process has."""
    import threadpoolctl

    counts = {
        str(pool["prefix"]): int(pool["num_threads"]) for pool in threadpoolctl.threadpool_info()
    }
    torch = sys.modules.get("torch")  # its MKL is linked in, where nobody else can ask it
    return counts if torch is None else {**counts, "torch": torch.get_num_threads()}


def kernels() -> dict[str, str]:
    """Return the processor whose kernels each BLAS runs; OPENBLAS_CORETYPE may have chosen it."""
    import threadpoolctl

    pools = threadpoolctl.threadpool_info()
    return {pool["prefix"]: pool["architecture"] for pool in pools if "architecture" in pool}


def _listed(named: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for (out, inner), rank, dtype in product(arguments.shapes, arguments.rank, arguments.dtype):
        for tokens in arguments.tokens:
            yield Case(out, inner, tokens, rank, dtype)


def _jobs(cases: Iterable[Case], arguments: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    done = set()
    for case in cases:
        for task in arguments.tasks:
            of_all = replace(case, tokens=1), task
            if task not in TOKENLESS or of_all not in done:
                yield case, task
            done.add(of_all)


def _base(arguments: argparse.Namespace) -> Case:
    out, inner = arguments.shapes[-1]
    return Case(out, inner, arguments.tokens[-1], arguments.rank[-1], arguments.dtype[-1])


def _sweeps(arguments: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    for _, _, case in curves.cases(_base(arguments)):
        yield case, curves.TASK


def _libraries(asked: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Return who takes part, and why the others cannot."""
    missing: dict[str, str] = {}
    if asked is None:
        states = [status for status in available() if status.name in DEFAULTS]
        asked = [status.name for status in states if status.usable]
        missing = {status.name: status.detail for status in states if not status.usable}
    libraries = list(dict.fromkeys(asked))
    reason = peft.why_not()
    if reason is not None:
        missing[peft.LIBRARY] = reason
    elif "torch" in libraries:
        libraries.append(peft.LIBRARY)
    return libraries, missing


def _refuse(message: str) -> int:
    print(f"doraxp bench: error: {message}", file=sys.stderr)
    return 2
