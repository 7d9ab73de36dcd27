"""Hold the ratios of one run to the project's goals: `python benchmarks/check.py`.

On a machine at rest. Ends with status 1 where a ratio misses its goal by more than `MARGIN`.
Ratios to NumPy's products depend on the kernels that its BLAS runs, which the first line names.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple

import numpy as np

import doraxp
from doraxp import Adapter, Cache, Gradients
from doraxp._base.types import Array
from doraxp.cli._bench import memory
from doraxp.cli._bench.cases import Case, draw
from doraxp.cli._bench.contestants import contestants
from doraxp.cli._bench.measure import Measured, measure, quartiles, time_all
from doraxp.cli.bench import kernels

MARGIN, ROUNDS = 0.15, 7
NUMPY, PEFT, EXACT = "numpy", "PEFT", "exact"
MIB = 1 << 20
Results = dict[tuple[str, str], Measured]


class Goal(NamedTuple):
    """A ratio, one contestant's ÷ another's, and its bound."""

    task: str
    one: tuple[str, str]
    other: tuple[str, str]
    bound: float
    at_least: bool = False
    of_memory: bool = False
    """Of the peaks beyond inputs and results, and not of the times."""


SQUARE = partial(Case, 4096, 4096, rank=16)
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
    Case(4096, 11008, 1, 16): [
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


def results(case: Case, task: str, child: Executor) -> Results:
    """Measure a task."""
    measured = measure(task, case, (NUMPY, PEFT), rounds=ROUNDS, child=child)
    return {(one.library, one.name): one for one in measured}


def met(goal: Goal, found: Results) -> bool:
    """Print a goal's line; return whether it is met."""
    one, other = found[goal.one], found[goal.other]
    ratio = beyond_results(one) / beyond_results(other) if goal.of_memory else one.over(other)[1]
    sides = " ÷ ".join(" ".join(side) for side in (goal.one, goal.other))
    what = f"{'peak of ' if goal.of_memory else ''}{goal.task}: {sides}"
    return held(what, ratio, goal.bound, at_least=goal.at_least)


def held(what: str, ratio: float, bound: float, *, at_least: bool = False) -> bool:
    """Print a line; return whether the bound is kept."""
    limit = bound * (1 - MARGIN if at_least else 1 + MARGIN)
    good = ratio >= limit if at_least else ratio <= limit
    sign = "≥" if at_least else "≤"
    print(f"  {what:66} {sign} {bound:<5g} {ratio:7.2f}  {'ok' if good else 'MISSED'}")
    return good


def beyond_results(measured: Measured) -> int:
    """Return the peak of a float32 step or merge beyond its inputs and what it returns."""
    case = measured.case
    layer = case.out * case.inner
    step = (case.tokens + case.rank) * (case.out + case.inner) + case.out
    return (measured.peak_bytes or 0) - 4 * (layer if measured.task == "merge" else step)


def memory_of_a_step(child: Executor) -> bool:
    """Hold what an exact step takes to two arrays of tokens, z and dz."""
    case = SQUARE(tokens=2048)
    print(f"{case}: arrays of tokens beyond inputs and results", flush=True)
    found = measure("step", case, (NUMPY,), rounds=1, child=child)
    (exact,) = (one for one in found if one.name == EXACT)
    return held("peak of step: numpy exact", beyond_results(exact) / (4 * 2048 * 4096), 2.0)


def low_precision(child: Executor) -> bool:
    """Hold a step on a bfloat16 weight to that on a float32 one, and to no copy of the weight."""
    cases = SQUARE(tokens=512), SQUARE(tokens=512, dtype="bfloat16")
    print(f"{cases[1]} ÷ float32, and 1 token in MiB", flush=True)
    exact = [one for case in cases for one in contestants("step", case, NUMPY) if one.name == EXACT]
    wide, narrow = time_all(exact, ROUNDS, lambda: None)
    ratio = quartiles([a / b for a, b in zip(narrow, wide, strict=True)])[1]
    good = held("step: numpy exact", ratio, 1.3)
    names = [(NUMPY, EXACT)]
    (peak,) = child.submit(memory.peaks, "step", SQUARE(tokens=1, dtype="bfloat16"), names).result()
    return held("peak of step: 16 MiB, and the row blocks' 16", (peak or 0) / MIB, 32) and good


def overhead() -> bool:
    """Hold calls on a small layer to the same formulas and the same guard in plain NumPy."""
    case = Case(64, 64, 1, 4)
    print(f"{case}: microseconds over the formulas in plain NumPy", flush=True)
    weight, adapter, x, dy = draw(case)
    prepared = doraxp.prepare(weight, adapter, case.config)
    _, cache = doraxp.forward(x, weight, adapter, case.config, prepared=prepared)
    pairs = {
        "forward, norm reused": (
            lambda: doraxp.forward(x, weight, adapter, case.config, prepared=prepared),
            lambda: plain_forward(x, weight, adapter, prepared.gain),
        ),
        "forward, norm computed": (
            lambda: doraxp.forward(x, weight, adapter, case.config, previous=prepared),
            lambda: plain_forward(
                x, weight, adapter, plain_gain(weight, adapter, prepared.weight_squares)
            ),
        ),
        "backward, exact": (
            lambda: doraxp.backward(dy, cache),
            lambda: plain_backward(dy, x, weight, adapter, cache),
        ),
    }
    good = True
    for name, calls in pairs.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(3000):
            for call, seconds in zip(calls, times, strict=True):
                began = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - began)
        ours, plain = (quartiles(seconds)[1] for seconds in times)
        good &= held(name, 1e6 * (ours - plain), 30)
    return good


def plain_forward(x: Array, weight: Array, adapter: Adapter, gain: Array) -> Array:
    """Return y."""
    return gain * (x @ weight.T + (x @ adapter.lora_a.T) @ adapter.lora_b.T)


def plain_gain(weight: Array, adapter: Adapter, squares: Array) -> Array:
    """Return g by the expanded norm, where no row cancels."""
    a, b, m = adapter
    u, gram = weight @ a.T, a @ a.T
    bg, b_squares, mean_square = b @ gram, np.vecdot(b, b), np.sum(a * a) / len(a)
    update = np.vecdot(bg, b)
    n2 = squares + 2 * np.vecdot(b, u) + update
    floor = weight.shape[1] * np.finfo(n2.dtype).smallest_normal / np.finfo(n2.dtype).eps
    safe = (n2 > 0.5 * (squares + np.maximum(update, b_squares * mean_square))) & (n2 > floor)
    assert np.all(safe & (n2 < np.inf) & (floor < mean_square < np.inf))
    return m / np.sqrt(n2)


def plain_backward(dy: Array, x: Array, weight: Array, adapter: Adapter, cache: Cache) -> Gradients:
    """Return the exact gradients."""
    a, b, _ = adapter
    prepared = cache.prepared
    dz = prepared.gain * dy
    dm = np.sum(dy * cache.z, axis=0) / prepared.norm
    p = (prepared.gain * dm)[:, None]
    pull = p / prepared.norm[:, None] * b
    low = dz @ b
    da = low.T @ x - pull.T @ weight - (pull.T @ b) @ a
    db = dz.T @ cache.low_rank - p * prepared.unit_projection
    return Gradients(dz @ weight + low @ a, Adapter(da, db, dm), None, None)


def main() -> int:
    """Print goal, measured ratio and verdict, by case."""
    print("BLAS kernels:", *(f"{name} {kind}" for name, kind in kernels().items()))
    good = overhead()
    with memory.child() as child:
        for case, goals in GOALS.items():
            print(f"{case}: goal, measured; a margin of {MARGIN:.0%} is given", flush=True)
            tasks = {goal.task for goal in goals}
            found = {task: results(case, task, child) for task in sorted(tasks)}
            good &= sum(met(goal, found[goal.task]) for goal in goals) == len(goals)  # print each
        good &= memory_of_a_step(child)
        good &= low_precision(child)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
