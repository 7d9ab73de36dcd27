"""Hold the ratios of one run to the project's goals: `python benchmarks/check.py`.

On a machine at rest. Ends with status 1 where a ratio misses its goal by more than `MARGIN`.
"""

from __future__ import annotations

import sys
from concurrent.futures import Executor
from typing import NamedTuple

from doraxp.cli._bench import memory
from doraxp.cli._bench.cases import Case
from doraxp.cli._bench.measure import Measured, measure

MARGIN, ROUNDS = 0.15, 7
NUMPY, PEFT = "numpy", "PEFT"
Results = dict[tuple[str, str], Measured]


class Goal(NamedTuple):
    """A ratio, one contestant's ÷ another's, and its bound."""

    task: str
    one: tuple[str, str]
    other: tuple[str, str]
    bound: float
    at_least: bool = False
    of_memory: bool = False


STEPS = {64: 4.0, 512: 1.9, 2048: 1.9}
ACCELERATED = {64: 0.60, 512: 0.85, 2048: 0.75}
GOALS = {
    Case(4096, 4096, 512, 16): [
        Goal("forward", (NUMPY, "norm computed"), (NUMPY, "bare product"), 1.08),
        Goal("forward", (NUMPY, "norm reused"), (NUMPY, "bare product"), 1.04),
        Goal("step", (NUMPY, "exact"), (NUMPY, "bare products"), 1.10),
        Goal("step", (NUMPY, "exact"), (NUMPY, "detached"), 1.05),
    ],
    Case(4096, 4096, 1, 16): [
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
    goals = GOALS.setdefault(Case(4096, 4096, tokens, 16), [])
    goals.append(Goal("step", (PEFT, "DoRA"), (NUMPY, "exact"), bound, True))
    accelerated = (PEFT, "DoRA, accelerated, exact")
    goals.append(Goal("step", accelerated, (PEFT, "DoRA"), ACCELERATED[tokens]))


def results(case: Case, task: str, child: Executor) -> Results:
    """Measure a task."""
    measured = measure(task, case, (NUMPY, PEFT), rounds=ROUNDS, child=child)
    return {(one.library, one.name): one for one in measured}


def met(goal: Goal, found: Results) -> bool:
    """Print a goal's line; return whether it is met."""
    one, other = found[goal.one], found[goal.other]
    if goal.of_memory:
        ratio = (one.peak_bytes or 0) / (other.peak_bytes or 1)
    else:
        _, ratio, _ = one.over(other)
    limit = goal.bound * (1 - MARGIN if goal.at_least else 1 + MARGIN)
    good = ratio >= limit if goal.at_least else ratio <= limit
    sides = " ÷ ".join(" ".join(side) for side in (goal.one, goal.other))
    what = f"{'peak of ' if goal.of_memory else ''}{goal.task}: {sides}"
    sign = "≥" if goal.at_least else "≤"
    print(f"  {what:66} {sign} {goal.bound:<5g} {ratio:7.2f}  {'ok' if good else 'MISSED'}")
    return good


def main() -> int:
    """Print goal, measured ratio and verdict, by case."""
    good = True
    with memory.child() as child:
        for case, goals in GOALS.items():
            print(f"{case}: goal, measured; a margin of {MARGIN:.0%} is given", flush=True)
            tasks = {goal.task for goal in goals}
            found = {task: results(case, task, child) for task in sorted(tasks)}
            good &= sum(met(goal, found[goal.task]) for goal in goals) == len(goals)  # print each
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
