"""A step on a 4-bit weight beside the same step on the float32 array of its rows.

    OMP_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2 python benchmarks/quantised_step.py
    python benchmarks/quantised_step.py --library cupy --folder FOLDER

A step is a forward with an earlier norm, as the adapter changes in each step, and a backward. Both
weights take turns in one process, and a ratio is taken in each round; the table has the medians.
Memory is the most that was in use at once during a step, without the weight. On CuPy the step is
also measured in bfloat16, and times are those of the device. The exit status is 1 if the ratio on
NumPy is above its goal.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dated
import numpy as np
from device_figures import append

import doraxp
from doraxp import Adapter, Config, QuantisedWeight

OUT, IN, RANK, GROUP = 4096, 4096, 16, 64
TOKENS = (1, 64, 512, 2048)
GOAL_TOKENS, GOAL = 512, 1.3
ROUNDS, MIB = 11, 2**20


class Times(NamedTuple):
    """Median seconds of a step on each weight, and the median of the ratios of the rounds."""

    dense: float
    packed: float
    ratio: float


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", choices=("numpy", "cupy"), default="numpy")
    parser.add_argument("--folder", type=Path, help="add the figures to FOLDER/figures.jsonl")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    arguments = parser.parse_args()
    xp, met = importlib.import_module(arguments.library), True
    for dtype in ("float32", "bfloat16") if arguments.library == "cupy" else ("float32",):
        met &= show(xp, dtype, arguments.rounds, arguments.folder)
    dated.write(arguments.json)
    return 0 if met or arguments.library == "cupy" else 1


def show(xp: Any, dtype: str, rounds: int, folder: Path | None) -> bool:
    """Print a line for each number of tokens; return whether the ratio is within its goal."""
    packed = made(xp, dtype)
    dense, met = packed.rows(slice(0, OUT)), True
    print(f"{OUT}×{IN} in 4 bits beside {dtype}, rank {RANK}, {xp.__name__}")
    print(f"packed {packed.nbytes / MIB:.1f} MiB, array {dense.nbytes / MIB:.0f} MiB")
    print(f"  {'tokens':>6} {'array ms':>9} {'packed ms':>10} {'ratio':>6}", end="")
    print("" if xp is not np else f" {'array MiB':>10} {'packed MiB':>11}")
    for tokens in TOKENS:
        steps = [step(xp, weight, dtype, tokens) for weight in (dense, packed)]
        times = measured(xp, steps, rounds)
        line = (
            f"  {tokens:6} {1e3 * times.dense:9.2f} {1e3 * times.packed:10.2f} {times.ratio:6.2f}"
        )
        peaks = [peak(each) / MIB for each in steps] if xp is np else []
        line += "".join(f" {one:{10 + place}.1f}" for place, one in enumerate(peaks))
        goal = GOAL if tokens == GOAL_TOKENS else None
        if goal is not None:
            met = times.ratio <= goal
            line += f"   ≤ {goal}  {'ok' if met else 'MISSED'}"
        print(line, flush=True)
        case = f"{dtype}, {tokens} token{'s' * (tokens > 1)}"
        dated.note(
            "step on 4 bits: time ÷ that on the array", value=times.ratio, goal=goal, case=case
        )
        for place, one in zip(("on the array", "on 4 bits"), peaks, strict=False):
            dated.note(f"most memory in use {place}, MiB", value=one, case=case)
        if folder is not None:
            case = {"out": OUT, "inner": IN, "rank": RANK, "dtype": dtype, "tokens": tokens}
            append(folder, "quantised", case=case, call="step", **times._asdict())
    return met


def made(xp: Any, dtype: str) -> QuantisedWeight:
    """Return a weight of 4-bit codes in groups of 64."""
    rng = np.random.default_rng(0)
    values = np.sort(rng.standard_normal(16)).astype("float32") / IN**0.5
    table = np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=1)
    codes = rng.integers(0, 256, (OUT, IN // 2), dtype=np.uint8)
    scale = rng.uniform(0.5, 2, OUT * IN // GROUP).astype("float32")
    arrays = map(xp.asarray, (codes, table, scale))
    return QuantisedWeight(*arrays, group=GROUP, dtype=kind_of(dtype))


def kind_of(dtype: str) -> Any:
    """Return a dtype of NumPy, which CuPy has too."""
    return getattr(importlib.import_module("ml_dtypes"), dtype) if dtype == "bfloat16" else dtype


def step(xp: Any, weight: Any, dtype: str, tokens: int) -> Callable[[], object]:
    """Return a function that makes a forward, with an earlier ‖w‖², and a backward."""
    rng, config = np.random.default_rng(1), Config(RANK)

    def draw(*shape: int, scale: float = 1.0, kind: str = dtype) -> Any:
        values = scale * rng.standard_normal(shape)
        return xp.asarray(values.astype(kind_of(kind)))

    adapter = doraxp.init(weight, config, seed=0)
    adapter = Adapter(adapter.lora_a, draw(OUT, RANK, scale=0.1, kind="float32"), adapter.magnitude)
    x, dy = draw(tokens, IN), draw(tokens, OUT)
    known = doraxp.prepare(weight, adapter, config)

    def call() -> object:
        _, cache = doraxp.forward(x, weight, adapter, config, previous=known)
        return doraxp.backward(dy, cache)

    return call


def measured(xp: Any, steps: list[Callable[[], object]], rounds: int) -> Times:
    """Return the median times of two steps that take turns."""
    for each in steps:
        each()
    gc.collect()
    gc.disable()
    try:
        seconds = [[timed(xp, each) for each in steps] for _ in range(rounds)]
    finally:
        gc.enable()
    dense, packed = (statistics.median(times) for times in zip(*seconds, strict=True))
    return Times(dense, packed, statistics.median(b / a for a, b in seconds))


def timed(xp: Any, call: Callable[[], object]) -> float:
    """Return the seconds of a call, up to the end of its work on a device."""
    if xp is np:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, stop = xp.cuda.Event(), xp.cuda.Event()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return 1e-3 * float(xp.cuda.get_elapsed_time(start, stop))


def peak(call: Callable[[], object]) -> int:
    """Return the most bytes that were in use at once during a call, beyond those before it."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    sys.exit(main())
