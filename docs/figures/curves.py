"""Draw docs/images/curves.png and curves-dark.png from docs/benchmarks/curves.json.

python benchmarks/pages.py curves --run    measures, and draws
python docs/figures/curves.py              draws again
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from doraxp.bench import Measured, Workload, collect, save_curves

DOCS = Path(__file__).resolve().parents[1]
BASE = Workload(4096, 4096, 512, 16)
KINDS = {"bare products": "bare"}


def measured(result: dict[str, Any]) -> Measured:
    """Return a result of `doraxp bench --curves --json FILE` as it was measured."""
    name = result["contestant"]
    return Measured(
        Workload(**result["case"]),
        result["task"],
        name,
        result["library"],
        KINDS.get(name, name),
        result["seconds"],
        result["peak_bytes"],
    )


def main() -> int:
    """Draw both pictures."""
    (run,) = json.loads((DOCS / "benchmarks" / "curves.json").read_text("utf-8"))
    if "results" not in run:
        print("curves.json has no single points: run python benchmarks/pages.py curves --run")
        return 1
    curves = collect(BASE, [measured(result) for result in run["results"]])
    for dark, ending in ((False, ""), (True, "-dark")):
        save_curves(curves, DOCS / "images" / f"curves{ending}.png", dark=dark)
    return 0


if __name__ == "__main__":
    sys.exit(main())
