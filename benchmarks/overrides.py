"""The time that each override saves: generic time ÷ override time, medians, interleaved.

`python benchmarks/overrides.py`, on the weight and tokens below; PyTorch's too where it is
installed. An override below 1.2 goes.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np

from doraxp.backends import Factors, Operations, operations

OUT, IN, RANK, TOKENS, ROUNDS = 4096, 4096, 16, 2048, 7


def seconds(call: Callable[..., object], arguments: tuple[object, ...]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each override."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    weight, x, d = draw(OUT, IN), draw(TOKENS, IN), draw(TOKENS, OUT)
    half = weight.astype(np.float16)
    factors = Factors(weight, draw(RANK, IN), draw(OUT, RANK), None)
    one = np.arange(OUT) == 7
    low_rank, scaled_b, gain = draw(TOKENS, RANK), factors.scaled_b, draw(OUT)
    tasks = {
        "row_squares": ("row_squares", (weight, np.float32)),
        "row_squares, float16": ("row_squares", (half, np.float32)),
        "project, float16": ("project", (half, factors.lora_a, np.float32)),
        "scale_and_sum": ("scale_and_sum", (d, 2 * d, gain, RANK)),
        "scale_and_shift": ("scale_and_shift", (d, None, (low_rank, scaled_b), gain, gain)),
        "accumulate": ("accumulate", (x, low_rank, factors.lora_a)),
        "over_norm": ("over_norm", (scaled_b, gain)),
        "merge": ("merge", (factors, gain, np.float32)),
        "guard, one row": ("guard", (one, gain, factors, np.float32)),
    }
    for tokens in (1, 8, 512):
        for name, left in (("times_transposed", x), ("times", d)):
            label = f"{name}, float16, tokens: {tokens}"
            tasks[label] = (name, (left[:tokens], half, np.float32))
    numpy = operations(weight=weight)
    generic = Operations(numpy.xp)
    print(f"weight {OUT}×{IN} float32, rank {RANK}, {TOKENS} tokens: generic ÷ override")
    for label, (name, arguments) in tasks.items():
        compare(label, name, arguments, generic, numpy)
    if importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        tensors = {
            "accumulate": (*map(torch.asarray, (x, low_rank, factors.lora_a)),),
            "scale_and_sum": (*map(torch.asarray, (d, 2 * d, gain)), RANK),
        }
        ours = operations(x=tensors["accumulate"][0])
        for name, arguments in tensors.items():
            compare(f"{name}, PyTorch", name, arguments, Operations(ours.xp), ours)


def compare(
    label: str, name: str, arguments: tuple[object, ...], generic: Operations, override: Operations
) -> None:
    """Time one operation both ways, and print its line."""
    times: dict[Operations, list[float]] = {generic: [], override: []}
    for _ in range(ROUNDS):
        for ops in times:
            times[ops].append(seconds(getattr(ops, name), arguments))
    slow, fast = (statistics.median(times[ops]) for ops in (generic, override))
    print(f"{label:38} {slow / fast:6.2f}    {slow * 1e3:8.2f} ms ÷ {fast * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
