"""Compare ratios of times and memory with the project's goals.

    python benchmarks/check.py [--json FILE]

The machine must be idle. On two cores the script takes about ten minutes, and sixteen where other
work uses them. It writes FILE after each workload: a run that is stopped leaves the figures so far.
The exit status is 1 if a ratio misses its goal by more than `MARGIN`. Ratios to NumPy's products
depend on the kernels of its BLAS, which the first line names. The script runs `small_layer.py`
first, for the fixed cost of a call.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import dated
import numpy as np
import quantised_step
import small_layer

from doraxp.bench import (
    Measured,
    Workload,
    blas_kernels,
    contestants,
    fresh_process,
    measure,
    peaks,
    quartiles,
    time_all,
)

MARGIN, ROUNDS = 0.15, 7
NUMPY, PEFT, EXACT = "numpy", "PEFT", "exact"
MIB = 1 << 20
Results = dict[tuple[str, str], Measured]


class Goal(NamedTuple):
    """A bound on the ratio of one contestant to another."""

    task: str
    one: tuple[str, str]
    other: tuple[str, str]
    bound: float
    at_least: bool = False
    of_memory: bool = False
    """The ratio is of the peaks of memory beyond inputs and results, not of the times."""


SQUARE = partial(Workload, 4096, 4096, rank=16)
STEPS = {64: 4.0, 512: 1.9, 2048: 1.9}
ACCELERATED = {64: 0.60, 512: 0.85, 2048: 0.75}
GOALS = {
    SQUARE(tokens=512): [
        Goal("forward", (NUMPY, "norm computed"), (NUMPY, "bare product"), 1.08),
        Goal("forward", (NUMPY, "norm reused"), (NUMPY, "bare product"), 1.04),
        Goal("step", (NUMPY, EXACT), (NUMPY, "bare products"), 1.10),
        Goal("step", (NUMPY, EXACT), (NUMPY, "detached"), 1.05),
    ],
    SQUARE(tokens=1): [
        Goal("evaluation", (PEFT, "DoRA"), (NUMPY, "norm reused"), 60, True),
        Goal("evaluation", (PEFT, "DoRA, DoraCaching"), (NUMPY, "norm reused"), 1.5, True),
        Goal("evaluation", (NUMPY, "norm reused"), (NUMPY, "bare product"), 1.10),
    ],
    Workload(4096, 11008, 1, 16): [
        Goal("merge", (NUMPY, "from nothing"), (NUMPY, "bare copy"), 2.0),
        Goal("merge", (PEFT, "DoRA"), (NUMPY, "from nothing"), 6, True),
        Goal("merge", (PEFT, "DoRA"), (NUMPY, "from nothing"), 20, True, True),
    ],
}
for tokens, bound in STEPS.items():
    goals = GOALS.setdefault(SQUARE(tokens=tokens), [])
    goals.append(Goal("step", (PEFT, "DoRA"), (NUMPY, EXACT), bound, True))
    accelerated = (PEFT, "accelerated, exact")
    goals.append(Goal("step", accelerated, (PEFT, "DoRA"), ACCELERATED[tokens]))


def results(workload: Workload, task: str, process: Executor) -> Results:
    """Measure a task on NumPy and on PEFT."""
    measured = measure(task, workload, (NUMPY, PEFT), rounds=ROUNDS, process=process)
    return {(one.library, one.name): one for one in measured}


def met(goal: Goal, found: Results, case: str) -> bool:
    """Print the line of a goal; return whether it is met."""
    one, other = found[goal.one], found[goal.other]
    ratio = beyond_results(one) / beyond_results(other) if goal.of_memory else one.over(other)[1]
    sides = " ÷ ".join(" ".join(side) for side in (goal.one, goal.other))
    what = f"{'peak of ' if goal.of_memory else ''}{goal.task}: {sides}"
    return held(what, ratio, goal.bound, at_least=goal.at_least, case=case)


def held(what: str, ratio: float, bound: float, *, at_least: bool = False, case: str = "") -> bool:
    """Print a line; return whether the ratio is within the bound."""
    dated.note(what, value=ratio, goal=bound, at_least=at_least, case=case)
    limit = bound * (1 - MARGIN if at_least else 1 + MARGIN)
    good = ratio >= limit if at_least else ratio <= limit
    sign = "≥" if at_least else "≤"
    print(f"  {what:66} {sign} {bound:<5g} {ratio:7.2f}  {'ok' if good else 'MISSED'}")
    return good


def beyond_results(measured: Measured) -> int:
    """Return the peak of a float32 step or merge beyond its inputs and results."""
    workload = measured.workload
    layer = workload.out * workload.inner
    sizes = workload.out + workload.inner
    step = (workload.tokens + workload.rank) * sizes + workload.out
    return (measured.peak_bytes or 0) - 4 * (layer if measured.task == "merge" else step)


def memory_of_a_step(process: Executor) -> bool:
    """Check that an exact step takes two arrays of tokens, z and dz."""
    workload = SQUARE(tokens=2048)
    print(f"{workload}: arrays of tokens beyond inputs and results", flush=True)
    found = measure("step", workload, (NUMPY,), rounds=1, process=process)
    (exact,) = (one for one in found if one.name == EXACT)
    return held(
        "peak of step: numpy exact, in arrays",
        beyond_results(exact) / (4 * 2048 * 4096),
        2.0,
        case=str(workload),
    )


def low_precision(process: Executor) -> bool:
    """Check the time of a step on a bfloat16 weight beside float32, and its memory."""
    workloads = SQUARE(tokens=512), SQUARE(tokens=512, dtype="bfloat16")
    print(f"{workloads[1]} ÷ float32, and 1 token in MiB", flush=True)
    present = [one for workload in workloads for one in contestants("step", workload, [NUMPY])]
    exact = [one for one in present if one.name == EXACT]
    wide, narrow = time_all(exact, ROUNDS, lambda: None)
    ratio = quartiles([a / b for a, b in zip(narrow, wide, strict=True)])[1]
    good = held("step: numpy exact ÷ float32", ratio, 1.3, case=str(workloads[1]))
    names = [(NUMPY, EXACT)]
    (peak,) = process.submit(peaks, "step", SQUARE(tokens=1, dtype="bfloat16"), names).result()
    case = str(SQUARE(tokens=1, dtype="bfloat16"))
    return held("peak of step, MiB", (peak or 0) / MIB, 32, case=case) and good


def main() -> int:
    """Print goal, measured ratio and verdict, by workload."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    path = parser.parse_args().json
    print("BLAS kernels:", *(f"{name} {kind}" for name, kind in blas_kernels().items()))
    good = small_layer.check()
    dated.write(path)
    with fresh_process() as process:
        for workload, goals in GOALS.items():
            print(f"{workload}: goal, measured; the margin is {MARGIN:.0%}", flush=True)
            tasks = {goal.task for goal in goals}
            found = {task: results(workload, task, process) for task in sorted(tasks)}
            good &= sum(met(goal, found[goal.task], str(workload)) for goal in goals) == len(
                goals
            )  # print each
            dated.write(path)
        good &= memory_of_a_step(process)
        good &= low_precision(process)
        dated.write(path)
    good &= quantised_step.show(np, "float32", quantised_step.ROUNDS, None)
    dated.write(path)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
