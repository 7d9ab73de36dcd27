"""What bounds the CuPy backend on an H100: bytes, operations and launches. Nothing is measured.

    python benchmarks/gpu_model.py

Prints the least that the benchmark of a device can show, beside the goals. A pass takes as long as
the slowest of its memory, its caches and its tensor cores, and passes come one after the other.
"""

from __future__ import annotations

from doraxp.cli._bench.cases import Case

MEMORY = 3.0e12
"""Bytes per second, read and written. A copy between two arrays of the device, as has been seen."""
CACHE = 2 * MEMORY
"""Bytes per second from L2, supposed."""
PRODUCTS = {"bfloat16": 798e12, "float32": 55e12}
"""Operations per second of cuBLAS: bfloat16 as has been seen, float32 supposed."""
OWN = 0.6 * 989e12
"""Operations per second of `mma.sync`, supposed: the rest of the datasheet's rate takes `wgmma`."""
LAUNCH = 2e-6
"""Seconds of a launch that has next to nothing to do, supposed."""
LAUNCHES = {"bfloat16": 22, "float32": 15}
"""Of a step, beside those that are counted by their bytes. See `test_a_step_takes_few_launches`."""
GOALS = {  # of an exact step of 4096 tokens
    Case(4096, 4096, 4096, 16, "bfloat16"): 1.60,
    Case(4096, 11008, 4096, 16, "bfloat16"): 1.40,
    Case(8192, 28672, 4096, 64, "bfloat16"): 1.22,
    Case(8192, 28672, 4096, 256, "bfloat16"): None,
    Case(4096, 4096, 4096, 16, "float32"): 1.10,
    Case(8192, 28672, 4096, 256, "float32"): None,
}


def width(case: Case) -> int:
    """Return the bytes of a number of the weight."""
    return 2 if case.dtype == "bfloat16" else 4


def moved(*numbers: float) -> float:
    """Return the seconds that so many bytes take."""
    return sum(numbers) / MEMORY


def product(case: Case) -> float:
    """Return the seconds of a product of the tokens with W."""
    return 2 * case.tokens * case.out * case.inner / PRODUCTS[case.dtype]


def patches(rows: int, columns: int, rank: int, parts: int, memory: float) -> float:
    """Return the seconds of a pass with a product of this rank in it, of `memory` seconds."""
    factors = {1: 1, 2: 3, 3: 6}[parts]  # products of parts
    tensor = factors * 2 * rows * columns * rank / OWN
    blocks = (rows / 64) * (columns / 128)
    cached = blocks * (64 + 128) * rank * 2 * parts / CACHE
    tiles = moved((4 + 2 * parts) * rank * (rows + columns))
    return max(memory, tensor, cached) + tiles


def step(case: Case, *, reduced: bool) -> float:
    """Return the seconds of an exact step: norm, forward and backward."""
    s = width(case)
    z = s if reduced else 4  # bytes of z, dz and dx
    x, y = case.tokens * case.inner, case.tokens * case.out
    half = case.dtype == "bfloat16"
    parts = 1 if half and reduced else 3
    passes = [
        moved(s * case.out * case.inner),  # W Aᵀ
        moved(s * x),  # L
        product(case),  # x Wᵀ
        patches(case.tokens, case.out, case.rank, parts, moved((2 * z + s) * y)),  # z and y
        moved((s + 2 * z) * y),  # dz and its sums
        2 * moved(z * y),  # dz B and dB
        moved(s * x),  # dA
        moved(z * x),  # (dz B) A
    ]
    if half and not reduced:
        passes += [moved((4 + 6) * y), 3 * product(case), 5 * moved(z * x), moved((4 + 2) * x)]
    else:
        passes += [product(case), moved(z * x)]  # which adds to what it reads
    return sum(passes) + LAUNCHES[case.dtype] * LAUNCH


def merge(case: Case, parts: int) -> float:
    """Return the seconds of W', n known."""
    s = width(case)
    memory = moved(2 * s * case.out * case.inner)
    return patches(case.out, case.inner, case.rank, parts, memory) + LAUNCH


def merge_from_nothing(case: Case) -> float:
    """Return the seconds of n and W'; n is measured on V for ranks up to 64, else expanded."""
    memory = moved(width(case) * case.out * case.inner)
    if case.rank <= 64:
        norm = patches(case.out, case.inner, case.rank, 3, memory) + 5 * LAUNCH
    else:  # W Aᵀ, A in three parts where W is of bfloat16, and ‖w‖²
        parts = 3 if case.dtype == "bfloat16" else 1
        operations = 2 * case.out * case.inner * case.rank * parts
        norm = max(memory, operations / PRODUCTS[case.dtype]) + memory + 10 * LAUNCH
    return norm + merge(case, 3)


def token(case: Case) -> tuple[float, float]:
    """Return the seconds of one token, and of its bare product."""
    bare = moved(width(case) * case.out * case.inner)
    return bare + moved(4 * case.rank * (case.out + case.inner)) + LAUNCH, bare


def main() -> None:
    """Print the tables."""
    heading("Exact step ÷ bare products, 4096 tokens", "goal", "reduced", "default")
    for case, goal in GOALS.items():
        bare = 2 * product(case)
        ways = [step(case, reduced=reduced) / bare for reduced in (True, False)]
        line(case, "–" if goal is None else f"{goal:.2f}", *map("{:.2f}".format, ways))
    heading("W' ÷ copy of W (goals 1.4, 1.9)", "n known", "reduced", "from nothing")
    for case in GOALS:
        copy = moved(2 * width(case) * case.out * case.inner)
        rounded = 1 if case.dtype == "bfloat16" else 2
        times = merge(case, 3), merge(case, rounded), merge_from_nothing(case)
        line(case, *(f"{time / copy:.2f}" for time in times))
    heading("One token ÷ bare product (goal 1.3)", "ratio", "", "bare, µs")
    for case in GOALS:
        adapted, bare = token(case)
        line(case, f"{adapted / bare:.2f}", "", f"{1e6 * bare:.0f}")


def heading(title: str, *columns: str) -> None:
    """Print the head of a table."""
    print(f"\n{title:44}" + "".join(f"{column:>14}" for column in columns))


def line(case: Case, *cells: str) -> None:
    """Print a line of it."""
    label = f"  {case.out}×{case.inner} {case.dtype}, rank {case.rank}"
    print(f"{label:44}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
