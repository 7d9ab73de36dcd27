"""Time each override of NumPy and PyTorch beside the generic operation that it replaces.

    python benchmarks/overrides.py

It needs ml_dtypes, and measures PyTorch only if that is installed. It prints generic time ÷
override time. The two take turns, and each time is a median. An override that is below 1.2 on
every shape must be removed. On a machine that is not idle, set OPENBLAS_NUM_THREADS=1: threads of
BLAS that wait for a core make the ratios meaningless.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np

from doraxp import Adapter
from doraxp.backends import Factored, Factors, Operations, operations

OUT, IN, RANK, TOKENS, ROUNDS = 4096, 4096, 16, 2048, 7
SMALL, SMALL_RANK, CALLS, SMALL_ROUNDS = 64, 4, 200, 51
"""The layer that shows the fixed cost of a call, and the number of calls in a round."""

Call = Callable[[Operations], object]
"""Runs one operation of the backend that it is given."""
Both = tuple[Operations, Operations]
"""The generic operations, and those of a backend."""


class Layer(NamedTuple):
    """The arguments of the operations on one layer, in float32."""

    factors: Factors
    """W, A and s B; ρ is None."""
    gain: Any
    norm: Any
    x: Any
    d: Any
    low: Any
    """(tokens, rank)."""


def main() -> None:
    """Print a line for each override and shape."""
    rng = np.random.default_rng(0)
    layer, small = draw(rng, OUT, IN, RANK, TOKENS), draw(rng, SMALL, SMALL, SMALL_RANK, 1)
    both = generic_and_own(layer.x)
    shape = f"{OUT}×{IN} float32, rank {RANK}, {TOKENS} tokens"
    print(f"NumPy, {shape}: generic ÷ override")
    for tasks in (products(layer), tokenwise(layer), rowwise(layer), one_suspect_row(layer, both)):
        compare(tasks, both)
    print(f"NumPy, {SMALL}×{SMALL} float32, rank {SMALL_RANK}: times of {CALLS} calls")
    compare(fixed_costs(small), both, calls=CALLS, rounds=SMALL_ROUNDS)
    if importlib.util.find_spec("torch"):
        torch = importlib.import_module("torch")
        factors = Factors(*map(torch.asarray, layer.factors[:3]), None)
        on_torch = Layer(factors, *map(torch.asarray, layer[1:]))
        tasks = tokenwise(on_torch)
        names = "accumulate", "output_gradients, exact", "output_gradients, detached"
        print(f"PyTorch, {shape}: generic ÷ override")
        compare({name: tasks[name] for name in names}, generic_and_own(on_torch.x))


def generic_and_own(array: Any) -> Both:
    """Return the generic operations on the library of `array`, and the library's own."""
    own = operations(x=array)
    return Operations(own.xp), own


def draw(rng: np.random.Generator, out: int, inner: int, rank: int, tokens: int) -> Layer:
    """Return a layer of random numbers. B is so small that no row of V cancels."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    scaled_b = np.float32(0.1) * normal(out, rank)
    factors = Factors(normal(out, inner), normal(rank, inner), scaled_b, None)
    gain, norm = (np.abs(normal(out)) + np.float32(0.5) for _ in range(2))
    return Layer(
        factors, gain, norm, normal(tokens, inner), normal(tokens, out), normal(tokens, rank)
    )


def products(layer: Layer) -> dict[str, Call]:
    """Return products with a weight in 16 bits: W Aᵀ, and x Wᵀ and d W for several tokens."""

    def multiply(left: Any, right: Any) -> Call:
        return lambda ops: ops.product(left, right)

    tasks = {}
    for dtype in "float16", "bfloat16":
        half = layer.factors.weight.astype(dtype)
        tasks[f"product, W Aᵀ, {dtype}"] = multiply(half, layer.factors.lora_a.T)
        for tokens in (1, 8, 512):
            x, d, size = layer.x[:tokens], layer.d[:tokens], f"{dtype}, tokens: {tokens}"
            tasks[f"product, x Wᵀ, {size}"] = multiply(x, half.T)
            tasks[f"product, d W, {size}"] = multiply(d, half)
    return tasks


def tokenwise(layer: Layer) -> dict[str, Call]:
    """Return the operations before and after the products with V.

    Some write to z or to `total`, which the next round takes as they are then: the time does not
    depend on the numbers.
    """
    factors, gain, norm, x, d, low = layer
    a, b, z, total = factors.lora_a, factors.scaled_b, 1 * d, 1 * x
    given = d, z, gain, norm, b
    return {
        "accumulate": lambda ops: ops.accumulate(total, low, a),
        "forward_epilogue": lambda ops: ops.forward_epilogue(z, None, (low, b), gain, gain),
        "output_gradients, exact": lambda ops: ops.output_gradients(
            *given, exact=True, with_bias=True
        ),
        "output_gradients, detached": lambda ops: ops.output_gradients(
            *given, exact=False, with_bias=False
        ),
    }


def rowwise(layer: Layer) -> dict[str, Call]:
    """Return the operations on rows of the weight."""
    factors, gain, norm, *_ = layer
    half, direction = factors.weight.astype(np.float16), Factored(factors)
    return {
        "row_squares": lambda ops: ops.row_squares(factors.weight, np.float32),
        "row_squares, float16": lambda ops: ops.row_squares(half, np.float32),
        "over_norm, (out, rank)": lambda ops: ops.over_norm(factors.scaled_b, norm),
        "merge": lambda ops: ops.merge(direction, gain),
        "merge_and_measure": lambda ops: ops.merge_and_measure(factors, gain),
    }


def one_suspect_row(layer: Layer, both: Both) -> dict[str, Call]:
    """Return the norm and the products with V, where one row of V cancels.

    The generic guard stores V, NumPy's stores the row.
    """
    factors, gain, _, x, d, low = layer
    _, a, b, _ = factors
    weight, d, dlow = 1 * factors.weight, 1 * d, d @ b
    weight[7] = -0.99 * (b[7] @ a)
    given = norm_arguments(factors._replace(weight=weight), gain)
    directions = {ops: ops.norm_and_direction(*given).direction for ops in both}
    return {
        "norm_and_direction, suspect row": lambda ops: ops.norm_and_direction(*given),
        "direction.transposed_product": lambda ops: directions[ops].transposed_product(
            x, low, ops=ops
        ),
        "direction.product": lambda ops: directions[ops].product(
            d, dlow, TOKENS, np.float32, ops=ops
        ),
    }


def norm_arguments(factors: Factors, magnitude: Any) -> tuple[Any, ...]:
    """Return the arguments of `norm_and_direction`: W Aᵀ, A Aᵀ, ‖w‖², the factors and m."""
    weight, a, *_ = factors
    return weight @ a.T, a @ a.T, np.vecdot(weight, weight), factors, magnitude


def fixed_costs(small: Layer) -> dict[str, Call]:
    """Return the operations whose overrides save a part of the fixed cost of a call."""
    factors, gain, norm, *_ = small
    adapter = Adapter(factors.lora_a, factors.scaled_b, gain)
    given, snapshots = norm_arguments(factors, gain), {}

    def unchanged(ops: Operations) -> bool:
        if ops not in snapshots:
            snapshots[ops] = ops.snapshot(adapter)
        return ops.unchanged(snapshots[ops], adapter, adapter)

    return {
        "can_read_values": lambda ops: ops.can_read_values(gain),
        "snapshot": lambda ops: ops.snapshot(adapter),
        "unchanged": unchanged,
        "norm_and_direction": lambda ops: ops.norm_and_direction(*given),
        "over_norm, (out,)": lambda ops: ops.over_norm(gain, norm),
    }


def compare(tasks: dict[str, Call], both: Both, *, calls: int = 1, rounds: int = ROUNDS) -> None:
    """Time each operation both ways, and print its line."""
    for name, call in tasks.items():
        times: dict[Operations, list[float]] = {ops: [] for ops in both}
        for _ in range(rounds):
            for ops in both:
                times[ops].append(seconds(call, ops, calls))
        slow, fast = (statistics.median(times[ops]) for ops in both)
        print(
            f"  {name:38} {slow / fast:6.2f}    {slow * 1e3:8.2f} ms ÷ {fast * 1e3:.2f} ms",
            flush=True,
        )


def seconds(call: Call, ops: Operations, calls: int) -> float:
    """Return the time that some calls take."""
    start = time.perf_counter()
    for _ in range(calls):
        call(ops)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
