"""The goals of the project on an NVIDIA H200, and how to find a figure for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from device_figures import Figure, results

CUPY: Figure = {"autocast": False, "device": "cpu"}
"""Where PyTorch computes, in a case of CuPy's runs."""


class Goal(NamedTuple):
    """A figure that the project wants to reach."""

    name: str
    limit: float
    find: Callable[[list[Figure]], float | None]
    """Returns the measured figure, or None."""
    at_least: bool = False
    kernels: Callable[[list[Figure]], float | None] | None = None
    """Returns the same figure by the sums of the kernels alone, without the gaps between them."""

    def line(self, figures: list[Figure]) -> str:
        """Return a row of the table."""
        found = self.find(figures)
        sign = "≥" if self.at_least else "≤"
        if found is None:
            seen, verdict = "not measured", ""
        else:
            met = found >= self.limit if self.at_least else found <= self.limit
            seen, verdict = f"{found:.3g}", "met" if met else "missed"
        alone = self.kernels(figures) if self.kernels is not None else None
        beside = f"kernels alone {alone:.3g}" if alone is not None else ""
        return f"{self.name:52} {sign} {self.limit:<6g} {seen:>12}  {verdict:8}{beside}".rstrip()


def case(out: int, inner: int, rank: int, dtype: str, tokens: int | None = None) -> Figure:
    """Return the sizes that a figure must have; without `tokens` any number of them."""
    sizes = {"out": out, "inner": inner, "rank": rank, "dtype": dtype, "tokens": tokens}
    return {key: value for key, value in sizes.items() if value is not None}


def in_bench(
    task: str, contestant: str, sizes: Figure, get: Callable[[Figure], float | None]
) -> Callable[[list[Figure]], float | None]:
    """Return a function that takes a number from the last such result of the benchmark.

    It is one of CuPy's run, unless the sizes name PyTorch's device.
    """
    wanted = {**CUPY, **sizes}

    def find(figures: list[Figure]) -> float | None:
        for one in reversed(results(figures)):
            if (one["task"], one["contestant"]) == (task, contestant) and fits(one, wanted):
                return get(one)
        return None

    return find


def fits(figure: Figure, sizes: Figure) -> bool:
    """Return whether a figure has these sizes."""
    case = {**CUPY, **figure["case"]}
    return all(case[key] == value for key, value in sizes.items())


def median_of(ratio: str) -> Callable[[Figure], float | None]:
    """Return a function that takes the median of a ratio, which is None where it has none."""
    return lambda result: result[ratio][1] if result[ratio] else None


def over_peft(array: str) -> Callable[[list[Figure]], float | None]:
    """Return a function that divides the error of our array by that of PEFT's, for a step."""

    def find(figures: list[Figure]) -> float | None:
        ours, theirs = (
            in_bench("step", name, SQUARE_STEP, lambda one: one.get("errors", {}).get(array))(
                figures
            )
            for name in ("detached", "DoRA")
        )
        return ours / theirs if ours is not None and theirs else None

    return find


def in_kernels(
    call: str, sizes: Figure, over: str = "", key: str = "microseconds"
) -> Callable[[list[Figure]], float | None]:
    """Return a function that takes a number from the sums of kernels, or divides it by another."""

    def of(name: str, figures: list[Figure]) -> float | None:
        found = [one for one in figures if one["part"] == "kernels" and one["call"] == name]
        return next((one[key] for one in reversed(found) if fits(one, sizes)), None)

    def find(figures: list[Figure]) -> float | None:
        value, bare = of(call, figures), of(over, figures) if over else 1
        return value / bare if value is not None and bare else None

    return find


def on_packed(sizes: Figure) -> Callable[[list[Figure]], float | None]:
    """Return a function that takes the ratio of a step on a 4-bit weight to that on the array."""

    def find(figures: list[Figure]) -> float | None:
        found = [one for one in figures if one["part"] == "quantised" and fits(one, sizes)]
        return found[-1]["ratio"] if found else None

    return find


SQUARE, SQUARE_STEP, SQUARE_TOKEN = (
    case(4096, 4096, 16, "bfloat16", tokens) for tokens in (None, 4096, 1)
)
WIDE_STEP = case(4096, 11008, 16, "bfloat16", 4096)
LARGE_STEP, LARGE_TOKEN = (case(8192, 28672, 64, "bfloat16", tokens) for tokens in (4096, 1))
TORCH_STEP = {**SQUARE_STEP, "device": "cuda"}
SINGLE_STEP = case(4096, 4096, 16, "float32", 4096)
PACKED_STEP = case(4096, 4096, 16, "float32", 512)
BARE, PEFT = median_of("over_own_bare"), median_of("peft_over_it")


def microseconds(result: Figure) -> float:
    """Return the median time of a result on the device."""
    return 1e6 * float(result["seconds_quartiles"][1])


def host_ms(result: Figure) -> float:
    """Return the time that the host needs for a call."""
    return 1e3 * float(result["host_seconds"])


def step(shape: str, limit: float, sizes: Figure) -> Goal:
    """Return the goal of an exact step over the bare products."""
    kernels = in_kernels("step", sizes, "bare products")
    find = in_bench("step", "exact", sizes, BARE)
    return Goal(f"exact step ÷ bare, {shape}", limit, find, kernels=kernels)


def token(shape: str, limit: float, sizes: Figure) -> Goal:
    """Return the goal of one token over its bare product."""
    kernels = in_kernels("forward", sizes, "bare product")
    find = in_bench("evaluation", "norm reused", sizes, BARE)
    return Goal(f"one token ÷ bare, {shape}", limit, find, kernels=kernels)


def merge(name: str, limit: float, call: str, contestant: str) -> Goal:
    """Return the goal of a merge over the device's copy."""
    kernels = in_kernels(call, SQUARE, "copy of W")
    find = in_bench("merge", contestant, SQUARE, BARE)
    return Goal(f"merge ÷ copy, {name}", limit, find, kernels=kernels)


GOALS = (
    step("4096×4096 r16", 1.35, SQUARE_STEP),
    step("4096×11008 r16", 1.20, WIDE_STEP),
    step("8192×28672 r64", 1.12, LARGE_STEP),
    Goal(
        "PEFT's detached step ÷ our exact step", 2.3, in_bench("step", "exact", SQUARE_STEP, PEFT),
        at_least=True,
    ),
    Goal(
        "PyTorch alone: PEFT's step ÷ it accelerated, exact", 2.0,
        in_bench("step", "accelerated, exact", TORCH_STEP, PEFT), at_least=True,
    ),
    step("4096×4096 float32", 1.08, SINGLE_STEP),
    Goal(
        "norm, ‖w‖² known, µs", 18, in_bench("norm", "‖w‖² reused", SQUARE, microseconds),
        kernels=in_kernels("norm", SQUARE),
    ),
    merge("n known", 1.4, "merge", "norm reused"),
    merge("from nothing", 2.1, "merge, from nothing", "from nothing"),
    token("4096×4096", 1.10, SQUARE_TOKEN),
    token("8192×28672", 1.15, LARGE_TOKEN),
    Goal("launches of a step", 14, in_kernels("step", SQUARE_STEP, key="launches")),
    Goal("host time of a step, ms", 0.3, in_bench("step", "exact", SQUARE_STEP, host_ms)),
    Goal("AdamW of 24 leaves, host, ms", 0.15, in_bench("adamw", "adamw_step", SQUARE, host_ms)),
    Goal("step on 4 bits ÷ on float32, 512 tokens", 1.3, on_packed(PACKED_STEP)),
    Goal("error of dA ÷ PEFT's, both detached", 1, over_peft("dA")),
    Goal("error of dB ÷ PEFT's, both detached", 1, over_peft("dB")),
)  # fmt: skip
"""4096×4096 of rank 16 in bfloat16 and 4096 tokens, unless the name says something else."""


def table(figures: list[Figure]) -> list[str]:
    """Return the lines of the table of goals."""
    heading = "4096×4096 of rank 16 in bfloat16, 4096 tokens, unless the line says another:"
    return [heading, *(f"  {goal.line(figures)}" for goal in GOALS)]
