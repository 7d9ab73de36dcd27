"""How much of an update a merge keeps in 16 bits, rounded to nearest and stochastic, and the time.

    python benchmarks/rounding.py [--width 4096] [--rounds 5]

Each line merges one weight with a DoRA adapter whose update is the given part of the weight (root
mean square), into the weight's own dtype. `unchanged` is the share of numbers that the merge to
nearest leaves as they were. The last line is the time of a merge with stochastic rounding, divided
by that of the merge to nearest before it: the median of all pairs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np
from safetensors.numpy import load_file, save_file

from doraxp import AdaptedLayer, Adapter, Config, LayerKind
from doraxp.checkpoint import Options, plan_merge, run_merge, save_adapters

NAME, RANK = "block.q", 16
UPDATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def write(folder: Path, dtype: str, update: float, width: int) -> None:
    """Write a base of one weight, and an adapter for it whose norms are those of V."""
    rng = np.random.default_rng(0)
    weight = (0.02 * rng.standard_normal((width, width), np.float32)).astype(dtype)
    save_file({f"{NAME}.weight": weight}, folder / "base.safetensors")
    a = rng.standard_normal((RANK, width), np.float32)
    b = np.float32(0.02 * update / RANK**0.5) * rng.standard_normal((width, RANK), np.float32)
    m = np.linalg.norm(weight.astype(np.float32) + b @ a, axis=1)
    layer = AdaptedLayer(Adapter(a, b, m), Config(RANK), LayerKind(), (width, width))
    save_adapters(folder / "adapter", {NAME: layer})


def main() -> None:
    """Print the table and the ratio of the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{'dtype':10}{'update':>8}{'unchanged':>11}{'nearest':>9}{'stochastic':>12}")
    ratios = []
    for dtype, update in itertools.product(("bfloat16", "float16"), UPDATES):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, dtype, update, arguments.width)
            kept = {}
            for i in range(arguments.rounds):
                seconds = {}
                for rounding in ("nearest", "stochastic"):
                    out = folder / f"{rounding}.safetensors"
                    options = Options(rounding=rounding)
                    plan = plan_merge(folder / "base.safetensors", folder / "adapter", options)
                    start = time.perf_counter()
                    (change,) = run_merge(plan, out, force=i > 0).values()
                    seconds[rounding] = time.perf_counter() - start
                    kept[rounding] = change.kept
                ratios.append(seconds["stochastic"] / seconds["nearest"])
            before, after = (
                load_file(folder / f"{file}.safetensors")[f"{NAME}.weight"]
                for file in ("base", "nearest")
            )
            unchanged = float(np.mean(before == after))
        print(
            f"{dtype:10}{update:8.0e}{unchanged:11.0%}{kept['nearest']:9.3f}"
            f"{kept['stochastic']:12.3f}"
        )
    print(f"time of stochastic ÷ nearest: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
