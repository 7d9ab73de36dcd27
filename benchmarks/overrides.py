"""What each NumPy override saves: generic time ÷ override time, medians, interleaved.

`python benchmarks/overrides.py`, on the weight and tokens below. An override below 1.2 goes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import array_api_compat.numpy
import numpy as np

from doraxp.backends import Factors, Operations
from doraxp.backends._numpy import NumpyOperations

OUT, IN, RANK, TOKENS, ROUNDS = 2048, 4096, 16, 512, 9


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
    tasks = {
        "row_squares": ("row_squares", (weight, np.float32)),
        "row_squares, float16": ("row_squares", (half, np.float32)),
        "token_dot": ("token_dot", (d, 2 * d)),
        "merge": ("merge", (factors, draw(OUT), np.float32)),
        "guard, one row": ("guard", (one, draw(OUT), factors, np.float32)),
        "times_transposed, float16, 8 tokens": ("times_transposed", (x[:8], half, np.float32)),
        "times, float16, 8 tokens": ("times", (d[:8], half, np.float32)),
    }
    generic, numpy = (kind(array_api_compat.numpy) for kind in (Operations, NumpyOperations))
    print(f"weight {OUT}×{IN} float32, rank {RANK}, {TOKENS} tokens: generic ÷ override")
    for label, (name, arguments) in tasks.items():
        times: dict[Operations, list[float]] = {generic: [], numpy: []}
        for _ in range(ROUNDS):
            for ops in times:
                times[ops].append(seconds(getattr(ops, name), arguments))
        slow, fast = (statistics.median(times[ops]) for ops in (generic, numpy))
        print(f"{label:36} {slow / fast:6.2f}    {slow * 1e3:8.2f} ms ÷ {fast * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
