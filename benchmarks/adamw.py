"""A step of AdamW on the adapters of eight layers, beside the same step of torch.optim.AdamW.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/adamw.py

Each adapter has rank 16, on a float32 weight of 4096×4096. The steps take turns in one process, on
one thread, and a ratio is taken in each round; the table has the medians. Memory is the most that
was in use at once during a step, without the arrays that the step is given: of NumPy's by
tracemalloc, of PyTorch's by its profiler. The exit status is 1 if the step with `donate` misses a
goal: 1.2 times the time of PyTorch's, or 1 MiB.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

import doraxp
from doraxp import Adapter

OUT, IN, RANK, LAYERS = 4096, 4096, 16, 8
ROUNDS, MIB = 21, 2**20
RATIO, MEMORY = 1.2, 1.0
THEIRS, GOAL = "torch.optim.AdamW", "adamw_step, donate"

Call: TypeAlias = Callable[[], object]


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    calls = {THEIRS: of_torch(), GOAL: Step(donate=True), "adamw_step": Step(donate=False)}
    seconds = measured(calls, rounds)
    memory = {name: (peak_of_torch if name == THEIRS else peak)(calls[name]) for name in calls}
    print(
        f"{LAYERS} adapters of rank {RANK} on {OUT}×{IN}, float32, numpy {np.__version__}, ", end=""
    )
    print(f"torch {torch.__version__}")
    print(f"  {'':20} {'ms':>6} {'ratio':>6} {'MiB':>6} {'ratio':>6}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[THEIRS], strict=True))
        line = f"  {name:20} {1e3 * statistics.median(times):6.2f} {ratio:6.2f}"
        print(f"{line} {memory[name] / MIB:6.2f} {memory[name] / memory[THEIRS]:6.2f}")
        if name == GOAL:
            met = ratio <= RATIO and memory[name] <= MEMORY * MIB
    print(f"{GOAL}: ratio ≤ {RATIO}, MiB ≤ {MEMORY:g}  {'ok' if met else 'MISSED'}")
    return 0 if met else 1


def drawn() -> dict[str, Adapter]:
    """Return eight adapters, or their gradients."""
    rng = np.random.default_rng(0)
    shapes = (RANK, IN), (OUT, RANK), (OUT,)
    return {
        f"layer.{number}": Adapter(*(rng.standard_normal(shape, "float32") for shape in shapes))
        for number in range(LAYERS)
    }


class Step:
    """A step of `doraxp.adamw_step`, on the parameters and the state of the one before."""

    def __init__(self, *, donate: bool) -> None:
        self.params, self.grads, self.donate = drawn(), drawn(), donate
        self.state = doraxp.adamw_init(self.params)

    def __call__(self) -> None:
        """Take a step."""
        self.params, self.state = doraxp.adamw_step(
            self.params, self.grads, self.state, learning_rate=1e-4, donate=self.donate
        )


def of_torch() -> Call:
    """Return the step of torch.optim.AdamW; one number decays all of its leaves."""
    leaves = [torch.nn.Parameter(torch.tensor(leaf)) for each in drawn().values() for leaf in each]
    for leaf in leaves:
        leaf.grad = leaf.detach().clone()
    return torch.optim.AdamW(leaves, lr=1e-4).step


def measured(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of calls that take turns, without those of the first one."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        for _ in range(rounds + 1):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return {name: times[1:] for name, times in seconds.items()}


def peak(call: Call) -> int:
    """Return the most bytes that were in use at once during a call, beyond those before it."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak_of_torch(call: Call) -> int:
    """Return the same for PyTorch's allocator, of which tracemalloc does not know."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events: Any = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


if __name__ == "__main__":
    sys.exit(main())
