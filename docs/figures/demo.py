"""Run the demo and draw its pictures, for light and dark pages.

    python docs/figures/demo.py

It trains both networks of `doraxp demo`, in about a minute. It writes docs/images/demo.png and
demo-dark.png, the same two of the convolutional network, and the figures to docs/benchmarks/
demo.json, from which `python benchmarks/pages.py demo` makes the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from doraxp.demo import Settings, experiment, report, save_picture

DOCS = Path(__file__).resolve().parents[1]
NAMES = {"linear": "demo", "convolutional": "demo-convolutional"}
FIGURES = DOCS / "benchmarks" / "demo.json"


def main() -> int:
    """Train, draw and write."""
    sys.path.insert(0, str(DOCS.parent / "benchmarks"))
    from dated import conditions

    reports = {}
    for network, name in NAMES.items():
        results = experiment(Settings(network=network), lambda what, seed: None)
        reports[network] = report(results)
        for dark, ending in ((False, ""), (True, "-dark")):
            save_picture(results, DOCS / "images" / f"{name}{ending}.png", dark=dark)
    FIGURES.write_text(json.dumps({"run": conditions(), **reports}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
